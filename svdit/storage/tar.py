"""Uncompressed tar archives of small files: written whole and alike on every run, read by place.

WebDataset reads them: files of one image share the name before the first dot.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from svdit.errors import UserError
from svdit.files import atomic_path, reading, to_disk
from svdit.storage.tar_headers import Member, read_headers

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


def write_tar(path: str | Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files, (name, content) each, without times and owners, so that equal files make equal archives."""
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, content in files:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        to_disk(temporary)


def tar_members(path: str | Path) -> dict[str, Member]:
    """The regular files of an archive by name, from their headers. Raises UserError for damaged ones."""
    return {name: member for name, member in tar_entries(path) if member is not None}


def tar_entries(path: str | Path) -> Iterator[tuple[str, Member | None]]:
    """The name and place of every file of an archive; no place for what is no regular file, such as links.

    Raises UserError for damaged and compressed archives.
    """
    try:
        with reading(path), Path(path).open("rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise UserError(f"{path} is compressed; decompress it first, so that its files can be read by place")
            yield from read_headers(file)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a tar archive ({error}); create or copy it again") from None


def read_member(path: str | Path, member: Member) -> bytes:
    """The content of one file."""
    return next(read_members(path, [member]))


def read_members(path: str | Path, members: Iterable[Member]) -> Iterator[bytes]:
    """The content of several files."""
    with reading(path), Path(path).open("rb") as file:
        for offset, size in members:
            file.seek(offset)
            yield file.read(size)


class PackedFile(NamedTuple):
    """A file in an archive, which is read like a `Path`."""

    archive: Path
    name: str
    member: Member

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def parent(self) -> Path:
        """The archive."""
        return self.archive

    def open(self, mode: str = "rb") -> BinaryIO:
        """The content as a file; nothing of it is in memory yet."""
        return io.BufferedReader(_Window(self.archive, self.member))

    def read(self) -> bytes:
        """The content."""
        return read_member(self.archive, self.member)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, member: Member) -> None:
        self.start, self.size = member
        self.place = 0
        self.file = path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.start + self.place)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.place)]) or 0
        self.place += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
