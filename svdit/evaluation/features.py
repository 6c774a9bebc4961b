"""One pass over the images: the network's features as float64 sums and, for the metrics that need them, as rows.

Each process handles its share of the images and writes its rows to their places in one memory-mapped file per layer,
so rows are in the order of the source and memory does not grow with the number of images. Results are cached under a
key of content, weights and choice, so the real set is processed once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svdit.distributed import barrier, gather, rank, shard, world_size
from svdit.errors import UserError
from svdit.evaluation.sources import ImageSet
from svdit.evaluation.statistics import Gaussian, Moments, load_statistics, save_statistics
from svdit.progress import progress

Rows = npt.NDArray[np.float32]
SUMMED = ("pool", "spatial")
FORMAT = "features 2"  # of the cached files; part of the key, so other formats are never read
WORKERS_FROM = 1000  # below this many images per process, starting workers costs more time than they save


class FeatureNetwork(Protocol):
    """The interface of `inception.Extractor` that `extract` uses."""

    name: str
    digest: str
    comparable: bool
    widths: dict[str, int]

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, H, W) to features (N, D) by layer."""

    def to(self, device: torch.device) -> FeatureNetwork:
        """The network on `device`."""


@dataclass(frozen=True)
class Features:
    """`gaussians` of the pool and spatial layers, and `rows` (N, D) of the requested layers."""

    gaussians: dict[str, Gaussian]
    rows: dict[str, Rows]


@dataclass(frozen=True)
class Extraction:
    """How features are computed: `folder` for the results, device, batch size, and whether to show a progress bar."""

    folder: Path
    device: torch.device
    batch_size: int = 32
    progress: bool = False


class _Pixels(Dataset[tuple[int, Tensor]]):
    """This process's share of the images: (row, uint8 (3, H, W))."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.mine = images, shard(images.count)

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        row = self.mine[i]
        return row, torch.from_numpy(np.ascontiguousarray(self.images.read(row).transpose(2, 0, 1)))


def extract(images: ImageSet, network: FeatureNetwork, layers: tuple[str, ...], how: Extraction) -> Features:
    """The features of `images`, with rows for `layers`; taken from the cache if it has all of them."""
    folder = how.folder / cache_key(images, network)
    if not _complete(folder, layers):
        _extract_into(folder, images, network, layers, how)
    gaussians, _ = load_statistics(folder / "statistics.npz")
    return Features(gaussians, {layer: np.load(folder / f"{layer}.npy", mmap_mode="c") for layer in layers})


def _complete(folder: Path, layers: tuple[str, ...]) -> bool:
    complete = all((folder / name).exists() for name in ("statistics.npz", *(f"{layer}.npy" for layer in layers)))
    return bool(gather(complete)[0])


@torch.inference_mode()
def _extract_into(
    folder: Path, images: ImageSet, network: FeatureNetwork, layers: tuple[str, ...], how: Extraction
) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    rows = _create_rows(unfinished, {layer: (images.count, network.widths[layer]) for layer in layers})
    moments = {layer: Moments(network.widths[layer], how.device) for layer in SUMMED}
    pixels, done = _Pixels(images), 0
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
        progress(images.source.path.name, how.progress and rank() == 0) as update,
    ):
        for places, batch in _batches(pixels, how.batch_size, _workers(len(pixels), how.device)):
            features = network(batch.to(how.device))
            for layer, sums in moments.items():
                sums.add(features[layer])
            for layer, array in rows.items():
                array[places.numpy()] = features[layer].cpu().numpy()
            update(done := done + len(batch), len(pixels))
    for array in rows.values():
        array.flush()
    gaussians = {layer: sums.merge().gaussian() for layer, sums in moments.items()}
    barrier()
    if rank() == 0:
        save_statistics(unfinished / "statistics.npz", gaussians, network.digest)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    barrier()


def _batches(pixels: _Pixels, size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    try:
        yield from DataLoader(pixels, size, num_workers=workers)
    except UserError as error:  # DataLoader wraps a worker's error in its traceback
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None


def _workers(count: int, device: torch.device) -> int:
    """One worker keeps a CPU busy; a GPU handles thousands of images per second, and a core decodes about 500."""
    if count < WORKERS_FROM:
        return 0
    return 1 if device.type == "cpu" else max(1, min(16, (os.cpu_count() or 1) // world_size() - 1))


def _create_rows(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, np.memmap[Any, Any]]:
    """One file per layer, mapped by all processes."""
    paths = {layer: folder / f"{layer}.npy" for layer in shapes}
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for layer, shape in shapes.items():
            np.lib.format.open_memmap(paths[layer], "w+", np.float32, shape).flush()
    barrier()
    return {layer: np.lib.format.open_memmap(path, "r+") for layer, path in paths.items()}


def cache_key(images: ImageSet, network: FeatureNetwork) -> str:
    """A hash of the images' bytes, the choice among them, the weights, the precision and the file format."""
    choice = images.indices.astype("<i8").tobytes().hex()
    parts = (FORMAT, images.content, network.name, network.digest, "float32", choice)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@contextmanager
def features_folder(cache: Path | None) -> Iterator[Path]:
    """`cache`/features; without a cache a temporary folder shared by all processes."""
    if cache is not None:
        yield cache / "features"
        return
    folder = Path(gather(tempfile.mkdtemp(prefix="svdit-") if rank() == 0 else "")[0])
    try:
        yield folder
    finally:
        barrier()
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
