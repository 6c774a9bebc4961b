"""Finished batches of an unfinished set: archives of PNGs in a hidden folder, each written whole.

A killed run loses at most one batch per process, on any file system, whichever hosts write.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from svdit.errors import UserError
from svdit.images import Pixels, decode_image, is_whole_png
from svdit.printing import warn
from svdit.progress import counted, progress
from svdit.storage.tar import read_member, tar_members, write_tar
from svdit.storage.tar_headers import Member

NAME = ".parts"


class Place(NamedTuple):
    """Where a PNG lies: an archive, and the place in it."""

    archive: Path
    member: Member

    def content(self) -> bytes:
        """The PNG file."""
        return read_member(self.archive, self.member)

    def pixels(self) -> Pixels:
        """uint8 (H, W, 3). Raises UserError for a damaged image."""
        return decode_image(self.content(), f"an image in {self.archive}")

    def is_whole(self, size: int) -> bool:
        """Whether it is an undamaged PNG of size × size pixels."""
        return is_whole_png(BytesIO(self.content()), size)


class Parts:
    """The folder of parts inside the folder of a set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / NAME

    def write(self, indices: Sequence[int], files: Iterable[tuple[str, bytes]]) -> None:
        """Store the files, (name, content) each, of the images of a batch."""
        number = zlib.crc32(np.array(indices, "<i8").tobytes())  # other batches may begin with the same image
        write_tar(self.folder / f"{indices[0]:06d}-{number:08x}.tar", files)

    def paths(self) -> list[Path]:
        """The archives."""
        return sorted(self.folder.glob("*.tar"))

    def remove(self) -> None:
        """Delete the parts of a set that is complete."""
        for path in self.paths():
            path.unlink()
        with suppress(OSError):  # it does not exist, or another version left something in it
            self.folder.rmdir()


def places(archives: Iterable[Path]) -> dict[str, Place]:
    """Where each PNG of the archives lies, by name. Raises UserError for damaged archives."""
    return {
        name: Place(path, member)
        for path in archives
        for name, member in tar_members(path).items()
        if name.endswith(".png")
    }


def discard_damaged(archives: Iterable[Path], size: int) -> None:
    """Delete archives with damage, with a warning: their images are generated again."""
    archives = list(archives)
    with ThreadPoolExecutor() as pool, progress("checking finished batches", unit="archives") as update:
        whole_ones = counted(pool.map(whole_archive(size), archives), len(archives), update)
        for path, whole in zip(archives, whole_ones, strict=True):
            if not whole:
                path.unlink()
                warn(f"{path} is damaged; its images are generated again")


def whole_archive(size: int) -> Callable[[Path], bool]:
    """Whether an archive and all PNGs in it, of size × size pixels, are undamaged."""

    def check(path: Path) -> bool:
        try:
            return all(place.is_whole(size) for place in places([path]).values())
        except UserError:
            return False

    return check
