"""How near a model's images are to those of another one, from the same noise that nothing else has seen."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from svdit.diffusion.noise import image_labels, image_noise
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, generate

FIRST = 2**37  # index of the first image
BATCH = 16
CAP = 100.0  # dB, of equal images


class Fidelity:
    """The images of a model, which others are compared with. `progress(done, total)` counts sampling steps."""

    def __init__(
        self,
        model: DiT,
        config: SamplingConfig,
        *,
        images: int = 32,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.config, self.images, self.seed, self.progress = config, images, seed, progress
        self.targets = torch.cat(list(self._draw(model)))

    def psnr(self, model: DiT) -> float:
        """PSNR in dB of the mean squared error over all images of another model.

        Images have the range 2. Latents have none: the root mean square of the first model's takes its place.
        """
        targets, pixels = self.targets, model.config.in_channels in (1, 3)
        error = float((torch.cat(list(self._draw(model))) - targets).double().square().mean())
        peak = 4.0 if pixels else float(targets.double().square().mean())
        return min(CAP, 10 * math.log10(peak / max(error, 1e-30)))

    def _draw(self, model: DiT) -> Iterator[Tensor]:
        steps, starts = len(self.config.schedule(model.config)), range(0, self.images, BATCH)
        for batch, start in enumerate(starts):
            indices = range(FIRST + start, FIRST + min(start + BATCH, self.images))

            def tick(step: int, x: Tensor, before: int = batch * steps) -> None:
                self.progress(before + step, steps * len(starts))

            noise = image_noise(self.seed, indices, model.input_shape, model.pos_embed.device)
            labels = image_labels(self.seed, indices, model.config.num_classes)
            x = generate(model, labels, self.config, noise=noise, callback=tick, evaluate=model)
            yield x.clamp(-1, 1) if model.config.in_channels in (1, 3) else x
