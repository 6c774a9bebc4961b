"""Images as arrays: uint8 (N, H, W, 3) in files, float (N, C, H, W) in [-1, 1] in models.

Conversion to uint8 follows the family's published script (`UINT8`): the rule changes FID.
Files are always RGB; images of one-channel models are written in grey. Only the listed formats are opened, and what
a file declares is checked before it is decoded; EXIF rotation, colour profiles and all but the first frame are ignored.
"""

import io
import json
import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from svdit.errors import UnreadableError, UserError, failed
from svdit.files import Openable, atomic_path, check_expansion, reading

Pixels = npt.NDArray[np.uint8]
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
UNREAD = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pbm", ".pnm", ".svg", ".tga"}
SYSTEM = {"__MACOSX", "@eaDir", "@__thumb", "@Recycle", "#recycle", "$RECYCLE.BIN"}  # copies and thumbnails
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # any other could run a program: EPS starts Ghostscript
LOSSY, LOSSY_TIFF = {"JPEG", "MPO", "WEBP"}, {"jpeg", "tiff_jpeg", "webp"}
EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
WIDTH, WHITE_IS_ZERO = 258, 262  # TIFF tags: bits per sample, photometric interpretation


UINT8: dict[str, Callable[[Tensor], Tensor]] = {  # floats in [-1, 1] to levels whose fraction is dropped
    "half_up": lambda x: 127.5 * x + 128,  # DiT, SiT, LightningDiT
    "truncate": lambda x: 255 * ((x + 1) / 2),  # REPA; 127.5 x + 127.5 differs in float32
    "half_even": lambda x: (255 * ((x + 1) / 2)).round(),  # JiT
}


def to_uint8(x: Tensor, rule: str = "half_up") -> Pixels:
    """Float (N, C, H, W) in [-1, 1], with C 1 or 3, to uint8 (N, H, W, 3) by a rule of `UINT8`."""
    levels = UINT8[rule](x.float()).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().cpu().numpy()


def to_float(pixels: Pixels) -> Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Header(NamedTuple):
    """What is known of an image without decoding it: (H, W), Pillow's mode, and how it is stored."""

    size: tuple[int, int]
    mode: str
    lossy: bool
    more_frames: bool


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts 2.png before 10.png, and 01.png before 1.png."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p], name


def relative_names(folder: Path, files: Iterable[Path]) -> list[str]:
    """The names of files below a folder, with slashes; faster than `Path.relative_to`."""
    start = len((folder / "x").as_posix()) - 1
    return [file.as_posix()[start:] for file in files]


def list_images(folder: str | Path) -> list[Path]:
    """All image files in `folder` and its subfolders, in natural order; see `scan_images`. Raises UserError as it."""
    return scan_images(folder)[0]


def scan_images(folder: str | Path, *also: str) -> tuple[list[Path], str]:
    """All image files in `folder` and its subfolders, in natural order; and what was skipped, in words.

    `also`: further extensions of files to list.
    Hidden and system folders are not entered. Symbolic links are followed, after the folders themselves; a folder is
    read once, and none that contains `folder`. Raises UserError for missing or closed folders and broken links.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass a folder of images")
    wanted = EXTENSIONS.union(also)
    entered = {str(parent) for parent in folder.resolve().parents}
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    folders, links = [folder], list[Path]()
    try:
        while folders or links:
            links.sort(key=lambda path: natural_key(path.as_posix()), reverse=True)
            current = folders.pop() if folders else links.pop()
            if (place := os.path.realpath(current)) in entered:
                skipped["repeated folder"] += 1
                continue
            entered.add(place)
            for path, kind in _entries(current):
                if kind.is_dir():
                    (links if kind is path else folders).append(path)
                elif not kind.is_file() and not path.exists():
                    if path.suffix and path.suffix.lower() not in wanted:
                        skipped["broken link"] += 1
                        continue
                    raise UserError(f"{path} is a broken link; repair or remove it")
                elif path.suffix.lower() in wanted and kind.is_file():
                    files.append(path)
                elif path.suffix.lower() in wanted | UNREAD:
                    skipped[f"{path.suffix.lower()} file" if kind.is_file() else "special file"] += 1
    except OSError as error:
        raise UserError(failed("read", error.filename, error)) from None
    names = dict(zip(files, relative_names(folder, files), strict=True))
    files.sort(key=lambda path: natural_key(names[path]))
    return files, in_words(skipped)


def in_words(skipped: Counter[str]) -> str:
    """ "1 broken link, 2 .gif files" """
    return ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in sorted(skipped.items()))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not shown, or a copy or thumbnail made by a system."""
    return name.startswith(".") or name in SYSTEM


def visible_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, and of links to folders, except for hidden and system ones."""
    return [path.name for path, kind in _entries(folder) if kind.is_dir()]


def _entries(folder: Path) -> Iterator[tuple[Path, "Path | os.DirEntry[str]"]]:
    """The entries of a folder, and what knows their kind: the path itself for links, else what the folder lists."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                path = folder / entry.name
                yield path, path if entry.is_symlink() else entry


