"""One pass over the images: the network's features as float64 sums and, where a metric needs them, as rows.

Every process takes its own images (rank, rank + world, …) and writes its rows to their places in one file per layer,
so order is as in the source and memory does not grow with the number of images. Finished features are kept under a
key of content, weights and choice: the real set is done once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
from svdit.evaluation.sources import Indices, Source
from svdit.evaluation.statistics import Gaussian, Moments, load_statistics, save_statistics

Rows = npt.NDArray[np.float32]
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]  # shows progress; the count is in images
SUMMED = ("pool", "spatial")
FORMAT = "features 2"  # of what is kept; another one is not found, so never misread
WORKERS_FROM = 1000  # fewer images per process are read faster than workers start


class FeatureNetwork(Protocol):
    """What `extract` needs of a network: see `inception.Extractor`."""

    name: str
    digest: str
    comparable: bool
    widths: dict[str, int]

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Features:
    """`gaussians` of the pool and spatial layers, and `rows` (N, D) of the layers that were asked for."""

    gaussians: dict[str, Gaussian]
    rows: dict[str, Rows]

    @property
    def count(self) -> int | None:
        return next((len(rows) for rows in self.rows.values()), self.gaussians["pool"].count)


class _Pictures(Dataset[tuple[int, Tensor]]):
    def __init__(self, source: Source, indices: Indices) -> None:
        self.source, self.indices, self.mine = source, indices, shard(len(indices))

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        row = self.mine[i]
        pixels = self.source.read(int(self.indices[row]))
        return row, torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def extract(
    source: Source,
    indices: Indices,
    network: FeatureNetwork,
    keep: tuple[str, ...],
    folder: Path,
    device: torch.device,
    batch_size: int = 32,
    track: Track = lambda batches, name, count: batches,
) -> Features:
    """The features of the chosen images, their rows for the layers in `keep`; uses what `folder` already holds."""
    if not _complete(folder, keep):
        _extract_into(folder, source, indices, network, keep, device, batch_size, track)
    gaussians, _ = load_statistics(folder / "statistics.npz")
    return Features(gaussians, {layer: np.load(folder / f"{layer}.npy", mmap_mode="c") for layer in keep})


def _complete(folder: Path, keep: tuple[str, ...]) -> bool:
    complete = all((folder / name).exists() for name in ("statistics.npz", *(f"{layer}.npy" for layer in keep)))
    return bool(gather(complete)[0])


@torch.inference_mode()
def _extract_into(
    folder: Path,
    source: Source,
    indices: Indices,
    network: FeatureNetwork,
    keep: tuple[str, ...],
    device: torch.device,
    batch_size: int,
    track: Track,
) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    rows = _create_rows(unfinished, {layer: (len(indices), network.widths[layer]) for layer in keep})
    moments = {layer: Moments(network.widths[layer], device) for layer in SUMMED}
    pictures = _Pictures(source, indices)
    batches = _batches(pictures, batch_size, _workers(len(pictures), device))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        for places, pixels in track(batches, source.path.name, len(pictures)):
            features = network(pixels.to(device))
            for layer, sums in moments.items():
                sums.add(features[layer])
            for layer, array in rows.items():
                array[places.numpy()] = features[layer].cpu().numpy()
    for array in rows.values():
        array.flush()
    gaussians = {layer: sums.merge().gaussian() for layer, sums in moments.items()}
    barrier()
    if rank() == 0:
        save_statistics(unfinished / "statistics.npz", gaussians, network.digest)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    barrier()


def _batches(pictures: _Pictures, size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    try:
        yield from DataLoader(pictures, size, num_workers=workers)
    except UserError as error:  # a worker's comes wrapped in its traceback
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None


def _workers(count: int, device: torch.device) -> int:
    """One keeps a CPU's network fed; a GPU's takes thousands of pictures a second, a core decodes about 500."""
    if count < WORKERS_FROM:
        return 0
    return 1 if device.type == "cpu" else max(1, min(16, (os.cpu_count() or 1) // world_size() - 1))


def _create_rows(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, np.memmap[Any, Any]]:
    """One file per layer that all processes map and write to."""
    paths = {layer: folder / f"{layer}.npy" for layer in shapes}
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for layer, shape in shapes.items():
            np.lib.format.open_memmap(paths[layer], "w+", np.float32, shape).flush()
    barrier()
    return {layer: np.lib.format.open_memmap(path, "r+") for layer, path in paths.items()}


def cache_key(content: str, network: FeatureNetwork, indices: Indices) -> str:
    """Changes with the images' bytes, the choice among them, the weights, the precision and the files' format."""
    parts = (FORMAT, content, network.name, network.digest, "float32", indices.astype("<i8").tobytes().hex())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@contextmanager
def features_folder(cache: Path | None) -> Iterator[Path]:
    """`cache`/features, or without a cache a temporary folder shared by all processes."""
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
