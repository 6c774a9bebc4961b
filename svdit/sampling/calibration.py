"""Forward loops for calibration: the model's own sampling steps on random labels. No data set is needed.

DDIM for DiT, the sampler and guidance of the family's protocol for others, with both guidance halves where they are
used: every layer sees its sampling inputs at all noise levels. Conditioning layers (adaLN) see few inputs that way;
theirs depend only on (t, y) and are sampled directly. Errors are reported on images of their own: consecutive steps of
one image resemble each other.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from svdit.diffusion.noise import image_labels, image_noise
from svdit.diffusion.schedule import TIMESTEPS
from svdit.errors import UserError
from svdit.holdout import held_out
from svdit.model.dit import DiT, DiTConfig
from svdit.model.embeddings import sinusoids
from svdit.sampling.batch import SamplingConfig, default_sampling, generate
from svdit.sampling.protocols import PROTOCOLS

TOKENS = 20_000  # enough for a small model: 2.5× as many did not improve its images
GUIDANCE = 1.5  # scale for models of sizes that no protocol has
CONDITIONS = 4096  # pairs (t, y) for the adaLN layers, and four per input feature at least


def calibration_size(model: DiT, images: int | None = None, steps: int | None = None) -> tuple[int, int]:
    """Numbers of images and sampling steps; None is chosen for the model.

    Guided at every step, the defaults show the widest layer at least eight tokens per input feature and at least
    TOKENS, in at least 48 pairs (t, y) and as many of the null class; unguided, half as many.
    """
    tokens = (model.config.input_size // model.config.patch_size) ** 2
    widest = model.config.mlp_width
    pairs = max(48, math.ceil(max(8 * widest, TOKENS) / (2 * tokens)))
    steps = steps or min(25, math.isqrt(pairs))
    return images or math.ceil(pairs / steps), steps


def calibration_sampling(config: DiTConfig, steps: int, cfg_scale: float | None = None) -> SamplingConfig:
    """How a model samples its calibration set: under the first protocol of its family, a flow in three steps at least.
    A DiT in two: the only timestep of one is 0, where its noise never is.

    `cfg_scale` None: the protocol's, or GUIDANCE where it has none for this model.
    """
    protocol = next(protocol for protocol in PROTOCOLS.values() if protocol.family == config.family)
    options = {"cfg_scale": GUIDANCE, **protocol.options(config, config.input_size), "steps": str(max(steps, 3))}
    if cfg_scale is not None:
        options["cfg_scale"] = cfg_scale
    if not config.is_flow:
        return SamplingConfig("ddim", str(max(steps, 2)), options["cfg_scale"])
    return default_sampling(config, **options)


def calibration_loop(
    *,
    images: int,
    steps: int,
    cfg_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Callable[[nn.Module], None]:
    """A loop that generates `images` images with its argument, a DiT; the same noise and labels at every call.

    It generates up to 1/8 more, two at least, that are held out for reported errors. `progress(done, total)` counts
    sampling steps. The loop raises UserError for another model.
    """
    batches = [range(i, min(i + batch_size, images)) for i in range(0, images, batch_size)]
    others = range(images, images + min(batch_size, max(2, images // 8)))

    @torch.no_grad()
    def loop(model: nn.Module) -> None:
        if not isinstance(model, DiT):
            raise UserError(
                f"this calibration loop samples from a DiT, not a {type(model).__name__}; pass your own loop"
            )
        config = calibration_sampling(model.config, steps, cfg_scale)
        length = len(config.schedule(model.config))
        for done, indices in enumerate([*batches, others]):

            def tick(step: int, x: Tensor, before: int = done * length) -> None:
                progress(before + step, length * (len(batches) + 1))

            labels = image_labels(seed, indices, model.config.num_classes)
            noise = image_noise(seed, indices, model.input_shape, model.pos_embed.device)
            with held_out() if indices is others else nullcontext():
                generate(model, labels, config, noise=noise, callback=tick)
        count = max(CONDITIONS, 4 * model.config.hidden_size)
        show_conditions(model, seed, count)
        with held_out():
            show_conditions(model, seed + 1, count // 8)

    return loop


def show_conditions(model: DiT, seed: int, count: int) -> None:
    """Call every adaLN layer with the conditioning of `count` random pairs (t, y), half of the null class (if any)."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.is_flow:
        t = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
    else:
        t = torch.randint(TIMESTEPS, (count,), generator=generator, device="cpu")
    y = torch.randint(model.config.num_classes, (count,), generator=generator, device="cpu")
    if model.config.has_null_class:
        y[::2] = model.null_class
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    c = model.t_embedder(sinusoids(t.to(device)).to(dtype)) + model.y_embedder(y.to(device))
    for block in [*model.blocks, model.final_layer]:
        block.adaLN_modulation(c)
