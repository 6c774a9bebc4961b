"""What is evaluated: images in a folder, in tar shards or in an .npz, or feature statistics (ADM's or ours).

Images are read one at a time. Missing and unreadable files, mixed sizes and wrong dtypes are detected from the
headers, before any long computation, and reported with the file's name.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svdit.errors import UserError
from svdit.evaluation.statistics import Gaussian
from svdit.files import Openable, sha256
from svdit.images import (
    Pixels,
    center_crop,
    class_summary,
    image_header,
    read_image,
)
from svdit.progress import Update, counted, progress
from svdit.storage.tar import PackedFile
from svdit.threads import in_threads

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """`names` (one per image, without extension) with `files` or `array`; statistics have `gaussians`."""

    path: Path
    names: tuple[str, ...]
    files: tuple[Path, ...] | tuple[PackedFile, ...] = ()
    array: npt.NDArray[np.uint8] | None = None
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()  # the names of labels that come from sub-folders
    skipped: str = ""  # files and folders that were not read, in words
    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    rows: npt.NDArray[np.float32] | None = None  # (N, 2048) pool features stored beside the Gaussians
    extractor: str = ""  # digest of the network that computed the Gaussians
    manifest: dict[str, Any] = field(default_factory=dict)
    resize_to: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def kind(self) -> str:
        """`folder`, `tar`, `npz`, `statistics`, or `features` of images that are not stored."""
        if self.files:
            return "folder" if isinstance(self.files[0], Path) else "tar"
        return "npz" if self.array is not None else "statistics" if self.gaussians else "features"

    @property
    def folders(self) -> set[Path]:
        """The folders or archives that contain the files, without symbolic links."""
        return {folder.resolve() for folder in {file.parent for file in self.files}}

    def read(self, index: int) -> Pixels:
        """One image, uint8 (H, W, 3)."""
        name = self.files[index] if self.files else f"image {index} of {self.path}"
        if self.array is None:
            pixels = read_image(name)
        else:
            pixels = np.repeat(self.array[index], 4 - self.array.shape[3], axis=2)[..., :3]
        return pixels if self.resize_to is None else center_crop(pixels, self.resize_to, name)

    def check(self, indices: Indices, show_progress: bool = False) -> tuple[tuple[int, int], bool, list[str]]:
        """The common size (H, W) of the chosen images, whether any is lossy, and warnings; reads headers only."""
        if self.array is not None:
            size, lossy, warnings = self.array.shape[1:3], False, list[str]()
        else:
            with progress(f"checking {self.path.name}", show_progress, "images") as update:
                size, lossy, warnings = _check_files([self.files[i] for i in indices], self.resize_to, update)
        if self.skipped:
            warnings.append(f"skipped {self.skipped}")
        return (size if self.resize_to is None else (self.resize_to, self.resize_to)), lossy, warnings

    def content(self, indices: Indices, show_progress: bool = False) -> tuple[str, int]:
        """A SHA-256 of the chosen images' stored bytes and names, in order; and how many are copies of others.

        It is the same for files in a folder and in archives.
        """
        digest = hashlib.sha256(f"{'folder' if self.files else 'npz'} {self.resize_to}".encode())
        if self.array is not None:
            digest.update(sha256(self.path).encode() + indices.astype("<i8").tobytes())
            return digest.hexdigest(), len(indices) - len({hash(self.array[i].tobytes()) for i in indices})
        with progress(f"reading {self.path.name}", show_progress, "images") as update:
            hashes = in_threads(sha256, (self.files[i] for i in indices))
            file_hashes = list(counted(hashes, len(indices), update))
        for index, file_hash in zip(indices, file_hashes, strict=True):
            digest.update(os.fsencode(f"{self.names[index]} {file_hash}"))
        return digest.hexdigest(), len(indices) - len(set(file_hashes))

    def stamp(self, indices: Indices) -> str:
        """A hash of the sizes and times of the files that hold the chosen images: another one where they change."""
        files = [self.files[i] for i in indices] if self.array is None else [self.path]
        paths = dict.fromkeys(file if isinstance(file, Path) else file.archive for file in files)
        stats = [path.stat() for path in paths]
        return hashlib.sha256(repr([(each.st_size, each.st_mtime_ns) for each in stats]).encode()).hexdigest()


@dataclass(frozen=True)
class ImageSet:
    """The images chosen from a source, their size (H, W), the hash of their content, and warnings about them.

    `lossy`: whether any is stored as JPEG or WebP. `copies`: how many have the content of an earlier one. `stamp`: of
    their files, before the content was read.
    """

    source: Source
    indices: Indices
    size: tuple[int, int]
    content: str
    lossy: bool = False
    copies: int = 0
    warnings: tuple[str, ...] = ()
    stamp: str = ""

    @property
    def count(self) -> int:
        """The number of chosen images."""
        return len(self.indices)

    def read(self, n: int) -> Pixels:
        """The n-th chosen image, uint8 (H, W, 3)."""
        return self.source.read(int(self.indices[n]))

    def check_unchanged(self) -> None:
        """Raises UserError if other images than those of `content` may have been read."""
        if self.stamp and self.source.stamp(self.indices) != self.stamp:
            raise UserError(f"{self.source.path} changed while it was read; run this again when nothing writes to it")

    def describe(self) -> dict[str, Any]:
        """The set's entry in `metrics.json`."""
        path, kind = str(self.source.path), self.source.kind
        content = {"path": path, "kind": kind, "images": self.count, "size": list(self.size), "sha256": self.content}
        return content | ({"classes": class_summary(self.source.classes)} if self.source.classes else {})


