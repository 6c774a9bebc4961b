"""Predictions against diffusers' schedulers; the published losses fix the rest of ε's."""

import dataclasses
from typing import get_args

import pytest
import torch
from conftest import relative
from torch import Tensor

from svdit.diffusion.losses import training_loss
from svdit.diffusion.paths import DIRECTIONS, FLOW_PREDICTIONS, PATHS
from svdit.diffusion.posterior import reverse_step
from svdit.diffusion.prediction import PREDICTIONS, q_sample
from svdit.diffusion.samplers import SAMPLERS, Denoise
from svdit.diffusion.schedule import make_schedule
from svdit.errors import UserError
from svdit.model.config import FAMILIES, DiTConfig
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402

THEIRS = {"epsilon": "epsilon", "velocity": "v_prediction", "x0": "sample"}
SHAPE = (3, 2, 4, 4)
# A float32 result of a few products and sums: 8 roundings of 2^-24, enlarged by the cancellation in x_t − √ᾱ x_0 and
# in √ᾱ x_t − √(1 − ᾱ) v, where a noise level of √(1 − ᾱ) ≥ 0.01 remains of numbers up to 1: a factor of 100 at most.
BOUND = 8 * 2.0**-24 * 100


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_the_model_names_the_same_predictions_times_and_paths() -> None:
    fields = {f.name: set(get_args(f.type)) for f in dataclasses.fields(DiTConfig)}
    assert fields["prediction"] == set(PREDICTIONS) | set(FLOW_PREDICTIONS)
    assert fields["time"] == {"timesteps", *DIRECTIONS}
    assert fields["path"] == {"ddpm", *PATHS}
    assert fields["family"] == set(FAMILIES)
    assert DiTConfig().prediction == "epsilon"  # also of files written before the field existed
    with pytest.raises(UserError, match="path 'ddpm' and prediction 'score' does not exist; choose"):
        DiTConfig(prediction="score")


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("i", [0, 5, 999, torch.tensor([0, 500, 999])])
def test_the_target_is_read_back_as_x0_and_eps(name: str, i: int | Tensor) -> None:
    x0, eps = tensors(0)
    schedule, prediction = make_schedule(), PREDICTIONS[name]
    x = q_sample(x0, eps, schedule, i)
    target = prediction.target(x0, eps, schedule, i)
    # At t = 999 √ᾱ is 0.006 and ε's rounding is divided by it: 1/0.006 = 160 is above the factor of 100.
    assert relative(prediction.x0(target, x, schedule, i), x0) < 2 * BOUND
    assert relative(prediction.eps(target, x, schedule, i), eps) < BOUND


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_ddim_step_equals_diffusers(name: str) -> None:
    schedule = make_schedule("ddim50")
    theirs = DDIMScheduler(
        beta_schedule="linear", clip_sample=False, set_alpha_to_one=True, prediction_type=THEIRS[name]
    )
    theirs.set_timesteps(50)
    x, output = tensors(1)
    for i in (1, 25, 49):
        expected = theirs.step(output, int(schedule.timesteps[i]), x)
        ours = PREDICTIONS[name]
        x0, eps = ours.x0(output, x, schedule, i), ours.eps(output, x, schedule, i)
        assert relative(x0, expected.pred_original_sample) < BOUND
        previous = float(schedule.alphas_cumprod_prev[i])
        assert relative(previous**0.5 * x0 + (1 - previous) ** 0.5 * eps, expected.prev_sample) < BOUND


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("learned", [False, True])
def test_the_reverse_step_equals_diffusers(name: str, learned: bool) -> None:
    schedule = make_schedule()
    theirs = DDPMScheduler(
        beta_schedule="linear",
        clip_sample=False,
        prediction_type=THEIRS[name],
        variance_type="learned_range" if learned else "fixed_large",
    )
    x, output = tensors(2)
    variance = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    full = torch.cat([output, variance], dim=1) if learned else output
    for i in (100, 500, 999):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        mean, log_variance = reverse_step(full, x, schedule, i, name)
        expected = theirs.step(full, i, x, generator=torch.Generator().manual_seed(0)).prev_sample
        ours = mean + (0.5 * log_variance).exp() * noise
        # diffusers computes in float32. ᾱ is a product of i factors, hence off by i · 2^-24, which is 6e-5 of 1 − ᾱ
        # here; β = 1 − ᾱ_t/ᾱ_{t−1} ≥ 0.002 is off by 2 · 2^-24, which is again 6e-5 of it. Both scale the mean.
        assert relative(ours, expected) < 2e-4


def ideal(mean: float, std: float, name: str) -> Denoise:
    """The best prediction for data N(mean, std²)."""
    schedule = make_schedule()
    read = PREDICTIONS[name]

    def denoise(x: Tensor, t: int) -> Tensor:
        abar = float(schedule.alphas_cumprod[t])
        eps = (1 - abar) ** 0.5 * (x - abar**0.5 * mean) / (abar * std**2 + 1 - abar)
        return read.target(PREDICTIONS["epsilon"].x0(eps, x, schedule, t), eps, schedule, t)

    return denoise


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_agree_on_every_prediction(sampler: str) -> None:
    """The same ideal model in three parametrizations walks to the same images."""
    images = {}
    for name in PREDICTIONS:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(2, 1, 8, 8, generator=generator)
        images[name] = SAMPLERS[sampler](
            ideal(0.3, 0.5, name),
            z,
            make_schedule(20),
            noise=lambda g=generator: torch.randn(2, 1, 8, 8, generator=g),
            prediction=name,
        )
    # 20 steps, each within the bound of a conversion there and back; DDPM and DPM-Solver++ read only x_0
    assert relative(images["x0"], images["epsilon"]) < 20 * 2 * BOUND
    assert 0 < relative(images["velocity"], images["epsilon"]) < 20 * 2 * BOUND


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_loss_of_a_perfect_model_is_zero(name: str) -> None:
    x0, eps = tensors(4)
    schedule, i = make_schedule(), torch.tensor([0, 300, 999])
    target = PREDICTIONS[name].target(x0, eps, schedule, i)
    perfect = training_loss(lambda x, t: target, x0, eps, schedule, i, name)
    assert perfect.mse.max() == 0
    for other in PREDICTIONS:
        if other != name:
            assert training_loss(lambda x, t: target, x0, eps, schedule, i, other).mse.max() > 0.1
