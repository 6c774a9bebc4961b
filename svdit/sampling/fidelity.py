"""How near a model's images are to those of another one, from the same noise."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from svdit.diffusion.noise import image_labels, image_noise
from svdit.diffusion.samplers import Callback, silent
from svdit.errors import UserError
from svdit.model.config import DiTConfig
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, generate

CAP = 100.0  # dB, of equal images
PEAK = 4.0  # the square of the range of pixels in [-1, 1]
FARTHEST = 5  # from 0, that a model's pixels are ever


class Psnr(NamedTuple):
    """In dB: the mean over images, and that of the mean squared error of all."""

    psnr: float
    pooled: float


class Fidelity:
    """The images of a model from number `first` on, which those of others are compared with, `batch_size` at once.

    The range of pixels is 2. Latents have none: the root mean square of the first model's takes its place, and PSNR is
    a signal-to-noise ratio. `progress(done, total)` counts the sampling steps of a model.
    """

    def __init__(
        self,
        model: DiT,
        config: SamplingConfig,
        first: int,
        *,
        images: int = 32,
        batch_size: int = 16,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        starts = range(first, first + images, batch_size)
        self.batches = [range(start, min(start + batch_size, first + images)) for start in starts]
        self.config, self.seed, self.progress = config, seed, progress
        self.targets = list(self._draw(model))
        self.peak = PEAK if of_pixels(model.config) else float(torch.cat(self.targets).double().square().mean())

    def __call__(self, model: DiT) -> Psnr:
        """That of another model's images."""
        pairs = zip(self._draw(model), self.targets, strict=True)
        return psnr(torch.cat([(x - target).double().square().flatten(1).mean(1) for x, target in pairs]), self.peak)

    def _draw(self, model: DiT) -> Iterator[Tensor]:
        """The images (N, C, H, W) of each batch."""
        steps = len(self.config.schedule(model.config))
        for batch, indices in enumerate(self.batches):

            def tick(step: int, x: Tensor, before: int = batch * steps) -> None:
                self.progress(before + step, steps * len(self.batches))

            yield images(model, self.config, indices, seed=self.seed, callback=tick)


def check_pixels(*images: Tensor) -> None:
    """Raises UserError unless the images (N, C, H, W) may be of floats in [-1, 1] that are not clamped yet."""
    for each in images:
        if not each.is_floating_point():
            raise UserError(f"the images are {each.dtype}; pass floats in [-1, 1], uint8 images as x / 127.5 - 1")
        if (farthest := float(each.abs().max())) > FARTHEST:
            raise UserError(f"the images reach {farthest:g}; pass floats in [-1, 1]")


def psnr(squares: Tensor, peak: float = PEAK) -> Psnr:
    """That of the mean squared errors (N,) of images, at most CAP; `peak` is the square of their range."""
    squares = squares.clamp(min=peak / 10 ** (CAP / 10))
    return Psnr(*(10 * (peak / torch.stack([squares.log().mean().exp(), squares.mean()])).log10()).tolist())


@torch.no_grad()
def images(
    model: DiT,
    config: SamplingConfig,
    indices: range,
    *,
    seed: int = 0,
    evaluate: Callable[..., Tensor] | None = None,
    callback: Callback = silent,
) -> Tensor:
    """Images or latents (N, C, H, W) of these numbers, pixels in [-1, 1].

    `evaluate` is called in place of the model. A cache plan is not followed.
    """
    labels = image_labels(seed, indices, model.config.num_classes)
    noise = image_noise(seed, indices, model.input_shape, model.pos_embed.device)
    x = generate(model, labels, config, noise=noise, callback=callback, evaluate=evaluate or model)
    return x.clamp(-1, 1) if of_pixels(model.config) else x


def of_pixels(config: DiTConfig) -> bool:
    """Whether a model's images are pixels, not latents."""
    return config.in_channels in (1, 3)