def _check_files(
    files: Sequence[Openable], resize_to: int | None, update: Update
) -> tuple[tuple[int, int], bool, list[str]]:
    first: dict[tuple[int, int], Openable] = {}
    modes: Counter[str] = Counter()
    lossy, animated = False, 0
    for file in counted(files, len(files), update):
        header = image_header(file)
        first.setdefault(header.size, file)
        modes[header.mode] += 1
        lossy |= header.lossy
        animated += header.more_frames
    if len(first) > 1 and resize_to is None:
        (a, file_a), (b, file_b) = list(first.items())[:2]
        sizes = f"{file_a} is {a[1]}×{a[0]} and {file_b} is {b[1]}×{b[0]} (width×height)"
        raise UserError(f"all images must have one size, but {sizes}; pass --resize-to N to crop and resize them")
    other = {mode: n for mode, n in modes.items() if mode != "RGB"}
    counts = ", ".join(f"{n} of mode {mode}" for mode, n in sorted(other.items()))
    warnings = [f"{sum(other.values())} images were converted to RGB ({counts})"] if other else []
    if animated:
        warnings.append(f"{animated} images have more than one frame, of which the first is used")
    return next(iter(first)), lossy, warnings


def choose(source: Source, count: int | None, seed: int = 0, allow_fewer: bool = False) -> Indices:
    """`count` image indices in ascending order, a seeded choice with classes in proportion; None chooses all.

    Raises UserError where the source has fewer images, unless `allow_fewer`.
    """
    n = len(source)
    if count is not None and count > n and not allow_fewer:
        raise UserError(
            f"{source.path} contains {n} images, fewer than the {count} requested; "
            "lower --num_images or pass --allow-fewer"
        )
    if count is None or count >= n:
        return np.arange(n)
    stream = np.random.RandomState(seed)  # legacy stream: NumPy keeps it stable, so published subsets stay the same
    labels = np.zeros(n, np.int64) if source.labels is None else np.asarray(source.labels)
    members = [stream.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    shares = _proportional([len(m) for m in members], count)
    return np.sort(np.concatenate([m[:share] for m, share in zip(members, shares, strict=True)]))


def _proportional(sizes: list[int], count: int) -> list[int]:
    """Integers that sum to `count`, proportional to `sizes` up to rounding (largest remainders first)."""
    exact = [size * count / sum(sizes) for size in sizes]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares
