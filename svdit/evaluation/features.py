"""One pass over the images: the network's features as float64 sums and, for the metrics that need them, as rows.

Each process handles its share of the images and writes its rows to their places in one file per layer, so rows are in
the order of the source and memory does not grow with the number of images. Results are cached under a key of content,
weights and choice, so the real set is processed once. Every run writes into a folder of its own and renames it when it
is complete; the statistics contain the hashes of the rows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svdit.distributed import barrier, gather, on_first, rank, shard, world_size
from svdit.errors import UserError, sentence
from svdit.evaluation.rows import RowFiles, Rows
from svdit.evaluation.sources import ImageSet
from svdit.evaluation.statistics import Gaussian, Moments, load_statistics, save_statistics
from svdit.files import check_zip, temporary_folder, writable_folder, writing
from svdit.printing import note, warn
from svdit.progress import progress

SUMMED = ("pool", "spatial")
FORMAT = "features 3"  # of the cached files; part of the key, so other formats are never read
WORKERS_FROM = 1000  # below this many images per process, starting workers costs more time than they save
SHARED = Path("/dev/shm")  # where workers leave their batches


class NotFiniteError(UserError):
    """Features contain NaN or Inf: the metrics of features are unavailable, others are not affected."""


class FeatureNetwork(Protocol):
    """The interface of `inception.Extractor` that `extract` uses; `to(device)`, which returns it there, is optional."""

    name: str
    digest: str
    comparable: bool
    widths: dict[str, int]

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, H, W) to features (N, D) by layer."""


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
    """The features of `images`, with rows for `layers`; taken from the cache if it has all of them.

    The first process returns them, the others return none. Cached features that are damaged are computed again, with
    a warning.
    """
    folder = how.folder / cache_key(images, network)
    features = _cached(folder, layers, warn) if rank() == 0 else None
    if not gather(features is not None)[0]:
        parent = on_first(lambda: _writable(how.folder))
        with writing(parent), private_folder(parent) as private:
            _extract_into(private, images, network, layers, how)
            on_first(images.check_unchanged)
            if rank() == 0:
                features = _load(private, layers)  # mapped, so they stay the same wherever the files go
                if parent == how.folder and _cached(folder, layers) is None:  # another run may have been faster
                    _replace(folder, private)
            barrier()
    return features or Features({}, {})


def _writable(folder: Path) -> Path:
    """`folder`; where it cannot be written, as a shared cache may be, the folder for temporary files, with a note."""
    try:
        return writable_folder(folder)
    except UserError as error:
        note(f"{str(error).partition(';')[0]}; the features of these images are not kept")
        return Path(tempfile.gettempdir())


def _cached(folder: Path, layers: tuple[str, ...], report: Callable[[str], object] = str) -> Features | None:
    """The features in `folder`; None if it does not exist, lacks layers, or is damaged, which is reported."""
    try:
        if all((folder / name).exists() for name in ("statistics.npz", *(f"{layer}.npy" for layer in layers))):
            return _load(folder, layers)
    except Exception as error:  # a damaged file can raise anything
        report(f"the cached features in {folder} are damaged ({error}); they are computed again")
    return None


def _load(folder: Path, layers: tuple[str, ...]) -> Features:
    """The features in `folder`. Raises ValueError, among others, where rows are not those of the statistics."""
    path = folder / "statistics.npz"
    check_zip(path)
    gaussians, _ = load_statistics(path)
    rows = {layer: np.load(folder / f"{layer}.npy", mmap_mode="c") for layer in layers}
    with np.load(path) as archive:
        for layer, array in rows.items():
            if str(archive[f"sha256_{layer}"]) != _hash(array):
                raise ValueError(f"{layer}.npy does not match its checksum")
    return Features({layer: gaussians[layer] for layer in SUMMED}, rows)


def _hash(rows: Rows) -> str:
    """Hex SHA-256 of type, shape and content of an array (N, D)."""
    digest = hashlib.sha256(f"{rows.dtype.str} {rows.shape}".encode())
    digest.update(rows.data)
    return digest.hexdigest()


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for all processes of this run, removed at the end."""
    with ExitStack() as stack:
        yield on_first(lambda: _inside(stack.enter_context(temporary_folder(parent))))


def _inside(temporary: Path) -> Path:
    """A folder with the permissions of the umask."""
    folder = temporary / "features"
    folder.mkdir()
    return folder


def _replace(folder: Path, private: Path) -> None:
    """Rename `private` to `folder`, instead of its earlier content; where two runs do so at once, one of them wins."""
    earlier = private.with_name(f"{private.name}.old")
    with suppress(OSError):
        if folder.exists():
            folder.rename(earlier)
        private.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 in convolutions and matrix products of the whole process, which may use it otherwise."""
    earlier = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(earlier)


