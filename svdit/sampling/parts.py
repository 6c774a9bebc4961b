"""Finished batches of an unfinished set: archives of PNGs in a hidden folder, each written whole.

A killed run loses only what it was drawing or writing, on any file system, whichever hosts write.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from svdit.errors import UnreadableError, UserError
from svdit.files import remove_empty
from svdit.printing import warn
from svdit.progress import counted, progress
from svdit.storage.tar import PackedFile, tar_members, write_tar
from svdit.threads import in_threads

NAME = ".parts"


class Parts:
    """The folder of parts inside the folder of a set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / NAME

    def write(self, indices: Sequence[int], files: Iterable[tuple[str, bytes]]) -> None:
        """Store the files, (name, content) each, of the images of a batch. No other part has its first image."""
        write_tar(self.folder / f"{indices[0]:06d}.tar", files)

    def paths(self) -> list[Path]:
        """The archives."""
        return sorted(self.folder.glob("*.tar"))

    def remove(self) -> None:
        """Delete the parts of a set that is complete."""
        for path in self.paths():
            path.unlink()
        remove_empty(self.folder)


def places(archives: Iterable[Path]) -> dict[str, PackedFile]:
    """Where each PNG of the archives lies, by name. Raises UserError for damaged archives."""
    return {file.name: file for path in archives for file in packed(path) if file.name.endswith(".png")}


def packed(archive: Path) -> list[PackedFile]:
    """The files in an archive. Raises UserError for a damaged one."""
    return [PackedFile(archive, name, member) for name, member in tar_members(archive).items()]


def discard_damaged(archives: Iterable[Path], is_whole: Callable[[PackedFile], bool]) -> None:
    """Delete archives with damage, with a warning: their images are generated again. Raises UnreadableError."""

    def check(path: Path) -> bool:
        try:
            return all(map(is_whole, packed(path)))
        except UnreadableError:
            raise
        except UserError:
            return False

    archives = list(archives)
    with progress("checking finished batches", unit="archives") as update:
        for path, whole in zip(archives, counted(in_threads(check, archives), len(archives), update), strict=True):
            if not whole:
                path.unlink()
                warn(f"{path} is damaged; its images are generated again")
