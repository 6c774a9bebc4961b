"""Guidance against the published `forward_with_cfg`, whose first half is the conditional one."""

import pytest
import torch
from conftest import Golden, relative

from svdit.diffusion.guidance import Interval, guided


@torch.no_grad()
@pytest.mark.parametrize(("key", "scale"), [("forward_cfg4", 4.0), ("forward_cfg15", 1.5)])
def test_guidance_equals_published(golden: Golden, key: str, scale: float) -> None:
    half = len(golden["x"]) // 2
    expected = golden[key][:half]
    for row in range(half):
        pair = golden["t"][row::half]  # the published batch has other timesteps in its unconditional half
        model = lambda x, t, y, pair=pair: golden.model(x, pair, y)  # noqa: E731
        denoise = guided(model, golden["y"][row : row + 1], golden.model.null_class, scale)
        output = denoise(golden["x"][row : row + 1], int(pair[0]))
        assert relative(output, expected[row : row + 1]) < 2e-5


@torch.no_grad()
def test_all_channels_guides_the_fourth_too(golden_learned: Golden) -> None:
    model, x = golden_learned.model, golden_learned["x"][:2]
    y = torch.tensor([1, 2])
    three, every = (guided(model, y, 10, 4.0, channels)(x, 500) for channels in (3, None))
    assert torch.equal(three[:, :3], every[:, :3])
    assert not torch.allclose(three[:, 3], every[:, 3])
    assert torch.equal(three[:, 4:], every[:, 4:])


@torch.no_grad()
def test_scale_one_is_the_conditional_model(golden: Golden) -> None:
    x, y = golden["x"], golden["y"]
    assert torch.equal(guided(golden.model, y, 10, 1)(x, 7), golden.model(x, torch.full((len(x),), 7), y))


@torch.no_grad()
def test_outside_of_the_interval_only_the_conditional_half_runs(golden: Golden) -> None:
    x, y, sizes = golden["x"][:2], torch.tensor([1, 2]), list[int]()

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return golden.model(x, t, y)

    part, always, never = (
        guided(model, y, 10, s, 3, interval) for s, interval in ((4, Interval(100, 500)), (4, None), (1, None))
    )
    for t, same in ((99, never), (100, always), (500, always), (501, never)):
        assert torch.equal(part(x, t), same(x, t))
    assert sizes == [2, 2, 4, 4, 4, 4, 2, 2]
