"""The images of a report: a grid of generated images, and the pairs that differ most."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from svdit.evaluation.sources import ImageSet
from svdit.images import Pixels, grid

SHOWN, COLUMNS, PAIRS = 64, 8, 8
MIN_SIDE = 64  # smaller images are enlarged by an integer factor
GAIN = 8  # of the difference
PAIRS_CAPTION = f"full precision; generated, lowest PSNR first; difference x {GAIN}"  # Pillow's font is ASCII


def shown(count: int) -> list[int]:
    """The places in a set of `count` images of those that represent it: 64 at even distances."""
    return np.linspace(0, count - 1, min(SHOWN, count)).astype(int).tolist()


def overview(images: Sequence[Pixels]) -> Pixels:
    """A grid of (H, W, 3) images, uint8 (H, W, 3)."""
    stacked = np.stack(images)
    return grid(stacked, COLUMNS, scale=_scale(stacked))


def worst_pairs(fake: ImageSet, other: ImageSet, psnrs: npt.NDArray[np.float64]) -> Pixels:
    """The 8 pairs of lowest PSNR, worst first, uint8 (H, W, 3): counterpart, image, and 8 |difference| below."""
    worst = np.argsort(psnrs, kind="stable")[:PAIRS]
    a, b = (np.stack([image_set.read(n) for n in worst]) for image_set in (fake, other))
    difference = np.clip(GAIN * np.abs(a.astype(np.int64) - b), 0, 255).astype(np.uint8)
    return grid(np.concatenate([b, a, difference]), len(worst), scale=_scale(a))


def caption(image: Pixels, text: str) -> Pixels:
    """The image with a line of text below, on white, uint8 (H, W, 3)."""
    height, width, _ = image.shape
    _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((4, 4), text)
    canvas = Image.new("RGB", (max(width, int(right) + 4), height + int(bottom) + 4), "white")
    canvas.paste(Image.fromarray(image))
    ImageDraw.Draw(canvas).text((4, height + 4), text, fill="black")
    return np.asarray(canvas)


def _scale(images: Pixels) -> int:
    return -(-MIN_SIDE // min(images.shape[1:3]))
