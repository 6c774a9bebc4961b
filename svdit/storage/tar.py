"""Uncompressed tar archives of small files: written whole and alike on every run, read by place.

WebDataset reads them: files of one image share the name before the first dot.
"""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from svdit.errors import UserError
from svdit.files import atomic_path, reading, to_disk

END = 1024  # zero bytes that end an archive


class Member(NamedTuple):
    """Where a file lies in its archive."""

    offset: int
    size: int


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
    try:
        with reading(path), Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = {info.name: Member(info.offset_data, info.size) for info in archive if info.isreg()}
            file.seek(max(0, file.seek(0, io.SEEK_END) - END))
            if file.read().strip(b"\0"):
                raise tarfile.TarError("its end is missing")  # which tarfile accepts between two members
            return members
    except UserError:
        raise
    except Exception as error:  # a file from elsewhere can raise anything
        raise UserError(f"{path} cannot be read as a tar archive ({error}); create or copy it again") from None


def read_member(path: str | Path, member: Member) -> bytes:
    """The content of one file."""
    with reading(path), Path(path).open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
