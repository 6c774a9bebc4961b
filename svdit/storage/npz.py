"""Arrays in .npz files: written as a stream, or mapped into memory.

What a file declares is checked before memory or disk is used for it: the number of its arrays, the sizes of their
members, and the checksum of every byte. Nothing in it is unpickled.
"""

import io
import math
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from svdit.errors import UserError
from svdit.files import atomic_path, check_expansion, reading, to_disk

Pixels = npt.NDArray[np.uint8]
MEMBERS = 1000  # at most; ours have 12
PIECE = 1 << 20


def write_npz(path: str | Path, images: Iterable[Pixels], count: int) -> None:
    """Stream `count` uint8 (H, W, 3) images of one size into an uncompressed .npz, key `arr_0` (ADM's layout).

    Raises UserError where their sizes differ or their number is not `count`.
    """
    shape: tuple[int, ...] | None = None
    written = 0
    with atomic_path(path) as temporary:
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            for image in images:
                if shape is None:
                    shape = image.shape
                    layout = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(member, layout)
                if image.shape != shape:
                    sizes = f"image {written} is {image.shape} and the first is {shape}"
                    raise UserError(f"{sizes}; use images of one size")
                member.write(np.ascontiguousarray(image).tobytes())
                written += 1
            if written != count:
                raise UserError(f"{path} was to contain {count} images and {written} were passed; pass all of them")
        to_disk(temporary)


def npz_keys(path: str | Path) -> set[str]:
    """The names of the arrays. Raises UserError for files that are no .npz."""
    with _opened(path) as archive:
        for info in archive.filelist:
            archive.open(info).close()  # compares the name with the one beside the content
        return {name.removesuffix(".npy") for name in archive.namelist()}


def npz_digest(path: str | Path) -> str:
    """A hash of the names, sizes and checksums of the arrays, which are not read. Raises UserError as `npz_keys`."""
    with _opened(path) as archive:
        members = [(info.filename, info.file_size, info.CRC) for info in archive.infolist()]
        return sha256(repr(members).encode()).hexdigest()


def map_npz(path: str | Path, key: str = "arr_0") -> npt.NDArray[np.generic]:
    """An array of an .npz, memory-mapped copy-on-write; compressed ones are unpacked to a temporary file first.

    Raises UserError for files that are no .npz, are damaged, or lack the array.
    """
    with _opened(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            raise UserError(f"{path} contains no array {key}; pass an .npz that contains it")
        info = archive.getinfo(f"{key}.npy")
        check_expansion(path, info.file_size, min(info.compress_size, Path(path).stat().st_size))
        with archive.open(info) as member, tempfile.TemporaryFile() as unpacked:
            if info.compress_type == zipfile.ZIP_STORED:
                while member.read(PIECE):  # zipfile compares the checksum at the end
                    pass
            else:
                shutil.copyfileobj(member, unpacked, PIECE)
                unpacked.seek(0)
                return _map_npy(unpacked, info.file_size)
        with Path(path).open("rb") as file:
            file.seek(info.header_offset)
            # the lengths of name and extra field in the local header may differ from those in the central directory
            name, extra = struct.unpack("<26x2H", file.read(30))
            file.seek(info.header_offset + 30 + name + extra)
            return _map_npy(file, info.file_size)


class _Mapped(np.memmap):
    """Goes to other processes as its place in the file; parts of it, and arrays in files without a name, are copied."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        place: object = self.filename
        base: object = self.base
        if place is None or not isinstance(base, mmap):
            return super().__reduce__()
        order = "C" if self.flags.c_contiguous else "F"
        return _Mapped, (place, self.dtype, "c", self.offset, self.shape, order)


class _Pieces(io.FileIO):
    """A file read in pieces of at most 1 MiB: zipfile would read a list of any number of members at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of a file. Raises ValueError for larger pieces."""
        if size is not None and size > PIECE:
            raise ValueError("its list of members is too long")
        return super().read(size) or b""


@contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        if not Path(path).is_file():
            raise OSError("it is not a file")
        with reading(path), _Pieces(path) as file, zipfile.ZipFile(file) as archive:
            if len(archive.filelist) > MEMBERS:
                raise ValueError(f"it has {len(archive.filelist)} members")
            if any(info.comment for info in archive.filelist):
                raise ValueError("its list of members is damaged")  # one may be read as the comment of another
            yield archive
    except UserError:
        raise
    except Exception as error:  # a file from elsewhere can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as an .npz ({reason}); create or download it again") from None


def _map_npy(file: IO[bytes], size: int) -> npt.NDArray[np.generic]:
    """Map the .npy of `size` bytes that starts at `file`'s position."""
    end = file.tell() + size
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it contains Python objects")
    if min(shape, default=1) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != end:
        raise ValueError(f"its header declares {dtype} {shape} in a member of {size} bytes")
    if math.prod(shape) * dtype.itemsize == 0:
        return np.empty(shape, dtype)
    return _Mapped(file, dtype, "c", file.tell(), shape, "F" if fortran else "C")
