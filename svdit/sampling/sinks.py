"""Where the images of a set go: PNG files, WebDataset shards, or only the .npz in ADM's layout.

A sink knows which images are there, stores batches, and completes the set. Memory holds a few images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from svdit import images
from svdit.distributed import barrier, claimed, rank, seen
from svdit.errors import UnreadableError, UserError
from svdit.images import Pixels
from svdit.printing import warn
from svdit.progress import counted, progress
from svdit.sampling.parts import Parts, discard_damaged, places
from svdit.storage.npz import map_npz, write_npz
from svdit.storage.tar import PackedFile, write_tar
from svdit.threads import in_threads

SHARD = 1000  # images in an archive


@runtime_checkable
class Sink(Protocol):
    """`open` comes first, on every process; then `missing` on the first one, which holds the folder's lock.

    `finish` is called on every process when all images are written.
    """

    form: str  # the manifest's field `storage`
    threaded: bool  # `write` is called in threads while the next batch is sampled

    def open(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Remember the folder and the settings; the folder is not read yet."""

    def missing(self) -> list[int]:
        """The images that are not there yet. Raises UserError for a folder that contains anything else."""

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """Store a batch, uint8 (N, H, W, 3)."""

    def finish(self) -> Any:
        """Complete the set."""


class ImageSink:
    """What the sinks of images share: the folder, the names, and the .npz."""

    form, threaded = "", True

    def open(self, folder: Path, manifest: dict[str, Any]) -> None:
        """See `Sink`."""
        self.folder, self.npz, self.parts = folder, npz_path(folder), Parts(folder)
        self.names: list[str] = manifest["files"]
        self.labels: list[int] = manifest["labels"]
        self.size: int = manifest["image_size"]

    def check_strays(self, expected: Iterable[Path] = ()) -> set[Path]:
        """The images and archives in the folder. Raises UserError for others than those expected."""
        present = {*images.list_images(self.folder), *self.folder.glob("*.tar")}
        if strays := sorted(present.difference(expected)):
            stray = strays[0].relative_to(self.folder)
            raise UserError(
                f"{self.folder} contains {stray}, which is not an image of this set; move it out of the folder"
            )
        return present

    def without(self, present: Iterable[str]) -> list[int]:
        """The indices of the images whose names are not present."""
        names = set(present)
        return [i for i, name in enumerate(self.names) if name not in names]

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """See `Sink`: keep a batch (N, H, W, 3) until the set is complete."""
        files = ((self.names[i], images.encode_png(image)) for i, image in zip(indices, pixels, strict=True))
        self.parts.write(indices, files)

    def is_whole(self, file: PackedFile) -> bool:
        """Whether a PNG in an archive is undamaged."""
        return images.is_whole_png(file, self.size)

    def find(self, archives: Callable[[], Iterable[Path]], count: int) -> dict[str, PackedFile]:
        """Where the last `count` images lie. Raises UserError where other processes wrote elsewhere."""
        found: dict[str, PackedFile] = {}
        names = set(self.names[len(self.names) - count :])

        def look() -> bool:
            found.update(places(archives()))
            return names <= found.keys()

        if not seen(look):
            lacking = f"{self.folder} lacks {len(names - found.keys())} images that were drawn"
            raise UserError(f"{lacking}; choose a folder that all hosts share")
        return found

    def write_npz(self, read: Callable[[int], Pixels]) -> None:
        """Write the .npz from `read(i)`, (H, W, 3), unless it is complete."""
        if count_images(self.npz, self.size) != len(self.names):
            count = len(self.names)
            with progress(f"writing {self.npz.name}", unit="images") as update:
                write_npz(self.npz, counted(in_threads(read, range(count)), count, update), count)


class PngFiles(ImageSink):
    """DIR/000000.png, …"""

    form = "png"

    def missing(self) -> list[int]:
        """See `Sink`; damaged images are missing, with a warning. Raises UserError as described there."""
        files = {self.folder / name: name for name in self.names}
        present = {files[path] for path in self.check_strays(files)}
        for path, name in files.items():
            if name not in present and path.is_dir():
                raise UserError(f"{path} is a folder where a file belongs; remove or rename it")
        missing = self.without(present - self.damaged(present))
        if missing:
            self.npz.unlink(missing_ok=True)  # it exists only for complete sets
        return missing

    def damaged(self, names: set[str]) -> set[str]:
        """The files that are not whole."""
        with progress(f"checking {self.folder.name}", unit="images") as update:
            whole = in_threads(lambda name: images.is_whole_png(self.folder / name, self.size), names)
            counts = counted(whole, len(names), update)
            damaged = {name for name, is_whole in zip(names, counts, strict=True) if not is_whole}
        if damaged:
            warn(f"{len(damaged)} images in {self.folder} are damaged and are generated again (first: {min(damaged)})")
        return damaged

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """See `Sink`."""
        for i, image in zip(indices, pixels, strict=True):
            images.write_png(self.folder / self.names[i], image)

    def finish(self) -> Path:
        """Write the .npz; returns its path."""
        if rank() == 0:
            self.write_npz(self.read)
        return self.npz

    def read(self, i: int) -> Pixels:
        """One image (H, W, 3)."""
        path = self.folder / self.names[i]
        seen(path.exists)
        return images.read_image(path)


