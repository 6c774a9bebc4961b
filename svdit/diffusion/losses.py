"""The training loss of DiT: mean squared error of the prediction, plus the variational bound for a learned variance.

The bound (improved DDPM, arXiv 2102.09672) trains only the variance: the prediction enters it detached. It is not
rescaled, as in the published DiT training.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from svdit.diffusion.posterior import posterior_mean, reverse_step
from svdit.diffusion.prediction import PREDICTIONS, q_sample, split_output
from svdit.diffusion.schedule import Schedule, at


class Loss(NamedTuple):
    """One value per image, (N,); `vb` in bits per dimension, 0 for a fixed variance."""

    total: Tensor
    mse: Tensor
    vb: Tensor


def training_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    eps: Tensor,
    schedule: Schedule,
    i: Tensor,
    prediction: str = "epsilon",
) -> Loss:
    """The loss at steps `i` (N,) of images x0 (N, C, H, W) with noise `eps`; `model(x, t)` with timesteps (N,)."""
    x = q_sample(x0, eps, schedule, i)
    output = model(x, torch.tensor(schedule.timesteps, device=i.device)[i])
    predicted, learned = split_output(output, x)
    target = PREDICTIONS[prediction].target(x0, eps, schedule, i)
    mse = (predicted - target).square().flatten(1).mean(1)
    if learned is None:
        return Loss(mse, mse, torch.zeros_like(mse))
    vb = variational_bound(torch.cat([predicted.detach(), learned], dim=1), x0, x, schedule, i, prediction)
    return Loss(mse + vb, mse, vb)


def variational_bound(
    output: Tensor, x0: Tensor, x: Tensor, schedule: Schedule, i: Tensor, prediction: str = "epsilon"
) -> Tensor:
    """KL(q(x_{t−1} | x_t, x_0) ‖ p) in bits per dimension; at the first step the decoder's −log p(x_0 | x_1). (N,)"""
    mean, log_variance = reverse_step(output, x, schedule, i, prediction)
    true_log_variance = torch.zeros_like(x) + at(schedule.posterior_log_variance, i, x)
    kl = gaussian_kl(posterior_mean(x0, x, schedule, i), true_log_variance, mean, log_variance)
    nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    bits = torch.where(i.reshape(-1, 1, 1, 1) == 0, nll, kl).flatten(1).mean(1)
    return bits / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, ·) ‖ N(mean2, ·)) in nats, element-wise, (N, C, H, W)."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the Gaussian's mass in the 1/255 bin around x ∈ [−1, 1], (N, C, H, W); the outer bins are unbounded.

    Φ is the tanh approximation ½(1 + tanh(√(2/π)(z + 0.044715 z³))) that the published losses use.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = torch.exp(-log_std)
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
