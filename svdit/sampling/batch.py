"""A batch of pictures from a model: noise, guidance, sampler, decoding.

The noise comes from the caller (`svdit.diffusion.noise`), so two models given equal sources walk from the same
noise. Nothing here depends on the device or on what the model's layers are made of.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdit.diffusion.guidance import guided
from svdit.diffusion.samplers import SAMPLERS, Callback, Noise
from svdit.diffusion.schedule import make_schedule
from svdit.errors import UserError
from svdit.images import Pixels, to_uint8
from svdit.model.autoencoder import Autoencoder
from svdit.model.dit import DiT


@dataclass(frozen=True)
class SamplingConfig:
    """How to walk from noise to a picture; `cfg_channels` None guides every channel of ε."""

    sampler: str = "ddpm"
    steps: str = "250"
    cfg_scale: float = 4.0
    cfg_channels: int | None = 3
    cfg_interval: tuple[int, int] | None = None  # first and last guided timestep, 0 … 999; None: all

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"there is no sampler {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise UserError(f"a guidance scale cannot be {self.cfg_scale}; give 1 for none, 1.5 or 4 for example")
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise UserError(f"guidance cannot act on {self.cfg_channels} channels; give at least 1, or None for all")
        if self.cfg_interval is not None and not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] < 1000:
            first, last = self.cfg_interval
            raise UserError(f"guidance cannot act from timestep {first} to {last}; give two, ascending, of 0 to 999")
        make_schedule(self.steps)  # raises where the steps cannot be taken


def _silent(done: int, x: Tensor) -> None:
    pass


@torch.no_grad()
def generate(
    model: DiT, labels: Tensor, draw: Noise, config: SamplingConfig, *, callback: Callback = _silent
) -> Tensor:
    """Latents, or pixels of a pixel model, (N, C, H, W) float32 for the class labels (N,).

    The first `draw()` is the starting noise, the later ones are the sampler's. `callback(done, x)` follows each
    step. A label that the model does not have is a UserError.
    """
    _check_labels(labels, model.config.num_classes)
    y = labels.to(model.pos_embed.device)
    denoise = guided(model, y, model.null_class, config.cfg_scale, config.cfg_channels, config.cfg_interval)
    return SAMPLERS[config.sampler](denoise, draw(), make_schedule(config.steps), noise=draw, callback=callback)


def pictures(
    model: DiT,
    autoencoder: Autoencoder,
    labels: Tensor,
    draw: Noise,
    config: SamplingConfig,
    *,
    callback: Callback = _silent,
) -> Pixels:
    """As `generate`, decoded to uint8 (N, H, W, 3)."""
    return to_uint8(autoencoder.decode(generate(model, labels, draw, config, callback=callback)))


def _check_labels(labels: Tensor, num_classes: int) -> None:
    """UserError for a label outside 0 … num_classes − 1; the null class is no label to draw."""
    unknown = labels[(labels < 0) | (labels >= num_classes)]
    if len(unknown):
        raise UserError(f"there is no class {int(unknown[0])}; this model has the classes 0 to {num_classes - 1}")