class TarShards(ImageSink):
    """DIR/000000.tar, …, of 1000 images each: 000000.png and its label 000000.cls."""

    form = "tar"

    def shards(self) -> list[Path]:
        """The archives of the complete set."""
        return [self.folder / f"{k:06d}.tar" for k in range(-(-len(self.names) // SHARD))]

    def stored(self) -> list[Path]:
        """The archives that are there: of the set, and of batches."""
        return [*(path for path in self.shards() if path.exists()), *self.parts.paths()]

    def missing(self) -> list[int]:
        """See `Sink`; the images of damaged archives are missing. Raises UserError as described there."""
        self.check_strays(self.shards())
        for path in self.shards():
            if path.is_dir():
                raise UserError(f"{path} is a folder where a file belongs; remove or rename it")
        discard_damaged(self.stored(), self.is_whole)
        missing = self.without(places(self.stored()))
        if missing:
            self.npz.unlink(missing_ok=True)
        return missing

    def finish(self) -> Path:
        """Write the shards, each by one process, then the .npz; returns its path."""
        shards, stored = self.shards(), self.find(self.stored, len(self.names))
        with progress(f"packing {self.folder.name}", rank() == 0, "archives") as update:
            for k in claimed(len(shards)):
                indices = range(k * SHARD, min((k + 1) * SHARD, len(self.names)))
                if any(stored[self.names[i]].archive != shards[k] for i in indices):
                    write_tar(shards[k], (file for i in indices for file in self.sample(i, stored)))
                update(k + 1, len(shards))
        barrier()
        if rank() == 0:
            complete = self.find(lambda: filter(Path.exists, shards), len(self.names))
            self.write_npz(lambda i: images.read_image(complete[self.names[i]]))
            self.parts.remove()
        return self.npz

    def is_whole(self, file: PackedFile) -> bool:
        """Whether a PNG in an archive is undamaged, or a label that of this set."""
        name, _, suffix = file.name.rpartition(".")
        if suffix == "cls":
            return name.isdecimal() and int(name) < len(self.labels) and file.read() == self.label(int(name))
        return super().is_whole(file)

    def label(self, i: int) -> bytes:
        """The class of an image as WebDataset reads it."""
        return str(self.labels[i]).encode()

    def sample(self, i: int, stored: dict[str, PackedFile]) -> Iterator[tuple[str, bytes]]:
        """The two files of an image."""
        name = self.names[i]
        yield name, stored[name].read()
        yield f"{i:06d}.cls", self.label(i)


class NpzOnly(ImageSink):
    """DIR.npz, beside DIR/manifest.json."""

    form = "npz"

    def open(self, folder: Path, manifest: dict[str, Any]) -> None:
        """See `Sink`."""
        super().open(folder, manifest)
        self.earlier = earlier_path(self.npz)

    def missing(self) -> list[int]:
        """See `Sink`; the .npz of a set that grows is set aside until the new one is complete."""
        self.check_strays()
        stored = count_images(self.npz, self.size)
        if stored == len(self.names):
            return []
        if stored:
            self.npz.replace(self.earlier)
        else:
            self.npz.unlink(missing_ok=True)
        discard_damaged(self.parts.paths(), self.is_whole)
        kept = count_images(self.earlier, self.size)
        if not kept:
            self.earlier.unlink(missing_ok=True)
        return self.without([*self.names[:kept], *places(self.parts.paths())])

    def finish(self) -> Path:
        """Write the .npz; returns its path."""
        if rank() == 0:
            earlier = map_npz(self.earlier) if self.earlier.exists() else ()
            parts = {} if self.npz.exists() else self.find(self.parts.paths, len(self.names) - len(earlier))
            self.write_npz(
                lambda i: np.asarray(earlier[i]) if i < len(earlier) else images.read_image(parts[self.names[i]])
            )
            self.parts.remove()
            self.earlier.unlink(missing_ok=True)
        return self.npz


SINKS: dict[str, Callable[[], Sink]] = {"png": PngFiles, "tar": TarShards, "npz": NpzOnly}


def npz_path(folder: Path) -> Path:
    """DIR.npz beside DIR."""
    return folder.with_name(f"{folder.name}.npz")


def earlier_path(npz: Path) -> Path:
    """Where the images of a set that grows are until it is complete."""
    return npz.with_name(f".{npz.name}.earlier")


def count_images(npz: Path, size: int) -> int:
    """The number of images in an undamaged .npz of size × size pixels; 0 for others, with a warning.

    Raises UnreadableError.
    """
    if not npz.exists():
        return 0
    try:
        array = map_npz(npz)  # compares the checksum
    except UnreadableError:
        raise
    except UserError:
        array = None
    if array is None or array.dtype != "uint8" or array.shape[1:] != (size, size, 3):
        warn(f"{npz} is damaged and is written again")
        return 0
    return len(array)