@torch.inference_mode()
def _extract_into(
    folder: Path, images: ImageSet, network: FeatureNetwork, layers: tuple[str, ...], how: Extraction
) -> None:
    """Write rows and statistics into `folder`. Raises NotFiniteError, which names the images, in all processes."""
    files = RowFiles(folder, {layer: (images.count, network.widths[layer]) for layer in layers})
    moments = {layer: Moments(network.widths[layer], how.device) for layer in SUMMED}
    pixels, done, broken = _Pixels(images), 0, list[int]()
    with (
        full_precision(),
        progress(f"features of {images.source.path.name}", how.progress and rank() == 0, "images") as update,
    ):
        for places, batch in _batches(pixels, how.batch_size, _workers(pixels, how)):
            features = network(batch.to(how.device))
            broken += places[~finite(features).cpu()].tolist()
            for layer, sums in moments.items():
                sums.add(features[layer])
            for layer in layers:
                files.write(layer, places.numpy(), features[layer].cpu().numpy())
            update(done := done + len(batch), len(pixels))
    check_finite(broken, images, network)
    rows = files.read()
    gaussians = {layer: sums.merge().gaussian() for layer, sums in moments.items()}
    if rank() == 0:
        hashes = {f"sha256_{layer}": np.array(_hash(array)) for layer, array in rows.items()}
        save_statistics(folder / "statistics.npz", gaussians, network.digest, **hashes)


@torch.inference_mode()
def summarize(rows: dict[str, Rows], images: ImageSet, network: FeatureNetwork, how: Extraction) -> Features:
    """The features of the images whose rows (N, D) by layer all processes have, which share the sums.

    Raises NotFiniteError, which names the images, in all processes.
    """
    moments, broken = {layer: Moments(network.widths[layer], how.device) for layer in SUMMED}, list[int]()
    for start in range(rank() * how.batch_size, images.count, world_size() * how.batch_size):
        batch = {layer: array[start : start + how.batch_size] for layer, array in rows.items()}
        features = {layer: torch.from_numpy(array).to(how.device) for layer, array in batch.items()}
        broken += (start + np.flatnonzero(~finite(features).cpu())).tolist()
        for layer, sums in moments.items():
            sums.add(features[layer])
    check_finite(broken, images, network)
    return Features({layer: sums.merge().gaussian() for layer, sums in moments.items()}, rows)


def finite(features: dict[str, Tensor]) -> Tensor:
    """Which images have neither NaN nor Inf in any layer: (N, D) each to (N,)."""
    return torch.stack([layer.isfinite().all(1) for layer in features.values()]).all(0)


def check_finite(broken: list[int], images: ImageSet, network: FeatureNetwork) -> None:
    """Raises NotFiniteError, which names the images, on all processes if one of them has found `broken` ones."""
    if broken := sorted(n for part in gather(broken) for n in part):
        names = ", ".join(images.source.names[images.indices[n]] for n in broken[:3]) + ", ..." * (len(broken) > 3)
        problem = f"the {network.name} features of {len(broken)} of {images.count} images in {images.source.path}"
        raise NotFiniteError(f"{problem} contain NaN or Inf ({names}); check these images and the weights")


def _batches(pixels: _Pixels, size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    try:
        yield from DataLoader(pixels, size, num_workers=workers)
    except UserError as error:  # DataLoader wraps a worker's error in its traceback
        raise UserError(sentence(error)) from None


def _workers(pixels: _Pixels, how: Extraction) -> int:
    """One worker keeps a CPU busy; a GPU handles thousands of images per second, and a core decodes about 500.

    So many that their batches, of which each keeps three, fit into the shared memory, 64 MB in Docker.
    """
    if len(pixels) < WORKERS_FROM:
        return 0
    workers = 1 if how.device.type == "cpu" else max(1, min(16, (os.cpu_count() or 1) // world_size() - 1))
    if SHARED.exists():
        waiting = 3 * how.batch_size * pixels[0][1].nbytes * world_size()
        workers = min(workers, shutil.disk_usage(SHARED).free // waiting)
    return workers


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
    with private_folder(Path(tempfile.gettempdir())) as folder:
        yield folder
