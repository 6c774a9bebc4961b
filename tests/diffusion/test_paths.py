"""Paths and conversions, against SiT's recorded training targets and against Gaussian data, whose score is known."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, relative
from gaussian import exact

from svdit.diffusion.paths import DIRECTIONS, FLOW_PREDICTIONS, PATHS, Path, interpolate, velocity

SIT = np.load(GOLDEN / "sit" / "sit_learn_sigma.npz")
TIMES = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.94], dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
def test_points_and_targets_equal_published(name: str) -> None:
    x0, eps, t, xt, target = (
        torch.from_numpy(SIT[f"loss_{key}"])
        for key in ("data", "noise", f"t_{name}_velocity", f"xt_{name}_velocity", f"ut_{name}_velocity")
    )
    point = Path(name).at(t.reshape(-1, 1, 1, 1))
    assert relative(interpolate(x0, eps, point), xt) < 1e-6
    assert relative(velocity(x0, eps, point), target) < 1e-6


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", DIRECTIONS)
def test_derivatives_are_those_of_the_coefficients(name: str, time: str) -> None:
    path, h = Path(name, time), 1e-6
    point, before, after = path.at(TIMES), path.at(TIMES - h), path.at(TIMES + h)
    torch.testing.assert_close(point.d_alpha, (after.alpha - before.alpha) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(point.d_sigma, (after.sigma - before.sigma) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", DIRECTIONS)
@pytest.mark.parametrize("prediction", FLOW_PREDICTIONS)
def test_every_prediction_gives_the_same_velocity_and_score(name: str, time: str, prediction: str) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in TIMES:
        path = Path(name, time)
        t = path.forward(t)
        output, v, score = exact(prediction, x, path, t, 0.3, 0.5)
        read, point = FLOW_PREDICTIONS[prediction], path.at(t)
        assert relative(read.velocity(output, x, point), v) < 1e-9
        assert relative(read.score(output, x, point), score) < 1e-9


@pytest.mark.parametrize("prediction", FLOW_PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", DIRECTIONS)
@pytest.mark.parametrize("t", [0.96, 0.999])
def test_scores_near_the_data_are_exact(prediction: str, name: str, time: str, t: float) -> None:
    """Where the velocity of clean images is bounded: an SDE multiplies the score by a diffusion that may be large."""
    path = Path(name, time)
    now = path.forward(torch.tensor(t, dtype=torch.float64))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output, _, score = exact(prediction, x, path, now, 0.3, 0.5)
    assert relative(FLOW_PREDICTIONS[prediction].score(output, x, path.at(now)), score) < 1e-6


@pytest.mark.parametrize("prediction", FLOW_PREDICTIONS)
@pytest.mark.parametrize("time", DIRECTIONS)
def test_targets_are_what_the_conversions_read(prediction: str, time: str) -> None:
    x0, eps = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = Path("gvp", time)
    p = path.at(path.forward(TIMES).reshape(-1, 1, 1, 1))
    target = FLOW_PREDICTIONS[prediction].target(x0, eps, p)
    assert (
        relative(FLOW_PREDICTIONS[prediction].velocity(target, interpolate(x0, eps, p), p), velocity(x0, eps, p)) < 1e-9
    )


def test_the_velocity_of_a_clean_image_is_bounded_near_the_data() -> None:
    x, x0 = torch.tensor([[[[0.5]]]]), torch.tensor([[[[0.6]]]])
    for t, divisor in ((0.9, 0.1), (0.97, 0.05), (1.0, 0.05)):
        v = FLOW_PREDICTIONS["x0"].velocity(x0, x, Path().at(torch.tensor(t)))
        torch.testing.assert_close(v, (x0 - x) / divisor)
