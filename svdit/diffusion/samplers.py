"""Samplers: functions of one signature that walk x from pure noise to a picture.

    sampler(denoise, x, schedule, *, noise, callback) -> x_0

`denoise(x, t)` is the model, guidance included: (N, C, H, W) and (N,) timesteps to (N, C or 2C, H, W).
`noise()` returns the next (N, C, H, W) of fresh noise; `callback(done, x)` is told after each step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdit.diffusion.posterior import predict, split_output, x0_from_eps
from svdit.diffusion.schedule import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
Callback = Callable[[int, Tensor], None]


def _silent(done: int, x: Tensor) -> None:
    pass


def _call(denoise: Denoise, x: Tensor, schedule: Schedule, i: int) -> Tensor:
    return denoise(x, torch.full((len(x),), int(schedule.timesteps[i]), device=x.device))


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, *, noise: Noise, callback: Callback = _silent) -> Tensor:
    """Ancestral sampling, x_{t−1} = μ + σ z (DDPM, algorithm 2). The last step's z is drawn and not used."""
    for done, i in enumerate(reversed(range(len(schedule))), 1):
        step = predict(_call(denoise, x, schedule, i), x, schedule, i)
        z = noise()
        x = step.mean + (0.5 * step.log_variance).exp() * z if i else step.mean
        callback(done, x)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    callback: Callback = _silent,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, eq. (12) of arXiv 2010.02502; η = 0 is deterministic and draws nothing, η = 1 is ancestral with β̃."""
    for done, i in enumerate(reversed(range(len(schedule))), 1):
        eps, _ = split_output(_call(denoise, x, schedule, i), x)
        x0 = x0_from_eps(x, eps, schedule, i)
        abar, previous = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_prev[i])
        sigma = eta * math.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(1 - previous - sigma**2) * eps
        if eta and i:
            x = x + sigma * noise()
        callback(done, x)
    return x


def dpm_solver(
    denoise: Denoise, x: Tensor, schedule: Schedule, *, noise: Noise, callback: Callback = _silent
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, in λ = log(α/σ); first order at both ends, draws nothing."""
    abar = schedule.alphas_cumprod
    alphas, sigmas, lambdas = abar.sqrt(), (1 - abar).sqrt(), 0.5 * (abar / (1 - abar)).log()
    previous: Tensor | None = None
    for done, i in enumerate(reversed(range(len(schedule))), 1):
        eps, _ = split_output(_call(denoise, x, schedule, i), x)
        x0 = x0_from_eps(x, eps, schedule, i)
        if i == 0:
            x = x0  # σ = 0 is reached: h is infinite and the first-order step is x_0 itself
        else:
            h = float(lambdas[i - 1] - lambdas[i])
            direction = x0
            if previous is not None:
                r = float(lambdas[i] - lambdas[i + 1]) / h
                direction = x0 + (x0 - previous) / (2 * r)
            x = float(sigmas[i - 1] / sigmas[i]) * x - float(alphas[i - 1]) * math.expm1(-h) * direction
        previous = x0
        callback(done, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}
