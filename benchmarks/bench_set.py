"""Sets of real size without a model: memory over time, and the share of time that is left to the sampler.

    python benchmarks/bench_set.py memory [FORM …]      # 50 000 images of 256 px, needs 20 GB of disk, minutes per form
    python benchmarks/bench_set.py writers [FORM …]     # a sampler that waits as for a GPU, 25 batches of 32

Forms: png, tar, npz, and for memory features, which is `--evaluate` with FID and IS against 10 000 images. Everything
is `generate_dataset` but the sampler, whose images are smooth noise that PNG compresses to 110 kB, about as
photographs, and the network, whose features are random. Memory is what the process holds itself (anonymous pages) and,
with files that it maps, in total.
"""

import csv
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import record

from svdit.evaluation.options import Options
from svdit.evaluation.stream import Stream
from svdit.files import sha256
from svdit.images import Pixels
from svdit.model.dit import DiT, DiTConfig
from svdit.sampling import dataset
from svdit.sampling.batch import SamplingConfig
from svdit.sampling.sinks import SINKS
from svdit.storage.npz import map_npz

SIZE, IMAGES = 256, 50_000
GPU_SECONDS = 2.5  # for a batch of 32: 0.8 PFLOP of DDIM 50 with guidance at 300 TFLOP/s
OVER_TIME = Path(__file__).with_name("memory_over_time.csv")


class Sampler:
    """In place of `generate_images`: images that depend on the labels, after a wait."""

    def __init__(self, seconds: float) -> None:
        stream = np.random.RandomState(0)
        coarse = [Image.fromarray(stream.randint(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(16)]
        grain = stream.randint(-6, 7, (SIZE, SIZE, 3))
        smooth = [np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int) for image in coarse]
        self.images = np.stack([(image + grain).clip(0, 255).astype(np.uint8) for image in smooth])
        self.seconds, self.busy, self.turns, self.ended = seconds, 0.0, 0, 0.0

    def __call__(self, model: DiT, labels: Sequence[int], *rest: Any, **options: Any) -> Pixels:
        """uint8 (N, 256, 256, 3)"""
        start = time.perf_counter()
        time.sleep(self.seconds * len(labels) / 32)
        self.turns += 1
        batch = np.roll(self.images[np.array(labels) % len(self.images)], self.turns, axis=1)
        self.ended = time.perf_counter()
        self.busy += self.ended - start
        return batch


class Network:
    """In place of Inception: features of its widths, of 256 random directions."""

    name, digest, comparable = "random", "of the benchmark", False

    def __init__(self) -> None:
        self.widths = {"pool": 2048, "spatial": 2023, "logits": 1008}
        self.stream = torch.Generator().manual_seed(0)
        self.mix = torch.randn(256, sum(self.widths.values()), generator=self.stream) / 16

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 (N, 3, H, W) to features (N, D) by layer."""
        features = torch.randn(len(pixels), 256, generator=self.stream) @ self.mix
        return dict(zip(self.widths, features.relu().split(list(self.widths.values()), 1), strict=True))


def stream(folder: Path) -> Stream:
    """The sink of `--evaluate`."""
    np.savez(folder / "real.npz", arr_0=np.random.RandomState(0).randint(0, 256, (10_000, 8, 8, 3), dtype=np.uint8))
    return Stream(folder / "real.npz", Network(), Options(("fid", "is")))


def memory() -> tuple[int, int]:
    """Anonymous and total resident memory in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) // 1024, int(fields["VmRSS"].split()[0]) // 1024


@contextmanager
def watched(rows: list[tuple[float, int, int, float]], done: list[float]) -> Iterator[None]:
    """Notes time, memory and images done every second."""
    end, start = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not end.wait(1):
            rows.append((round(time.perf_counter() - start, 1), *memory(), done[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    end.set()
    thread.join()


def draw(form: str, folder: Path, count: int, sampler: Sampler, done: list[float]) -> None:
    """The set of `count` images, in `folder`/set."""
    dataset.generate_images = sampler  # type: ignore[assignment]
    model = DiT(DiTConfig(input_size=SIZE, patch_size=32, in_channels=3, hidden_size=32, depth=1, num_heads=2))

    def progress(images: float, total: int) -> None:
        done[0] = images

    config = SamplingConfig("ddim", "ddim50", 1.5)
    sink = stream(folder) if form == "features" else form
    dataset.generate_dataset(model, folder / "set", count, config, batch_size=32, sink=sink, progress=progress)


def measure_memory(form: str) -> None:
    """A set of 50 000 images: peaks, times, and the array."""
    rows: list[tuple[float, int, int, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        before, done, start = memory(), [0.0], time.perf_counter()
        with watched(rows, done):
            draw(form, Path(temporary), IMAGES, Sampler(0), done)
        seconds, npz = time.perf_counter() - start, Path(temporary) / "set.npz"
        if form != "features":
            assert map_npz(npz).shape == (IMAGES, SIZE, SIZE, 3)
            record("set", f"{form}, size of the .npz", npz.stat().st_size / 1e9, "GB", f"sha256 {sha256(npz)[:12]}")
    drawn = next(row[0] for row in rows if row[3] == IMAGES)
    note = (
        f"{IMAGES} images of {SIZE} px, {before[0]} MB before; {seconds:.0f} s, of which {drawn:.0f} s for the batches"
    )
    record("set", f"{form}, peak of own memory", max(row[1] for row in rows), "MB", note)
    record("set", f"{form}, peak of memory with mapped files", max(row[2] for row in rows), "MB", note)
    new = not OVER_TIME.exists()
    with OVER_TIME.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("form", "second", "own memory, MB", "with mapped files, MB", "images")] if new else [])
        writer.writerows((form, *row) for row in rows[:: max(1, len(rows) // 40)])


def measure_writers(form: str) -> None:
    """The share of the time from the first batch to the last in which the sampler works."""
    sampler, start = Sampler(GPU_SECONDS), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        draw(form, Path(temporary), 25 * 32, sampler, [0.0])
    share = sampler.busy / (sampler.ended - start)
    record("set", f"{form}, share of the sampler", 100 * share, "%", f"25 batches of 32, {GPU_SECONDS} s each")


if __name__ == "__main__":
    what, *forms = sys.argv[1:]
    for form in forms or SINKS:
        {"memory": measure_memory, "writers": measure_writers}[what](form)
