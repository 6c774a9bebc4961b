"""The Gaussians of diffusion: q(x_t | x_0), q(x_{t−1} | x_t, x_0) and the model's p(x_{t−1} | x_t).

Equation numbers are those of DDPM (arXiv 2006.11239) and of improved DDPM (arXiv 2102.09672).
A step `i` is an int, or a tensor (N,) with one step an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from svdit.diffusion.schedule import Schedule

Step = int | Tensor


class Prediction(NamedTuple):
    """What a model says of one step; each (N, C, H, W)."""

    x0: Tensor
    mean: Tensor
    log_variance: Tensor


def at(values: Tensor, i: Step, like: Tensor) -> Tensor:
    """values[i] as float32 on `like`'s device, shaped to broadcast over (N, C, H, W)."""
    return values.to(like.device, torch.float32)[i].reshape(-1, *[1] * (like.ndim - 1))


def q_sample(x0: Tensor, eps: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """x_t = √ᾱ x_0 + √(1 − ᾱ) ε, DDPM eq. (4)."""
    abar = schedule.alphas_cumprod
    return at(abar.sqrt(), i, x0) * x0 + at((1 - abar).sqrt(), i, x0) * eps


def x0_from_eps(x: Tensor, eps: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """The x_0 that q_sample would have turned into x with this ε."""
    abar = schedule.alphas_cumprod
    return at((1 / abar).sqrt(), i, x) * x - at((1 / abar - 1).sqrt(), i, x) * eps


def posterior_mean(x0: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """μ̃ of q(x_{t−1} | x_t, x_0), DDPM eq. (7)."""
    abar, previous, betas = schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas
    of_x0 = betas * previous.sqrt() / (1 - abar)
    of_x = (1 - previous) * (1 - betas).sqrt() / (1 - abar)
    return at(of_x0, i, x) * x0 + at(of_x, i, x) * x


def predict(output: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Prediction:
    """Read a model output (N, C or 2C, H, W): ε, and where present the learned range of the variance.

    Learned: log σ² = v log β + (1 − v) log β̃ with v = (output + 1)/2, improved DDPM eq. (15). Otherwise σ² = β,
    but at the first step the second step's β̃, as the published code does.
    """
    eps, learned = split_output(output, x)
    if learned is None:
        log_variance = torch.cat([schedule.posterior_variance[1:2], schedule.betas[1:]]).log()
        log_sigma2 = at(log_variance if len(schedule) > 1 else schedule.betas.log(), i, x).expand_as(x)
    else:
        v = (learned + 1) / 2
        low, high = at(schedule.posterior_log_variance, i, x), at(schedule.betas.log(), i, x)
        log_sigma2 = v * high + (1 - v) * low
    x0 = x0_from_eps(x, eps, schedule, i)
    return Prediction(x0, posterior_mean(x0, x, schedule, i), log_sigma2)


def split_output(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """ε and the variance channels (None where the model has none)."""
    channels = x.shape[1]
    return output[:, :channels], (output[:, channels:] if output.shape[1] == 2 * channels else None)
