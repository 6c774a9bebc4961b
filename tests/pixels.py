"""A tiny model of pixels with random weights: in memory, in a file, and generating a set of images."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import randomize
from torch import Tensor

from svdit.checkpoints.store import save_model
from svdit.model.dit import DiT, DiTConfig
from svdit.sampling import dataset
from svdit.sampling.batch import SamplingConfig

ROOT = Path(__file__).parents[1]
CONFIG = SamplingConfig("ddpm", "4", cfg_scale=1.5)
SEED = 11
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Squash:
    """In place of an autoencoder: brings a random model's huge values into view, so that no grey level is clipped."""

    factor, channels, name = 1, None, "none"

    def for_model(self, config: DiTConfig) -> "Squash":
        return self

    def decode(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 300)


def pixel_model(in_channels: int = 3, num_classes: int = 5, **options: Any) -> DiT:
    """8 × 8 images, 64 wide, one block."""
    config = DiTConfig(8, 2, in_channels, hidden_size=64, depth=1, num_heads=2, num_classes=num_classes, **options)
    model = randomize(DiT(config))
    assert isinstance(model, DiT)
    return model


def saved(file: Path, **options: Any) -> str:
    """A checkpoint of it, called "tiny"."""
    save_model(pixel_model(**options), file, name="tiny")
    return str(file)


def draw(folder: Path, **options: Any) -> Any:
    """Generate its images; returns the .npz, or what another sink returns."""
    options = {"count": 7, "batch_size": 3, "seed": SEED, **options}
    return dataset.generate_dataset(pixel_model(), folder, config=CONFIG, autoencoder=Squash(), **options)  # type: ignore[arg-type]


def interrupt_at(images: float, drawn: list[float] | None = None) -> Callable[[float, int], None]:
    """A progress callback that interrupts the run, as Ctrl-C does, when so many images are drawn; adds to `drawn`."""

    def progress(done: float, total: int) -> None:
        if drawn is not None:
            drawn.append(done)
        if done >= images:
            raise KeyboardInterrupt

    return progress


def noting(notes: dict[int, list[str]]) -> Callable[..., Callable[[], Tensor]]:
    """`image_noise` that also writes down the digest of each draw of each image."""
    genuine = dataset.image_noise

    def image_noise(seed: int, indices: Sequence[int], *rest: Any) -> Callable[[], Tensor]:
        source = genuine(seed, indices, *rest)

        def next_draw() -> Tensor:
            drawn = source()
            for i, one in zip(indices, drawn, strict=True):
                notes.setdefault(i, []).append(hashlib.sha256(one.cpu().numpy().tobytes()).hexdigest())
            return drawn

        return next_draw

    return image_noise
