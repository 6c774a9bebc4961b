"""The training loss of DiT: mean squared error of ε, plus the variational bound for the learned variance.

The bound (improved DDPM, arXiv 2102.09672) trains the variance only: ε enters it detached. Unlike there it is not
rescaled, as in the published DiT training.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svdit.diffusion.posterior import at, posterior_mean, predict, q_sample, split_output
from svdit.diffusion.samplers import Denoise
from svdit.diffusion.schedule import Schedule


class Loss(NamedTuple):
    """One value an image, (N,); `vb` in bits a dimension, 0 where the variance is fixed."""

    total: Tensor
    mse: Tensor
    vb: Tensor


def training_loss(denoise: Denoise, x0: Tensor, eps: Tensor, schedule: Schedule, i: Tensor) -> Loss:
    """The loss at steps `i` (N,) of images x0 (N, C, H, W) with noise `eps`."""
    x = q_sample(x0, eps, schedule, i)
    output = denoise(x, schedule.timesteps.to(i.device)[i])
    predicted, learned = split_output(output, x)
    mse = (predicted - eps).square().flatten(1).mean(1)
    if learned is None:
        return Loss(mse, mse, torch.zeros_like(mse))
    vb = variational_bound(torch.cat([predicted.detach(), learned], dim=1), x0, x, schedule, i)
    return Loss(mse + vb, mse, vb)


def variational_bound(output: Tensor, x0: Tensor, x: Tensor, schedule: Schedule, i: Tensor) -> Tensor:
    """KL(q(x_{t−1} | x_t, x_0) ‖ p) a dimension, in bits; at the first step the decoder's −log p(x_0 | x_1). (N,)"""
    step = predict(output, x, schedule, i)
    true_mean = posterior_mean(x0, x, schedule, i)
    true_log_variance = at(schedule.posterior_log_variance, i, x)
    kl = gaussian_kl(true_mean, true_log_variance, step.mean, step.log_variance)
    nll = -discretized_log_likelihood(x0, step.mean, 0.5 * step.log_variance)
    bits = torch.where(i.reshape(-1, 1, 1, 1) == 0, nll, kl).flatten(1).mean(1)
    return bits / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, ·) ‖ N(mean2, ·)) in nats, element-wise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the Gaussian's mass in the 1/255 bin around x ∈ [−1, 1]; the outermost bins reach to infinity.

    Φ is the tanh approximation ½(1 + tanh(√(2/π)(z + 0.044715 z³))) that the published losses use.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = torch.exp(-log_std)
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
