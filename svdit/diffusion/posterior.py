"""The Gaussians of a sampling step: q(x_{t−1} | x_t, x_0) and the model's p(x_{t−1} | x_t).

Equation numbers are those of DDPM (arXiv 2006.11239) and of improved DDPM (arXiv 2102.09672).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from svdit.diffusion.prediction import PREDICTIONS, Step, split_output
from svdit.diffusion.schedule import Schedule, at


class Gaussian(NamedTuple):
    """Mean and log σ², each (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


def posterior_mean(x0: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """μ̃ of q(x_{t−1} | x_t, x_0), DDPM eq. (7); (N, C, H, W)."""
    abar, previous, betas = schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas
    of_x0 = betas * previous**0.5 / (1 - abar)
    of_x = (1 - previous) * (1 - betas) ** 0.5 / (1 - abar)
    return at(of_x0, i, x) * x0 + at(of_x, i, x) * x


def reverse_step(output: Tensor, x: Tensor, schedule: Schedule, i: Step, prediction: str) -> Gaussian:
    """p(x_{t−1} | x_t) of a model output (N, C or 2C, H, W).

    Learned variance: log σ² = v log β + (1 − v) log β̃ with v = (output + 1)/2, improved DDPM eq. (15). Otherwise
    σ² = β, but at the first step the second step's β̃, as in the published code.
    """
    predicted, learned = split_output(output, x)
    x0 = PREDICTIONS[prediction].x0(predicted, x, schedule, i)
    log_beta, log_beta_tilde = np.log(schedule.betas), schedule.posterior_log_variance
    if learned is None:
        fixed = np.append(log_beta_tilde[:1], log_beta[1:])
        log_variance = torch.zeros_like(x) + at(fixed, i, x)
    else:
        v = (learned + 1) / 2
        log_variance = v * at(log_beta, i, x) + (1 - v) * at(log_beta_tilde, i, x)
    return Gaussian(posterior_mean(x0, x, schedule, i), log_variance)