def class_numbers(folders: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """The distinct folders in natural order, which are the classes, and the number of each folder's class."""
    classes = sorted(set(folders), key=natural_key)
    numbers = {name: i for i, name in enumerate(classes)}
    return tuple(classes), [numbers[name] for name in folders]


def class_summary(classes: Sequence[str]) -> str:
    """ "3 classes: bird … dog" """
    return f"{len(classes)} classes: {classes[0]} … {classes[-1]}" if len(classes) > 1 else f"1 class: {classes[0]}"


def read_image(file: str | Openable) -> Pixels:
    """uint8 (H, W, 3): RGB, grey repeated, the upper 8 of 16 bits, transparency dropped.

    Raises UserError for other files, and for modes without a fixed range (floats, 32 bits) with the range found.
    """
    with _opened(file, file) as image:
        return _rgb(image)


def decode_image(content: bytes, name: str) -> Pixels:
    """As `read_image`, of the content of a file. Raises UserError, with `name`, for what is no image."""
    with _opened(io.BytesIO(content), name) as image:
        return _rgb(image)


def image_header(file: str | Openable) -> Header:
    """The header of an image, without decoding it. Raises UserError as `read_image`."""
    with _opened(file, file) as image:
        lossy = image.format in LOSSY or image.info.get("compression") in LOSSY_TIFF
        return Header((image.height, image.width), image.mode, lossy, getattr(image, "is_animated", False))


@contextmanager
def _opened(file: str | Openable | io.BytesIO, name: str | Openable) -> Iterator[Image.Image]:
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # Pillow warns of damaged tags; only exceptions matter
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with reading(name):
                content = file if isinstance(file, str | Path | io.BytesIO) else stack.enter_context(file.open("rb"))
                size = _stored_bytes(content)
                with Image.open(content, formats=FORMATS) as image:
                    _check(image, size, name)
                    yield image
        except UserError:
            raise
        except Exception as error:  # decoders raise almost anything for files from elsewhere
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is no PNG, JPEG, WebP, BMP, TIFF or PPM" if unknown else str(error) or type(error).__name__
            reason = reason.splitlines()[0]
            raise UserError(f"{name} cannot be read as an image ({reason}); remove or replace it") from None


def _check(image: Image.Image, size: int, name: str | Openable) -> None:
    check_expansion(name, 4 * image.width * image.height, size)
    if image.mode not in EIGHT_BIT and not _is_16_bit(image):
        low, high = image.getextrema()[:2]
        problem = f"{name} has mode {image.mode} with values from {low} to {high}"
        raise UserError(f"{problem}; convert it to 8-bit RGB or grey, or 16-bit grey")


def _stored_bytes(file: str | Path | IO[bytes]) -> int:
    if not isinstance(file, str | Path):
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return size
    status = Path(file).stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a file")
    return status.st_size


def _is_16_bit(image: Image.Image) -> bool:
    """Whether 16-bit grey is held in 32 bits, as by Pillow for PGM, and before version 11 for PNG."""
    return image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in {"PNG", "PPM"})


def _rgb(image: Image.Image) -> Pixels:
    if not _is_16_bit(image):
        return np.asarray(image.convert("RGB"))
    tags = getattr(image, "tag_v2", {})  # TIFF's, which also stores 12 bits
    levels = (np.asarray(image) >> (tags.get(WIDTH, (16,))[0] - 8)).astype(np.uint8)
    return np.repeat((255 - levels if tags.get(WHITE_IS_ZERO) == 0 else levels)[..., None], 3, axis=2)


def is_whole_png(file: Openable, size: int) -> bool:
    """Whether a file is a PNG of size × size pixels whose checksums match. Raises UnreadableError."""
    try:
        with reading(file), file.open("rb") as content, Image.open(content, formats=["PNG"]) as image:
            image.verify()
            return image.size == (size, size)
    except UnreadableError:
        raise
    except Exception:  # as in `_opened`
        return False


def center_crop(pixels: Pixels, size: int, name: str | Openable = "an image") -> Pixels:
    """(H, W, 3) to (size, size, 3) as ADM prepares ImageNet: box filters by 2, bicubic to `size`, center crop.

    Raises UserError, with `name`, for a strip that would be scaled to more pixels than Pillow's limit.
    """
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        shape = f"{pixels.shape[1]}×{pixels.shape[0]} pixels (width×height)"
        raise UserError(f"{name} has {shape}, too long a strip to be scaled and cropped to {size}; crop or remove it")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def write_png(path: str | Path, pixels: Pixels, settings: Mapping[str, Any] | None = None) -> None:
    """Write one uint8 (H, W, 3) image, and with `settings` their JSON as its text `settings`."""
    text = PngInfo()
    if settings is not None:
        text.add_itxt("settings", json.dumps(settings, ensure_ascii=False))
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text)


def encode_png(pixels: Pixels) -> bytes:
    """The content of a PNG file of one uint8 (H, W, 3) image."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


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
