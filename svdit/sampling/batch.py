"""One batch of images from a model: noise, guidance, sampler, decoding.

Two models called with the same seed, or equal noise sources, start from the same noise. Nothing here depends on the
device or on the type of the model's layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdit.diffusion.guidance import guided
from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import SAMPLERS, Callback, Noise
from svdit.diffusion.schedule import make_schedule
from svdit.errors import UserError
from svdit.images import Pixels, to_uint8
from svdit.model.autoencoder import PIXELS, Autoencoder
from svdit.model.dit import DiT


@dataclass(frozen=True)
class SamplingConfig:
    """Sampler, its steps ("250", "ddim50", …) and guidance; `cfg_channels` None guides every channel."""

    sampler: str = "ddpm"
    steps: str = "250"
    cfg_scale: float = 4.0
    cfg_channels: int | None = 3
    cfg_interval: tuple[int, int] | None = None  # first and last guided timestep, 0 … 999; None: all

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be sampled with."""
        if self.sampler not in SAMPLERS:
            raise UserError(f"there is no sampler {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise UserError(
                f"the guidance scale is {self.cfg_scale}; choose 1 for no guidance, or 1.5 or 4, for example"
            )
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise UserError(f"cfg_channels is {self.cfg_channels}; choose at least 1, or None for all channels")
        first, last = self.cfg_interval or (0, 999)
        if not 0 <= first <= last < 1000:
            raise UserError(f"cfg_interval is {first} to {last}; choose two ascending timesteps from 0 to 999")
        timesteps = make_schedule(self.steps).timesteps.tolist()
        if self.cfg_interval is not None and not any(first <= t <= last for t in timesteps):
            raise UserError(
                f"cfg_interval is {first} to {last}, without a timestep of the {self.steps} sampling steps; "
                "choose a wider one, or a guidance scale of 1"
            )


def _silent(done: int, x: Tensor) -> None:
    pass


@torch.no_grad()
def generate(
    model: DiT,
    labels: Sequence[int] | Tensor,
    config: SamplingConfig | None = None,
    *,
    seed: int = 0,
    noise: Noise | None = None,
    callback: Callback = _silent,
) -> Tensor:
    """Latents (N, C, H, W), or images in [-1, 1] of a pixel-space model, float32, for N class labels.

    The noise of image i depends on (seed, i) alone; `noise` replaces it by another source: its first call returns the
    starting noise, later calls the sampler's. `callback(done, x)` is called after each sampling step.
    Raises UserError for a label the model does not have, for guidance without a null class, and for NaN and Inf.
    """
    config = config or SamplingConfig()
    labels = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    _check_labels(labels, model.config.num_classes)
    device = model.pos_embed.device
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    noise = noise or image_noise(seed, range(len(labels)), model.input_shape, device)
    check_guidance(model, config.cfg_scale)
    denoise = guided(model, y, model.null_class, config.cfg_scale, config.cfg_channels, config.cfg_interval)
    sampler, schedule = SAMPLERS[config.sampler], make_schedule(config.steps)
    x = sampler(denoise, noise(), schedule, noise=noise, prediction=model.config.prediction, callback=callback)
    _check_finite(x, labels, f"; choose a smaller guidance scale than {config.cfg_scale:g}, or another checkpoint")
    return x


def generate_images(
    model: DiT,
    labels: Sequence[int] | Tensor,
    config: SamplingConfig | None = None,
    *,
    autoencoder: Autoencoder = PIXELS,
    seed: int = 0,
    noise: Noise | None = None,
    callback: Callback = _silent,
) -> Pixels:
    """As `generate`, decoded to uint8 (N, H, W, 3). Raises UserError also for a latent model without autoencoder."""
    check_autoencoder(model, autoencoder)
    z = generate(model, labels, config, seed=seed, noise=noise, callback=callback)
    decoded = autoencoder.for_model(model.config).decode(z)
    _check_finite(decoded, labels, f" after the autoencoder {autoencoder.name}; choose another one")
    return to_uint8(decoded, model.config.uint8)


def check_guidance(model: DiT, scale: float) -> None:
    """Raises UserError for guidance of a model that was trained without a null class."""
    if scale != 1 and not model.config.has_null_class:
        raise UserError(
            f"the model has no null class, so it cannot be guided, and the guidance scale is {scale:g}; choose 1, with "
            "--cfg-scale 1 for example"
        )


def check_autoencoder(model: DiT, autoencoder: Autoencoder) -> None:
    """Raises UserError unless the autoencoder decodes what the model generates."""
    channels = model.config.in_channels
    if autoencoder.channels is None and channels not in (1, 3):
        raise UserError(f"the model generates {channels}-channel latents; pass autoencoder=load_autoencoder('ema')")
    if autoencoder.channels not in (None, channels):
        raise UserError(
            f"the model has {channels} channels, the autoencoder {autoencoder.name} {autoencoder.channels}; "
            "pass the one it was trained with"
        )
    autoencoder.for_model(model.config)


def _check_finite(x: Tensor, labels: Sequence[int] | Tensor, advice: str) -> None:
    """Raises UserError for NaN and Inf in images or latents (N, C, H, W), which would become black."""
    for i, finite in enumerate(x.flatten(1).isfinite().all(1).tolist()):
        if not finite:
            raise UserError(f"image {i} of the batch (class {int(labels[i])}) has NaN or Inf{advice}")


def _check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raises UserError for a label outside 0 … num_classes − 1; the null class is not a class."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"there is no class {label}; this model has the classes 0 to {num_classes - 1}")
