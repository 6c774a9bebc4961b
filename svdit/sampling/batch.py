"""One batch of images from a model: noise, guidance, sampler, decoding.

Two models called with the same seed, or equal noise sources, start from the same noise. Nothing here depends on the
device or on the type of the model's layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdit.diffusion.flow_samplers import FLOW_SAMPLERS
from svdit.diffusion.guidance import guided
from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import SAMPLERS, Callback, Noise, silent
from svdit.errors import UserError
from svdit.images import Pixels, to_uint8
from svdit.model.autoencoder import PIXELS, Autoencoder
from svdit.model.caching import CachePlan, Evaluate, cached
from svdit.model.dit import DiT
from svdit.sampling.config import SamplingConfig as SamplingConfig
from svdit.sampling.config import default_sampling as default_sampling
from svdit.sampling.config import recorded
from svdit.sampling.labels import Labels, class_numbers


@torch.no_grad()
def generate(
    model: DiT,
    labels: Labels,
    config: SamplingConfig | None = None,
    *,
    seed: int = 0,
    noise: Noise | None = None,
    callback: Callback = silent,
    evaluate: Evaluate | None = None,
) -> Tensor:
    """Latents (N, C, H, W), or images in [-1, 1] of a pixel-space model, float32, for N classes, by number or name.

    The noise of image i depends on (seed, i) alone; `noise` replaces it by another source: its first call returns the
    starting noise, later calls the sampler's. `callback(done, x)` is called after each sampling step.
    `config` None: `default_sampling`. `evaluate` is called in place of the model; by default its cache plan is followed
    if it has one for these settings. Raises UserError for a label the model does not have, for guidance without a
    null class, for a sampler of other models, and for NaN and Inf.
    """
    config = config or default_sampling(model.config)
    schedule, scale = config.schedule(model.config), config.scale(model.config)
    labels = class_numbers(labels, model)
    device = model.pos_embed.device
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    noise = noise or image_noise(seed, range(len(labels)), model.input_shape, device)
    check_guidance(model, scale)
    evaluate = evaluate or planned(model, config)
    denoise = guided(evaluate, y, model.null_class, scale, config.cfg_channels, config.interval(model.config))
    z, sampler = model.config.noise_scale * noise(), (SAMPLERS | FLOW_SAMPLERS)[config.sampler]
    x = sampler(denoise, z, schedule, noise=noise, prediction=model.config.prediction, callback=callback).float()
    _check_finite(x, labels, f"; choose a smaller guidance scale than {config.cfg_scale:g}, or another checkpoint")
    return x


def generate_images(
    model: DiT,
    labels: Labels,
    config: SamplingConfig | None = None,
    *,
    autoencoder: Autoencoder = PIXELS,
    seed: int = 0,
    noise: Noise | None = None,
    callback: Callback = silent,
) -> Pixels:
    """As `generate_decoded`, to uint8 (N, H, W, 3). Raises UserError as it."""
    decoded = generate_decoded(model, labels, config, autoencoder, seed=seed, noise=noise, callback=callback)
    return to_uint8(decoded, model.config.uint8)


def generate_decoded(
    model: DiT,
    labels: Labels,
    config: SamplingConfig | None,
    autoencoder: Autoencoder,
    *,
    seed: int = 0,
    noise: Noise | None = None,
    callback: Callback = silent,
) -> Tensor:
    """As `generate`, decoded to images (N, C, H, W), mostly in [-1, 1].

    Raises UserError also for a latent model without autoencoder, and for NaN and Inf after decoding.
    """
    check_autoencoder(model, autoencoder)
    labels = class_numbers(labels, model)
    z = generate(model, labels, config, seed=seed, noise=noise, callback=callback)
    decoded = autoencoder.for_model(model.config).decode(z)
    _check_finite(decoded, labels, f" after the autoencoder {autoencoder.name}; choose another one")
    return decoded


def plan_for(model: DiT, config: SamplingConfig) -> CachePlan | None:
    """The model's cache plan if it is for these settings."""
    return None if not_followed(model, config) else model.cache_plan


def not_followed(model: DiT, config: SamplingConfig) -> str:
    """Why the model's cache plan is not for these settings; empty without a plan, and where it is."""
    asked = recorded(config)
    planned_for = model.cache_plan.sampling if model.cache_plan else asked
    names = (name for name, value in asked.items() if planned_for.get(name) != value)
    sentences = (f"the cache plan is not followed: it is for {x} {planned_for.get(x)}, not {asked[x]}" for x in names)
    return next(sentences, "")


def planned(model: DiT, config: SamplingConfig) -> Evaluate:
    """The model, which follows its cache plan for one generation if that is for these settings."""
    plan = plan_for(model, config)
    return cached(model, plan, model.config.depth) if plan else model


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


def _check_finite(x: Tensor, labels: Sequence[int], advice: str) -> None:
    """Raises UserError for NaN and Inf in images or latents (N, C, H, W), which would become black."""
    for i, finite in enumerate(x.flatten(1).isfinite().all(1).tolist()):
        if not finite:
            raise UserError(f"image {i} of the batch (class {labels[i]}) has NaN or Inf{advice}")
