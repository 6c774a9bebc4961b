"""Losses of flow models against the published ones, on the published outputs of each family."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from families import MODELS, Published
from torch import Tensor

from svdit.diffusion.flow_losses import (
    WEIGHTS,
    cosine_error,
    flow_error,
    lognormal_times,
    mean_square,
    projection_error,
    uniform_times,
)
from svdit.diffusion.paths import DIRECTIONS, FLOW_PREDICTIONS, PATHS, Path, interpolate, velocity

NEAR = {"rtol": 1e-4, "atol": 1e-6}
SIT, REPA = ([name for name in MODELS if name.startswith(f"{family}/")] for family in ("sit", "repa"))
PUBLISHED = {"epsilon": "noise"}  # names of predictions
CASES = [(path, "velocity", "none") for path in PATHS]
CASES += [("linear", prediction, weight) for prediction in ("epsilon", "score") for weight in WEIGHTS]


@torch.no_grad()
def error(published: Published, path: Path, t: Tensor, prediction: str, weight: str = "none") -> tuple[Tensor, Tensor]:
    """The mean squared error, and the output, of a published model's loss at times t (N,)."""
    x0, eps, point = published["loss_data"], published["loss_noise"], path.at(t.reshape(-1, 1, 1, 1))
    eps = published.config.noise_scale * eps
    output = published.model(interpolate(x0, eps, point), t, published["loss_y"])
    return mean_square(flow_error(output, x0, eps, point, prediction, weight)), output


@pytest.mark.parametrize("name", SIT)
@pytest.mark.parametrize(("path", "prediction", "weight"), CASES)
def test_sit(name: str, path: str, prediction: str, weight: str) -> None:
    published, key = Published(name), f"{path}_{PUBLISHED.get(prediction, prediction)}"
    t = uniform_times(published["loss_u"], Path(path), prediction)
    torch.testing.assert_close(t, published[f"loss_t_{key}"], rtol=1e-6, atol=1e-7)
    expected = published[f"loss_{key}" + ("" if weight == "none" else f"_{weight}weight")]
    torch.testing.assert_close(error(published, Path(path), t, prediction, weight)[0], expected, **NEAR)


@torch.no_grad()
def projected(published: Published, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """The projections (N, T, F) of the tokens that leave the block of the published encoder's depth."""
    tokens: list[Tensor] = []
    block = published.model.blocks[published.raw["encoder_depth"] - 1]
    with block.register_forward_hook(lambda module, inputs, output: tokens.append(output)):
        published.model(x, t, y)
    found = []
    for i in range(len(published.raw["z_dims"])):
        z = tokens[0]
        for layer in (0, 2, 4):
            weight, bias = (published.weights[f"projectors.{i}.{layer}.{key}"] for key in ("weight", "bias"))
            z = F.linear(F.silu(z) if layer else z, weight, bias)
        found.append(z)
    return found


@pytest.mark.parametrize("name", REPA)
@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("times", ["uniform", "lognormal"])
def test_repa(name: str, path: str, times: str) -> None:
    published, along = Published(name), Path(path, "data_to_noise")
    t = published["loss_t"] if times == "uniform" else lognormal_times(published["loss_normal"], along)
    key = f"{'cosine' if path == 'gvp' else path}_{times}"
    torch.testing.assert_close(error(published, along, t, "velocity")[0], published[f"loss_{key}"], **NEAR)
    x = interpolate(published["loss_data"], published["loss_noise"], along.at(t.reshape(-1, 1, 1, 1)))
    projections = projected(published, x, t, published["loss_y"])
    features = [published[f"loss_zs_{i}"] for i in range(len(projections))]
    loss = projection_error(projections, features)
    torch.testing.assert_close(loss, published[f"loss_proj_{key}"], **NEAR)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("lightningdit/")])
def test_lightningdit(name: str) -> None:
    published, path = Published(name), Path()
    t = lognormal_times(published["loss_normal"], path)
    torch.testing.assert_close(t, published["loss_t"])
    mse, output = error(published, path, t, "velocity")
    torch.testing.assert_close(mse, published["loss_mse"], **NEAR)
    target = velocity(published["loss_data"], published["loss_noise"], path.at(t.reshape(-1, 1, 1, 1)))
    torch.testing.assert_close(cosine_error(output, target), published["loss_cos"], **NEAR)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("jit/")])
def test_jit(name: str) -> None:
    published = Published(name)
    t = lognormal_times(0.8 * published["loss_normal"] - 0.8, Path())
    torch.testing.assert_close(error(published, Path(), t, "x0")[0].mean(), published["loss"], **NEAR)


@pytest.mark.parametrize("prediction", FLOW_PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", DIRECTIONS)
def test_gradients_are_finite_at_the_first_and_last_time(prediction: str, name: str, time: str) -> None:
    path, u = Path(name, time), torch.tensor([0.0, 1 - 2**-24])
    point = path.at(uniform_times(u, path, prediction).reshape(-1, 1, 1, 1))
    x0, eps = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    output = torch.zeros_like(x0, requires_grad=True)
    for weight in WEIGHTS:
        mean_square(flow_error(output, x0, eps, point, prediction, weight)).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_the_error_of_a_perfect_model_is_zero() -> None:
    x0, eps = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    point = Path().at(torch.tensor([0.3, 0.99]).reshape(-1, 1, 1, 1))
    for name, prediction in FLOW_PREDICTIONS.items():
        target = prediction.target(x0, eps, point)
        assert not flow_error(target, x0, eps, point, name).any()
        assert relative(flow_error(target + 1, x0, eps, point, name), target) > 0.1
    assert cosine_error(x0, 3 * x0).abs().max() < 1e-6
