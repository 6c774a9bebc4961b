"""Samplers: functions of one signature that turn noise into images.

    sampler(denoise, x, schedule, *, noise, prediction, callback) -> x_0

`denoise(x, t)` is the model with guidance: (N, C, H, W) and one timestep to (N, C or 2C, H, W). `prediction` says
what its output means, a key of `PREDICTIONS`. `noise()` returns the next (N, C, H, W) of fresh noise.
`callback(done, x)` is called after each sampling step.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from svdit.diffusion.posterior import reverse_step
from svdit.diffusion.prediction import PREDICTIONS, split_output
from svdit.diffusion.schedule import Schedule

Denoise = Callable[..., Tensor]
Noise = Callable[[], Tensor]
Callback = Callable[[int, Tensor], None]


def silent(done: int, x: Tensor) -> None:
    """The callback that does nothing; x is (N, C, H, W)."""


def countdown(schedule: Schedule) -> Iterator[tuple[int, int, int]]:
    """(finished steps after this one, step i, timestep t) from the most noise to the least."""
    for i in reversed(range(len(schedule))):
        yield len(schedule) - i, i, int(schedule.timesteps[i])


def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    prediction: str = "epsilon",
    callback: Callback = silent,
) -> Tensor:
    """Ancestral sampling, x_{t−1} = μ + σ z (DDPM, algorithm 2), of (N, C, H, W). The last z is drawn but not used."""
    for done, i, t in countdown(schedule):
        mean, log_variance = reverse_step(denoise(x, t), x, schedule, i, prediction)
        z = noise()
        x = mean + (0.5 * log_variance).exp() * z if i else mean
        callback(done, x)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    prediction: str = "epsilon",
    callback: Callback = silent,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, eq. (12) of arXiv 2010.02502, of (N, C, H, W).

    η = 0 is deterministic and draws no noise, η = 1 is ancestral with β̃.
    """
    read = PREDICTIONS[prediction]
    for done, i, t in countdown(schedule):
        output, _ = split_output(denoise(x, t), x)
        x0, eps = read.x0(output, x, schedule, i), read.eps(output, x, schedule, i)
        abar, previous = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_prev[i])
        sigma = eta * math.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(1 - previous - sigma**2) * eps
        if eta and i:
            x = x + sigma * noise()
        callback(done, x)
    return x


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    prediction: str = "epsilon",
    callback: Callback = silent,
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, of (N, C, H, W), in λ = log(α/σ).

    First order in the first step and in the one to t = 0, where λ grows by so much more than before that extrapolation
    overshoots, as with diffusers' `euler_at_final`; draws no noise.
    """
    abar = schedule.alphas_cumprod
    alphas, sigmas, lambdas = abar**0.5, (1 - abar) ** 0.5, 0.5 * np.log(abar / (1 - abar))
    previous: Tensor | None = None
    for done, i, t in countdown(schedule):
        output, _ = split_output(denoise(x, t), x)
        x0 = PREDICTIONS[prediction].x0(output, x, schedule, i)
        if i == 0:
            x = x0  # σ = 0: h is infinite and the first-order step is x_0 itself
        else:
            h = float(lambdas[i - 1] - lambdas[i])
            direction = x0
            if previous is not None and i > 1:
                r = float(lambdas[i] - lambdas[i + 1]) / h
                direction = x0 + (x0 - previous) / (2 * r)
            x = float(sigmas[i - 1] / sigmas[i]) * x - float(alphas[i - 1]) * math.expm1(-h) * direction
        previous = x0
        callback(done, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}
