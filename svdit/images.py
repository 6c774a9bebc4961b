"""Images as arrays: uint8 (N, H, W, 3) in files, float (N, C, H, W) in [-1, 1] in models.

Conversion to uint8 follows DiT: clamp(127.5 x + 128) and truncate, which rounds half up. Another rule changes FID.
Files are always RGB; images of one-channel models are written in grey.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from svdit.errors import UserError
from svdit.files import atomic_path

Pixels = npt.NDArray[np.uint8]
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}


def to_uint8(x: Tensor) -> Pixels:
    """Float (N, C, H, W) in [-1, 1], with C 1 or 3, to uint8 (N, H, W, 3)."""
    levels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().cpu().numpy()


def to_float(pixels: Pixels) -> Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key that puts 2.png before 10.png."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", path.as_posix()) if p]


def list_images(folder: str | Path) -> list[Path]:
    """All image files in `folder` and its subfolders, except for hidden ones, in natural order.

    Raises UserError if it does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass a folder of images")
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    visible = (p for p in names if not any(part.startswith(".") for part in p.parts))
    return [folder / name for name in sorted(visible, key=natural_key)]


def read_image(path: str | Path) -> Pixels:
    """uint8 (H, W, 3): every mode is converted to RGB, transparency is dropped. Raises UserError for other files."""
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def image_header(path: str | Path) -> tuple[tuple[int, int], str]:
    """((H, W), Pillow's mode) without decoding the image. Raises UserError for other files."""
    with _opened(path) as image:
        return (image.height, image.width), image.mode


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); remove or replace it") from None


def is_whole_png(path: str | Path, size: int) -> bool:
    """Whether the file is a PNG of size × size pixels whose checksums match."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return image.size == (size, size)
    except (OSError, ValueError, SyntaxError):
        return False


def center_crop(pixels: Pixels, size: int) -> Pixels:
    """(H, W, 3) to (size, size, 3) as ADM prepares ImageNet: box filters by 2, bicubic to `size`, center crop."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def write_png(path: str | Path, pixels: Pixels) -> None:
    """Write one uint8 (H, W, 3) image."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def grid(images: Pixels, columns: int, pad: int = 2, scale: int = 1) -> Pixels:
    """(N, H, W, 3) to one image (H, W, 3), row by row, on white; `scale` repeats pixels."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        canvas[top : top + h, left : left + w] = image
    return canvas
