"""Pictures of a report: some of the generated images, and the pairs that differ most."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from svdit.evaluation.inputs import Set
from svdit.images import Pixels, grid

SHOWN, COLUMNS, PAIRS = 64, 8, 8
MIN_SIDE = 64  # smaller pictures are enlarged by whole factors
GAIN = 8  # of the difference


def overview(fake: Set) -> Pixels:
    """64 images at even distances through the set, 8 to a row."""
    places = np.linspace(0, fake.count - 1, min(SHOWN, fake.count)).astype(int)
    pictures = np.stack([fake.source.read(int(fake.indices[i])) for i in places])
    return grid(pictures, COLUMNS, scale=_scale(pictures))


def worst_pairs(fake: Set, other: Set, psnrs: npt.NDArray[np.float64]) -> Pixels:
    """The 8 pairs of least PSNR, worst on the left; above the counterpart, then the image, then 8 |difference|."""
    worst = np.argsort(psnrs, kind="stable")[:PAIRS]
    a = np.stack([fake.source.read(int(fake.indices[i])) for i in worst])
    b = np.stack([other.source.read(int(other.indices[i])) for i in worst])
    apart = np.clip(GAIN * np.abs(a.astype(np.int64) - b), 0, 255).astype(np.uint8)
    return grid(np.concatenate([b, a, apart]), len(worst), scale=_scale(a))


def caption(picture: Pixels, text: str) -> Pixels:
    """The picture with a line of text below, on white."""
    height, width, _ = picture.shape
    _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((4, 4), text)
    canvas = Image.new("RGB", (max(width, int(right) + 4), height + int(bottom) + 4), "white")
    canvas.paste(Image.fromarray(picture))
    ImageDraw.Draw(canvas).text((4, height + 4), text, fill="black")
    return np.asarray(canvas)


def _scale(pictures: Pixels) -> int:
    return -(-MIN_SIDE // min(pictures.shape[1:3]))
