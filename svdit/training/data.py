"""Labelled images for training, and their order.

Example n of a run, n = 0, 1, 2 …, is image `order(n // size)[n % size]`: every epoch is a permutation drawn from
(seed, epoch), and the augmentation of example n depends only on (seed, n). So a run can stop and resume anywhere, and
sees the same examples for any world size. Pixels are float32 (C, H, W) in [−1, 1].
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svdit import distributed
from svdit.diffusion.noise import stream
from svdit.errors import UserError
from svdit.extras import require
from svdit.images import (
    Pixels,
    center_crop,
    class_numbers,
    class_summary,
    decode_image,
    read_image,
    relative_names,
    scan_images,
    to_float,
    visible_folders,
)
from svdit.storage.npz import map_npz, npz_digest, npz_keys

ORDER, AUGMENT = 2, 3  # purposes of random streams; 0 and 1 are sampling's
SPLITS = {"train", "training", "val", "valid", "validation", "eval", "test", "testing"}
HELD_OUT = 0.2  # share of the digits
LARGEST = 1000  # classes that more labels than images may name; more need num_classes
Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class LabelledImages:
    """`read(i)` returns image i, (C, H, W); `labels` is (size,) int64.

    `classes` are the names of the classes, `fingerprint` changes with the data, `notes` say what looks unusual.
    """

    read: Callable[[int], Tensor]
    labels: Labels
    num_classes: int
    channels: int
    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def class_summary(self) -> str:
        """ "2 classes: cat … dog" """
        return class_summary(self.classes or [*map(str, range(self.num_classes))])

    def summary(self) -> str:
        """ "8 images in 2 classes: cat … dog" """
        return f"{len(self)} images in {self.class_summary()}"


def load(source: str, image_size: int, num_classes: int | None = None) -> LabelledImages:
    """`digits`, an .npz (`arr_0`, or `jpeg` and `offsets`, with `labels` or ADM's `arr_1`), or a folder of classes.

    `num_classes` bounds the labels of an .npz. Raises UserError for anything else.
    """
    if source == "digits":
        return digits()[0]
    path = Path(source)
    if path.is_dir():
        return folder(path, image_size)
    if path.suffix.lower() == ".npz" and path.is_file():
        return archive(path, image_size, num_classes)
    problem = "cannot train on" if path.exists() else "there is no"
    raise UserError(f"{problem} {source}; pass a folder of class folders, an .npz file, or digits")


def digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's 1797 handwritten digits, (1, 8, 8) with 17 levels: 1438 for training and 359 held out."""
    data = require("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = data.target.astype(np.int64)
    # RandomState never changes its streams, so the split is the same in every version of NumPy.
    held_out, training = np.split(np.random.RandomState(0).permutation(len(labels)), [int(HELD_OUT * len(labels))])
    names = tuple("0123456789")
    return (
        LabelledImages(pixels[training].__getitem__, labels[training], 10, 1, names, "digits"),
        LabelledImages(pixels[held_out].__getitem__, labels[held_out], 10, 1, names),
    )


def folder(path: Path, image_size: int) -> LabelledImages:
    """One sub-folder with images per class, in natural order.

    Raises UserError if there are none, or if a sub-folder holds images in several folders only, as train/ and val/ do.
    """
    files, skipped = scan_images(path)
    parts = [name.split("/") for name in relative_names(path, files)]
    inside = [n for n, names in enumerate(parts) if len(names) > 1]
    if not inside:
        raise UserError(f"{path} has no class folders with images; pass a folder with one sub-folder per class")
    classes, numbers = class_numbers([parts[n][0] for n in inside])
    _refuse_folders_of_folders(path, [parts[n] for n in inside])
    rows = sorted(zip(numbers, inside, strict=True))  # by class; in it, files are in natural order
    paths = tuple(files[n] for _, n in rows)
    return LabelledImages(
        partial(_read_file, paths, image_size),
        np.array([label for label, _ in rows]),
        len(classes),
        3,
        classes,
        _names_and_sizes(path, paths),
        tuple(_folder_notes(path, classes, len(files) - len(inside), skipped)),
    )


def _refuse_folders_of_folders(path: Path, parts: list[list[str]]) -> None:
    inner: dict[str, Counter[str]] = {}
    for name, *rest in parts:
        inner.setdefault(name, Counter())[rest[0] if len(rest) > 1 else ""] += 1
    for name, counts in inner.items():
        own, folders = counts[""], sorted(set(counts) - {""})
        if len(folders) > 1 and own < counts.total() / 2:
            found = f"{own or 'no'} images of its own but {len(folders)} folders of images ({folders[0]}, …)"
            raise UserError(f"{path / name} has {found}, so it is not one class; pass the folder of the class folders")
    nested = any(set(counts) - {""} for counts in inner.values())
    if {name.lower() for name in inner} <= SPLITS and (nested or len(inner) > 1):
        parts_found = ", ".join(sorted(inner))
        raise UserError(f"the folders in {path} are parts of a data set ({parts_found}), not classes; pass one of them")


def _folder_notes(path: Path, classes: tuple[str, ...], outside: int, skipped: str) -> Iterator[str]:
    empty = sorted(set(visible_folders(path)) - set(classes))
    if empty:
        yield f"folders without images are no classes: {_first(empty)}"
    if outside:
        yield f"{outside} images beside the class folders are not used"
    if skipped:
        yield f"skipped {skipped}"


def _names_and_sizes(folder: Path, paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
    with ThreadPoolExecutor() as pool:
        sizes = [size for part in pool.map(_sizes, parts) for size in part]
    for name, size in zip(relative_names(folder, paths), sizes, strict=True):
        digest.update(os.fsencode(f"{name}\0{size}\0"))
    return digest.hexdigest()


def _sizes(paths: tuple[Path, ...]) -> list[int]:
    return [path.stat().st_size for path in paths]


def archive(path: Path, image_size: int, num_classes: int | None = None) -> LabelledImages:
    """Images and labels of an .npz, mapped; JPEG files are decoded when read. Raises UserError for other content."""
    keys = npz_keys(path)
    key = "labels" if "labels" in keys else "arr_1"
    if key not in keys or not ("arr_0" in keys or {"jpeg", "offsets"} <= keys):
        known = ", ".join(sorted(keys)) or "nothing"
        raise UserError(f"{path} holds {known}; it needs labels (or arr_1), and arr_0 or jpeg, offsets")
    read: Callable[[int], Tensor]
    if "arr_0" in keys:
        pixels = map_npz(path)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise UserError(f"arr_0 of {path} is {pixels.dtype} {pixels.shape}; it must be uint8 (N, H, W, 3)")
        read, count = partial(_read_array, pixels, path, image_size), len(pixels)
    else:
        jpeg, offsets = map_npz(path, "jpeg"), _offsets(path)
        if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or offsets[-1] > len(jpeg):
            raise UserError(f"jpeg of {path} is {jpeg.dtype} {jpeg.shape}; it must be uint8 ({offsets[-1]},)")
        read, count = partial(_read_jpeg, jpeg, offsets, path, image_size), len(offsets) - 1
    labels = _labels(path, key, count, num_classes)
    K = num_classes or int(labels.max()) + 1
    empty = np.flatnonzero(np.bincount(labels, minlength=K) == 0)
    notes = (f"classes without images ({len(empty)} of {K}): {_first(empty.tolist())}",) if len(empty) else ()
    return LabelledImages(read, labels, K, 3, _classes(path, K) if "classes" in keys else (), npz_digest(path), notes)


def _first(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")


def _offsets(path: Path) -> Labels:
    offsets = np.asarray(map_npz(path, "offsets"))
    valid = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1 and offsets[0] >= 0
    if not valid or (np.diff(offsets.astype(np.int64)) <= 0).any():
        kind = f"{offsets.dtype} {offsets.shape}"
        raise UserError(f"offsets of {path} is {kind}; it must be N + 1 ascending positions in jpeg")
    return offsets.astype(np.int64)


def _labels(path: Path, key: str, count: int, num_classes: int | None) -> Labels:
    labels = np.asarray(map_npz(path, key))
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise UserError(f"{key} of {path} is {labels.dtype} {labels.shape}; it must be integers (N,), one per image")
    if count != len(labels):
        raise UserError(f"{path} holds {count} images and {len(labels)} labels; each image needs one")
    limit = num_classes or max(count, LARGEST)
    wrong = np.flatnonzero(~((labels >= 0) & (labels < limit) & (labels == np.floor(labels))))
    if len(wrong):
        given = "" if num_classes else ", or more with --num-classes"
        values = f"{key}[{wrong[0]}] of {path} is {labels[wrong[0]]}"
        raise UserError(f"{values}; labels must be integers from 0 to {limit - 1}{given}")
    return labels.astype(np.int64)


def _classes(path: Path, count: int) -> tuple[str, ...]:
    names = np.asarray(map_npz(path, "classes"))
    if names.shape != (count,) or names.dtype.kind != "U":
        raise UserError(f"classes of {path} is {names.dtype} {names.shape}; it must be {count} names, one per class")
    return tuple(names.tolist())


def _read_file(paths: tuple[Path, ...], size: int, i: int) -> Tensor:
    return _cropped(read_image(paths[i]), size, paths[i])


def _read_array(pixels: Any, path: Path, size: int, i: int) -> Tensor:
    return _cropped(pixels[i], size, f"image {i} of {path}")


def _read_jpeg(files: Any, offsets: Any, path: Path, size: int, i: int) -> Tensor:
    name = f"image {i} of {path}"
    return _cropped(decode_image(files[offsets[i] : offsets[i + 1]].tobytes(), name), size, name)


def _cropped(pixels: Pixels, size: int, name: str | Path) -> Tensor:
    """The middle square of (H, W, 3) as float32 (3, size, size)."""
    return to_float(np.array(center_crop(pixels, size, name))[None])[0]


def flip(x: Tensor, random: np.random.Generator) -> Tensor:
    """(C, H, W), mirrored left to right with probability 1/2."""
    return x.flip(-1) if random.random() < 0.5 else x


def shift(x: Tensor, random: np.random.Generator) -> Tensor:
    """(C, H, W), shifted by −1, 0 or 1 pixel along each axis and padded with −1."""
    dy, dx = random.integers(3, size=2)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    return padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]


def keep(x: Tensor, random: np.random.Generator) -> Tensor:
    """(C, H, W), unchanged."""
    return x


AUGMENTATIONS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {"none": keep, "flip": flip, "shift": shift}


class Examples(Dataset[tuple[Tensor, int]]):
    """Example n to its augmented image (C, H, W) and label."""

    def __init__(self, images: LabelledImages, seed: int, augment: str) -> None:
        self.images, self.seed, self.augment = images, seed, AUGMENTATIONS[augment]

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        size = len(self.images)
        i = int(order(self.seed, n // size, size)[n % size])
        return self.augment(self.images.read(i), stream(self.seed, n, AUGMENT)), int(self.images.labels[i])


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, size: int) -> Any:
    """The permutation of one epoch, (size,)."""
    return stream(seed, epoch, ORDER).permutation(size)


def share(step: int, batch_size: int) -> range:
    """Numbers of this process's examples in one training step: consecutive, equally many per process."""
    local = batch_size // distributed.world_size()
    start = step * batch_size + distributed.rank() * local
    return range(start, start + local)


def batches(examples: Examples, steps: range, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """Images (N, C, H, W) and labels (N,) of each training step, this process's share."""
    return DataLoader(
        examples,
        batch_sampler=(list(share(step, batch_size)) for step in steps),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws the workers' seeds from the global stream
    )
