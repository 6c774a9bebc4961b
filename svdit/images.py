"""Images as arrays: uint8 (N, H, W, 3) in files, float (N, C, H, W) in [-1, 1] in models.

Conversion to uint8 follows DiT: clamp(127.5 x + 128) and truncate, which rounds half up. Another rule changes FID.
Files are always RGB; images of one-channel models are written in grey.
"""

import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """All image files in `folder` and its subfolders, in natural order. Raises UserError if it does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass a folder of images")
    files = (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    return sorted(files, key=lambda p: natural_key(p.relative_to(folder)))


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


def write_npz(path: str | Path, images: Iterable[Pixels], count: int) -> None:
    """Stream `count` uint8 (H, W, 3) images of one size into an uncompressed .npz, key `arr_0` (ADM's layout).

    Raises UserError where their sizes differ or their number is not `count`.
    """
    shape: tuple[int, ...] | None = None
    written = 0
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        for image in images:
            if shape is None:
                shape = image.shape
                layout = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(member, layout)
            if image.shape != shape:
                raise UserError(f"image {written} is {image.shape} and the first is {shape}; use images of one size")
            member.write(np.ascontiguousarray(image).tobytes())
            written += 1
        if written != count:
            raise UserError(f"{path} was to contain {count} images and {written} were passed; pass all of them")


def map_npz(path: str | Path, key: str = "arr_0") -> npt.NDArray[np.generic]:
    """An array of an .npz, memory-mapped copy-on-write; compressed ones are unpacked to a temporary file first.

    Raises UserError for files that are no .npz or lack the array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{key}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                return _map_unpacked(archive, info)
        with Path(path).open("rb") as file:
            file.seek(info.header_offset)
            # the lengths of name and extra field in the local header may differ from those in the central directory
            name, extra = struct.unpack("<26x2H", file.read(30))
            file.seek(info.header_offset + 30 + name + extra)
            return _map_npy(file, Path(path))
    except KeyError:
        raise UserError(
            f"{path} contains no array {key}; pass an .npz with uint8 images (N, H, W, 3) under that key"
        ) from None
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an .npz ({error}); create or download it again") from None


def _map_unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[np.generic]:
    with tempfile.TemporaryFile() as unpacked:
        with archive.open(info) as member:
            shutil.copyfileobj(member, unpacked, 1 << 20)
        unpacked.seek(0)
        return _map_npy(unpacked, unpacked)


def _map_npy(file: Any, mapped: Any) -> npt.NDArray[np.generic]:
    """Map the .npy that starts at `file`'s position."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it contains Python objects")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(mapped, dtype, "c", file.tell(), shape, "F" if fortran else "C")
