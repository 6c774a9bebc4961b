"""Random streams: one per image, or one per batch as in the published script.

Label and noise of image i depend on (seed, i) alone, so images do not depend on the batch size or the world size.
Philox keyed by (seed, i) cannot collide; hashing into torch's 32-bit CPU seeds can.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from svdit.errors import UserError

LABELS, NOISE = 0, 1  # sampling's purposes; svdit.training uses 2 and up


def check_seed(seed: object) -> None:
    """Raises UserError for what is no seed of a stream."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise UserError(f"the seed is {seed}; choose a whole number from 0 to 2^64 - 1")


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """The stream of (seed, index) for one purpose; purposes are 2^192 draws apart. Raises UserError as `check_seed`."""
    check_seed(seed)
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], dtype=np.uint64)))


def image_labels(seed: int, indices: Sequence[int], num_classes: int) -> list[int]:
    """One label per image, uniform over the classes."""
    return [int(stream(seed, i, LABELS).integers(num_classes)) for i in indices]


def image_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device, purpose: int = NOISE
) -> Callable[[], Tensor]:
    """A source of float32 noise (N, *shape): each call draws the next from every image's own stream."""
    streams = [stream(seed, i, purpose) for i in indices]

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])).to(device)

    return draw


def batch_noise(
    seed: int, shape: tuple[int, int, int, int], device: torch.device, doubled: bool
) -> Callable[[], Tensor]:
    """The published draw order, (N, C, H, W) per call: one generator; N images first, then 2N if guidance doubles them.

    The second half never reaches an image; it is drawn so that a seed reproduces the published images.
    """
    generator = torch.Generator(device).manual_seed(seed)
    first = True

    def draw() -> Tensor:
        nonlocal first
        rows = shape[0] * (2 if doubled and not first else 1)
        first = False
        return torch.randn(rows, *shape[1:], generator=generator, dtype=torch.float32, device=device)[: shape[0]]

    return draw
