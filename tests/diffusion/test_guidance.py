"""Guidance against the published `forward_with_cfg`, whose first half is the conditional one."""

import pytest
import torch
from conftest import Golden, relative

from svdit.diffusion.guidance import guided


@torch.no_grad()
@pytest.mark.parametrize(("key", "scale"), [("forward_cfg4", 4.0), ("forward_cfg15", 1.5)])
def test_guidance_equals_published(golden: Golden, key: str, scale: float) -> None:
    half = len(golden["x"]) // 2
    denoise = guided(golden.model, golden["y"][:half], golden.model.null_class, scale)
    output = denoise(golden["x"][:half], golden["t"][:half])
    # The published half batch carries its own timesteps for the null half; where they agree, so must we.
    null = golden.model(golden["x"][:half], golden["t"][half:], golden["y"][half:])
    cond = golden.model(golden["x"][:half], golden["t"][:half], golden["y"][:half])
    expected = golden[key][:half]
    mixed = torch.cat([null[:, :3] + scale * (cond[:, :3] - null[:, :3]), cond[:, 3:]], dim=1)
    assert relative(mixed, expected) < 2e-5
    same_t = guided(
        lambda x, t, y: golden.model(x, torch.cat([golden["t"][:half], golden["t"][half:]]), y),
        golden["y"][:half],
        golden.model.null_class,
        scale,
    )(golden["x"][:half], golden["t"][:half])
    assert relative(same_t, expected) < 2e-5
    assert output.shape == expected.shape


@torch.no_grad()
def test_all_channels_guides_the_fourth_too(golden_learned: Golden) -> None:
    model, x = golden_learned.model, golden_learned["x"][:2]
    t, y = torch.tensor([500, 500]), torch.tensor([1, 2])
    three, every = (guided(model, y, 10, 4.0, channels)(x, t) for channels in (3, None))
    assert torch.equal(three[:, :3], every[:, :3])
    assert not torch.allclose(three[:, 3], every[:, 3])
    assert torch.equal(three[:, 4:], every[:, 4:])


@torch.no_grad()
def test_scale_one_is_the_conditional_model(golden: Golden) -> None:
    x, t, y = golden["x"], golden["t"], golden["y"]
    assert torch.equal(guided(golden.model, y, 10, 1)(x, t), golden.model(x, t, y))


@torch.no_grad()
def test_outside_of_an_interval_only_the_class_is_asked_for(golden: Golden) -> None:
    x, y, sizes = golden["x"][:2], torch.tensor([1, 2]), list[int]()

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return golden.model(x, t, y)

    part, always, never = (
        guided(model, y, 10, s, 3, interval) for s, interval in ((4, (100, 500)), (4, None), (1, None))
    )
    for t, same in ((99, never), (100, always), (500, always), (501, never)):
        assert torch.equal(part(x, torch.full((2,), t)), same(x, torch.full((2,), t)))
    assert sizes == [2, 2, 4, 4, 4, 4, 2, 2]
