"""Forward loops over real sampling steps: what calibration shows to the quantizer. No data set is needed.

Random labels, DDIM with both guidance halves, so every layer sees the inputs it will see when sampling, at all
noise levels. Conditioning layers (adaLN) see few inputs that way; theirs depend on (t, y) alone and are enumerated.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from svdit.diffusion.noise import image_labels, image_noise
from svdit.model.dit import DiT
from svdit.model.embeddings import sinusoids
from svdit.sampling.batch import SamplingConfig, generate

TOKENS = 20_000  # enough for a small model: two and a half times as many gained nothing in its pictures
CONDITIONS = 4096  # pairs (t, y) shown to the adaLN layers


def calibration_size(model: DiT, images: int | None = None, steps: int | None = None) -> tuple[int, int]:
    """How many images, in how many steps; what is not given follows from the model.

    Together they show at least eight tokens for each input feature of the widest layer, TOKENS if that is more, in
    at least 48 pairs (t, y) and as many of the null class.
    """
    tokens = (model.config.input_size // model.config.patch_size) ** 2
    widest = int(model.config.hidden_size * model.config.mlp_ratio)
    pairs = max(48, math.ceil(max(8 * widest, TOKENS) / (2 * tokens)))
    steps = steps or min(25, math.isqrt(pairs))
    return images or math.ceil(pairs / steps), steps


def calibration_loop(
    *,
    images: int,
    steps: int,
    cfg_scale: float = 1.5,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Callable[[nn.Module], None]:
    """A loop that samples `images` pictures with the model it is given, the same at every call.

    `progress(done, total)` counts denoising steps.
    """
    config = SamplingConfig("ddim", str(steps), cfg_scale)

    @torch.no_grad()
    def loop(model: nn.Module) -> None:
        assert isinstance(model, DiT)
        device, size = model.pos_embed.device, model.config.input_size
        batches = [range(i, min(i + batch_size, images)) for i in range(0, images, batch_size)]
        for done, indices in enumerate(batches):

            def tick(step: int, x: Tensor, before: int = done * steps) -> None:
                progress(before + step, steps * len(batches))

            labels = image_labels(seed, indices, model.config.num_classes)
            draw = image_noise(seed, indices, (model.config.in_channels, size, size), device)
            generate(model, labels, draw, config, callback=tick)
        show_conditions(model, seed)

    return loop


def show_conditions(model: DiT, seed: int) -> None:
    """Call every adaLN layer with the conditioning of random timesteps and labels, half of them the null class."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(1000, (CONDITIONS,), generator=generator)
    y = torch.randint(model.config.num_classes, (CONDITIONS,), generator=generator)
    y[::2] = model.null_class
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    c = model.t_embedder(sinusoids(t.to(device)).to(dtype)) + model.y_embedder(y.to(device))
    for block in [*model.blocks, model.final_layer]:
        block.adaLN_modulation(c)
