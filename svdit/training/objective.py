"""What each family learns: at which times, and with which loss.

DiT learns at the timesteps of DDPM, uniformly. Flow models learn at times from 0 to 1: SiT and REPA at uniform ones,
LightningDiT and JiT at times whose log α/σ is normal. REPA's alignment with an image encoder is not included.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from svdit.diffusion.flow_losses import cosine_error, flow_error, lognormal_times, mean_square, uniform_times
from svdit.diffusion.losses import training_loss
from svdit.diffusion.paths import Path, interpolate, velocity
from svdit.diffusion.schedule import TIMESTEPS, make_schedule
from svdit.model.config import DiTConfig

PARTS: dict[str, tuple[str, ...]] = {  # the loss is their sum; "mse" is the prediction's mean squared error
    "dit": ("mse", "vb"),
    "sit": ("mse",),
    "repa": ("mse",),
    "lightningdit": ("mse", "cosine"),
    "jit": ("mse",),
}
LOGNORMAL = {"lightningdit": (0.0, 1.0), "jit": (-0.8, 0.8)}  # mean and standard deviation; others are uniform


def draw_times(config: DiTConfig, streams: Sequence[np.random.Generator]) -> Tensor:
    """A timestep or float32 time (N,) from each example's own stream."""
    path = Path(config.path, config.time)
    if not config.is_flow:
        return torch.tensor([int(s.integers(TIMESTEPS)) for s in streams], device="cpu")
    if config.family in LOGNORMAL:
        mean, std = LOGNORMAL[config.family]
        normal = torch.tensor([s.standard_normal() for s in streams], dtype=torch.float64, device="cpu")
        return lognormal_times(std * normal + mean, path).float()
    u = torch.tensor([s.random() for s in streams], dtype=torch.float64, device="cpu")
    return uniform_times(u, path, config.prediction).float()


def losses(
    config: DiTConfig, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, eps: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    """The PARTS of the loss, (N,) each, of images x0 (N, C, H, W) with noise `eps` at times t (N,)."""
    if not config.is_flow:
        loss = training_loss(model, x0, eps, make_schedule(), t, config.prediction)
        return loss.mse, loss.vb
    point, eps = Path(config.path, config.time).at(t.reshape(-1, 1, 1, 1)), config.noise_scale * eps
    output = model(interpolate(x0, eps, point), t)
    mse = mean_square(flow_error(output, x0, eps, point, config.prediction))
    if config.family == "lightningdit":
        return mse, cosine_error(output, velocity(x0, eps, point))
    return (mse,)
