"""Samplers against published runs (recorded noise) and against diffusers' schedulers."""

import numpy as np
import pytest
import torch
from conftest import Golden, relative
from torch import Tensor

from svdit.diffusion.guidance import guided
from svdit.diffusion.prediction import q_sample
from svdit.diffusion.samplers import SAMPLERS, Denoise, ddim, ddpm, dpm_solver
from svdit.diffusion.schedule import make_schedule
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler  # noqa: E402


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def golden_denoiser(golden: Golden, spacing: str) -> tuple[Tensor, Denoise]:
    z = golden[f"z_{spacing}"]
    y = golden["y"][: len(z)]
    return z, guided(golden.model, y, golden.model.null_class, 4.0)


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["4", "10"])
def test_ddim_equals_published(golden: Golden, spacing: str) -> None:
    z, denoise = golden_denoiser(golden, spacing)
    x = ddim(denoise, z, make_schedule(spacing), noise=no_noise)
    assert relative(x, golden[f"ddim_{spacing}"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["4", "10"])
def test_ddpm_equals_published(golden: Golden, spacing: str) -> None:
    z, denoise = golden_denoiser(golden, spacing)
    draws = iter(golden[f"ddpm_noise_{spacing}"])
    x = ddpm(denoise, z, make_schedule(spacing), noise=lambda: next(draws)[: len(z)])
    assert next(draws, None) is None
    assert relative(x, golden[f"ddpm_{spacing}"]) < 1e-4


def exact_denoiser(mean: float, std: float) -> Denoise:
    """The best ε for data N(mean, std²): a smooth problem with a known answer."""
    abar = make_schedule().alphas_cumprod

    def denoise(x: Tensor, t: int) -> Tensor:
        a = float(abar[t])
        return (1 - a) ** 0.5 * (x - a**0.5 * mean) / (a * std**2 + 1 - a)

    return denoise


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_dpm_solver_equals_diffusers(steps: int) -> None:
    schedule, denoise = make_schedule(steps), exact_denoiser(0.3, 0.5)
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="linear", algorithm_type="dpmsolver++", final_sigmas_type="sigma_min", euler_at_final=True
    )
    theirs.set_timesteps(timesteps=schedule.timesteps[:0:-1].tolist())  # all but 0, whose σ is the least
    x = z
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, int(t)), t, x).prev_sample
    x = theirs.convert_model_output(denoise(x, 0), sample=x)  # the σ of its last step is still that of t = 0
    ours = dpm_solver(denoise, z, schedule, noise=no_noise)
    # diffusers' λ is float32; its last steps differ in the sixth digit
    assert 0 < relative(ours, x) < 2e-5


@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_is_nearer_to_the_exact_solution_than_ddim(steps: int) -> None:
    mean, std, schedule = 0.3, 0.5, make_schedule(steps)
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    a = float(schedule.alphas_cumprod[-1])
    exact = mean + std * (z - a**0.5 * mean) / (a * std**2 + 1 - a) ** 0.5  # of the probability flow
    ours, ddims = (
        relative(sampler(exact_denoiser(mean, std), z, schedule, noise=no_noise), exact)
        for sampler in (dpm_solver, ddim)
    )
    assert 0 < ours < ddims


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_equals_diffusers(eta: float) -> None:
    schedule, denoise = make_schedule("ddim50"), exact_denoiser(0.3, 0.5)
    generator = torch.Generator().manual_seed(0)
    z, *draws = torch.randn(51, 2, 1, 4, 4, generator=generator)
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(50)
    assert theirs.timesteps.tolist() == schedule.timesteps[::-1].tolist()
    x = z
    for t, draw in zip(theirs.timesteps, draws, strict=True):
        last = t == 0
        x = theirs.step(denoise(x, int(t)), t, x, eta=eta, variance_noise=None if last or not eta else draw).prev_sample
    source = iter(draws)
    ours = ddim(denoise, z, schedule, noise=lambda: next(source), eta=eta)
    assert 0 < relative(ours, x) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reaches_the_data_distribution(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(64, 1, 8, 8, generator=generator)
    steps: list[int] = []
    x = SAMPLERS[name](
        exact_denoiser(0.3, 0.5),
        z,
        make_schedule(100),
        noise=lambda: torch.randn(z.shape, generator=generator),
        callback=lambda done, _: steps.append(done),
    )
    assert steps == list(range(1, 101))
    assert abs(float(x.mean()) - 0.3) < 0.03
    assert abs(float(x.std()) - 0.5) < 0.03


def test_q_sample_equals_published(golden: Golden) -> None:
    ours = q_sample(golden["x0"], golden["eps"], make_schedule(), golden["t"])
    assert relative(ours, golden["q_sample"]) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_enough_for_no_nan(name: str) -> None:
    x = SAMPLERS[name](
        exact_denoiser(0, 1), torch.randn(1, 1, 2, 2), make_schedule(1), noise=lambda: torch.randn(1, 1, 2, 2)
    )
    assert np.isfinite(x.numpy()).all()
