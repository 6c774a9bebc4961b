"""Labelled images for training, and their order.

Example n of a run, n = 0, 1, 2 …, is image `order(n // size)[n % size]`: every epoch is a permutation drawn from
(seed, epoch), and the augmentation of example n depends only on (seed, n). So a run can stop and resume anywhere, and
sees the same examples for any world size. Pixels are float32 (C, H, W) in [−1, 1].
"""

import zipfile
from collections.abc import Callable
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
from svdit.images import Pixels, center_crop, decode_image, list_images, read_image, to_float

ORDER, AUGMENT = 2, 3  # purposes of random streams; 0 and 1 are sampling's
HELD_OUT = 0.2  # share of the digits


@dataclass(frozen=True)
class LabelledImages:
    """`read(i)` returns image i, (C, H, W); `labels` is (size,) int64."""

    read: Callable[[int], Tensor]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    num_classes: int
    channels: int

    def __len__(self) -> int:
        return len(self.labels)


def load(source: str, image_size: int) -> LabelledImages:
    """`digits`, an .npz (ADM's `arr_0` with `labels`, or `jpeg`, `offsets`, `labels`), or a folder of class folders.

    Raises UserError for anything else.
    """
    if source == "digits":
        return digits()[0]
    path = Path(source)
    if path.is_dir():
        return folder(path, image_size)
    if path.suffix == ".npz" and path.is_file():
        return archive(path, image_size)
    raise UserError(f"cannot train on {source}; pass a folder of class folders, an .npz file, or digits")


def digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's 1797 handwritten digits, (1, 8, 8) with 17 levels: 1438 for training and 359 held out."""
    data = require("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = data.target.astype(np.int64)
    # RandomState never changes its streams, so the split is the same in every version of NumPy.
    held_out, training = np.split(np.random.RandomState(0).permutation(len(labels)), [int(HELD_OUT * len(labels))])
    return (
        LabelledImages(pixels[training].__getitem__, labels[training], 10, 1),
        LabelledImages(pixels[held_out].__getitem__, labels[held_out], 10, 1),
    )


def folder(path: Path, image_size: int) -> LabelledImages:
    """One sub-folder per class, in the order of their names. Raises UserError if there are no images."""
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(file, label) for label, name in enumerate(classes) for file in list_images(name)]
    if not files:
        raise UserError(f"{path} has no class folders with images; pass a folder with one sub-folder per class")
    paths, labels = zip(*files, strict=True)
    return LabelledImages(partial(_read_file, paths, image_size), np.array(labels), len(classes), 3)


def archive(path: Path, image_size: int) -> LabelledImages:
    """Images and labels of an .npz; JPEG files stay compressed in memory. Raises UserError for other content."""
    try:
        with np.load(path) as data:
            arrays = {key: data[key] for key in ("arr_0", "jpeg", "offsets", "labels") if key in data}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz ({error}); write it again with numpy.savez") from None
    if "labels" not in arrays or not ("arr_0" in arrays or {"jpeg", "offsets"} <= set(arrays)):
        known = ", ".join(arrays) or "none of its arrays"
        raise UserError(f"{path} holds {known}; it needs labels, and arr_0 or jpeg, offsets")
    labels = arrays["labels"].astype(np.int64)
    if "arr_0" in arrays:
        pixels = arrays["arr_0"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise UserError(f"arr_0 of {path} is {pixels.dtype} {pixels.shape}; it must be uint8 (N, H, W, 3)")
        read, count = partial(_read_array, pixels, image_size), len(pixels)
    else:
        jpeg, offsets = arrays["jpeg"], arrays["offsets"]
        read, count = partial(_read_jpeg, jpeg, offsets, path, image_size), len(offsets) - 1
    if count != len(labels):
        raise UserError(f"{path} holds {count} images and {len(labels)} labels; each image needs one")
    return LabelledImages(read, labels, int(labels.max()) + 1, 3)


def _read_file(paths: tuple[Path, ...], size: int, i: int) -> Tensor:
    return _cropped(read_image(paths[i]), size)


def _read_array(pixels: Any, size: int, i: int) -> Tensor:
    return _cropped(pixels[i], size)


def _read_jpeg(files: Any, offsets: Any, path: Path, size: int, i: int) -> Tensor:
    return _cropped(decode_image(files[offsets[i] : offsets[i + 1]].tobytes(), f"image {i} of {path}"), size)


def _cropped(pixels: Pixels, size: int) -> Tensor:
    """The middle square of (H, W, 3) as float32 (3, size, size)."""
    return to_float(np.array(center_crop(pixels, size))[None])[0]


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
