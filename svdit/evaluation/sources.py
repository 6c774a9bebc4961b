"""What is evaluated: a folder of images, an .npz of images, or an .npz of feature statistics (ADM's or ours).

Images are read one at a time. Missing and unreadable files, mixed sizes and wrong dtypes are detected from the
headers, before any long computation, and reported with the file's name.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svdit.errors import UserError
from svdit.evaluation.statistics import Gaussian, load_statistics
from svdit.files import sha256
from svdit.images import (
    Pixels,
    center_crop,
    class_numbers,
    class_summary,
    image_header,
    read_image,
    relative_names,
    scan_images,
)
from svdit.printing import warn
from svdit.progress import Update, progress
from svdit.storage.manifest import read_manifest
from svdit.storage.npz import map_npz, npz_keys

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """`names` (one per image, without extension) with `files` or `array`; statistics have `gaussians`."""

    path: Path
    names: tuple[str, ...]
    files: tuple[Path, ...] = ()
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
        """`folder`, `npz` or `statistics`."""
        return "folder" if self.files else "npz" if self.array is not None else "statistics"

    @property
    def folders(self) -> set[Path]:
        """The folders that contain the files, without symbolic links."""
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
        """A SHA-256 of the chosen images' stored bytes and names, in order; and how many are copies of others."""
        digest = hashlib.sha256(f"{self.kind} {self.resize_to}".encode())
        if self.array is not None:
            digest.update(sha256(self.path).encode() + indices.astype("<i8").tobytes())
            return digest.hexdigest(), len(indices) - len({hash(self.array[i].tobytes()) for i in indices})
        file_hashes: list[str] = []
        with ThreadPoolExecutor() as pool, progress(f"reading {self.path.name}", show_progress, "images") as update:
            for file_hash in pool.map(sha256, (self.files[i] for i in indices)):
                file_hashes.append(file_hash)
                update(len(file_hashes), len(indices))
        for index, file_hash in zip(indices, file_hashes, strict=True):
            digest.update(os.fsencode(f"{self.names[index]} {file_hash}"))
        return digest.hexdigest(), len(indices) - len(set(file_hashes))


@dataclass(frozen=True)
class ImageSet:
    """The images chosen from a source, their size (H, W), the hash of their content, and warnings about them.

    `lossy`: whether any is stored as JPEG or WebP. `copies`: how many have the content of an earlier one.
    """

    source: Source
    indices: Indices
    size: tuple[int, int]
    content: str
    lossy: bool = False
    copies: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of chosen images."""
        return len(self.indices)

    def read(self, n: int) -> Pixels:
        """The n-th chosen image, uint8 (H, W, 3)."""
        return self.source.read(int(self.indices[n]))

    def describe(self) -> dict[str, Any]:
        """The set's entry in `metrics.json`."""
        path, kind = str(self.source.path), self.source.kind
        content = {"path": path, "kind": kind, "images": self.count, "size": list(self.size), "sha256": self.content}
        return content | ({"classes": class_summary(self.source.classes)} if self.source.classes else {})


def open_source(path: str | Path, resize_to: int | None = None) -> Source:
    """Open a folder, sub-folders included, or an .npz. Raises UserError for anything else."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, resize_to)
    if not path.is_file():
        raise UserError(f"there is no folder or file {path}; fix the path")
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path} is neither a folder nor an .npz; pass a folder of images or an .npz")
    return _open_npz(path, resize_to)


def _open_folder(path: Path, resize_to: int | None) -> Source:
    files, skipped = scan_images(path)
    if not files:
        found = f" (only {skipped})" if skipped else ""
        raise UserError(f"{path} and its sub-folders contain no images{found}; pass a folder of PNG or JPEG files")
    names = tuple(name[: name.rindex(".")] for name in relative_names(path, files))
    manifest = _read_manifest(path / "manifest.json")
    classes, numbers = class_numbers([name.rpartition("/")[0] or "." for name in names])
    if (listed := len(manifest.get("files") or names)) > len(names):
        warn(f"{path} contains {len(names)} of the {listed} images in its manifest; generate the others, or remove it")
    labels = _labels(manifest, names)
    if labels is None and len(classes) > 1:
        labels = tuple(numbers)
    else:
        classes = ()
    return Source(path, names, tuple(files), None, labels, classes, skipped, manifest=manifest, resize_to=resize_to)


def _open_npz(path: Path, resize_to: int | None) -> Source:
    keys = npz_keys(path)
    gaussians, extractor = load_statistics(path)
    if not gaussians and "arr_0" not in keys:
        content = ", ".join(sorted(keys)) or "nothing"
        raise UserError(f"{path} contains {content}; expected images under arr_0 or statistics under mu and sigma")
    array = _check_array(path, map_npz(path)) if "arr_0" in keys else None
    names = tuple(str(i) for i in range(0 if array is None else len(array)))
    manifest = _read_manifest(path.with_suffix(".json"))
    rows = _check_rows(path, map_npz(path, "features"), gaussians) if "features" in keys else None
    labels = _labels(manifest, names)
    return Source(path, names, (), array, labels, (), "", gaussians, rows, extractor, manifest, resize_to)


def _check_array(path: Path, array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise UserError(f"arr_0 in {path} is {array.dtype}; expected uint8 in 0 … 255, so convert it when writing it")
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        hint = "; move the channels last" if array.ndim == 4 and array.shape[1] in (1, 3) else ""
        raise UserError(f"arr_0 in {path} has the shape {array.shape}; expected (N, H, W, 3){hint}")
    return array  # type: ignore[return-value]


def _check_rows(path: Path, rows: npt.NDArray[Any], gaussians: dict[str, Gaussian]) -> npt.NDArray[np.float32]:
    width = gaussians["pool"].mean.size if "pool" in gaussians else "D"
    if rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != width != "D":
        kind = f"{rows.dtype} {rows.shape}"
        raise UserError(f"features in {path} is {kind}; expected float32 (N, {width}), so create the file again")
    return np.asarray(rows, np.float32)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    manifest = read_manifest(path)
    if manifest is None:
        warn(f"{path} is not a manifest of svdit and is ignored")
    return manifest or {}


def _labels(manifest: dict[str, Any], names: tuple[str, ...]) -> tuple[int, ...] | None:
    labels = manifest.get("labels") or ()
    return tuple(labels) if len(labels) == len(names) else None


def _check_files(
    files: Sequence[Path], resize_to: int | None, update: Update
) -> tuple[tuple[int, int], bool, list[str]]:
    first: dict[tuple[int, int], Path] = {}
    modes: Counter[str] = Counter()
    lossy, animated = False, 0
    for done, file in enumerate(files, 1):
        header = image_header(file)
        first.setdefault(header.size, file)
        modes[header.mode] += 1
        lossy |= header.lossy
        animated += header.more_frames
        update(done, len(files))
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
