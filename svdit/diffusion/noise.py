"""Where randomness comes from: one stream an image, or one stream a batch as the published script has it.

Image i's label and noise depend on (seed, i) alone, so pictures do not depend on the batch size or on the number
of processes. Philox keyed by (seed, i) cannot collide; hashing into torch's 32-bit CPU seeds can.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

LABELS, NOISE = 0, 1  # two streams an image, 2^192 draws apart


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """The stream of (seed, index) for one purpose; purposes are 2^192 draws apart."""
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], dtype=np.uint64)))


def image_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """(N,) int64 labels, uniform over the classes."""
    return torch.tensor([int(stream(seed, i, LABELS).integers(num_classes)) for i in indices])


def image_noise(
    seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device
) -> Callable[[], Tensor]:
    """A source of (N, C, H, W) float32 noise: each call draws the next from every image's own stream."""
    streams = [stream(seed, i, NOISE) for i in indices]

    def draw() -> Tensor:
        pictures = [s.standard_normal(shape, dtype=np.float32) for s in streams]
        return torch.from_numpy(np.stack(pictures)).to(device)

    return draw


def batch_noise(
    seed: int, shape: tuple[int, int, int, int], device: torch.device, doubled: bool
) -> Callable[[], Tensor]:
    """The published draw order: one generator; first z for N images, then for 2N where guidance doubles the batch.

    The second half never reaches a picture; it is drawn so that a seed gives the known ones.
    """
    generator = torch.Generator(device).manual_seed(seed)
    first = True

    def draw() -> Tensor:
        nonlocal first
        rows = shape[0] * (2 if doubled and not first else 1)
        first = False
        return torch.randn(rows, *shape[1:], generator=generator, device=device)[: shape[0]]

    return draw
