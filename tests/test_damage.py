"""One flipped bit in any file that a run reads: refused with a sentence, computed again with a warning, or harmless.

python tests/test_damage.py N prints the table of docs/architecture.md for N flips per kind of file.
"""

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pixels import draw, interrupt_at, pixel_model

from svdit.checkpoints.store import load_model, save_model
from svdit.errors import UserError
from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.features import Extraction, extract
from svdit.evaluation.inputs import open_set
from svdit.evaluation.options import Options
from svdit.evaluation.report import read_report
from svdit.evaluation.statistics import save_statistics
from svdit.evaluation.stream import Stream
from svdit.images import list_images, read_image, write_png
from svdit.kernels.cpu import build
from svdit.quant.config import rank_ratio_config
from svdit.quant.quantize import quantize_
from svdit.storage.checksum import digest
from svdit.storage.manifest import read_manifest
from svdit.storage.npz import map_npz
from svdit.training.state import fresh, restore_, save

Use = Callable[[], object]  # reads the file and returns everything that it determines
CPU = torch.device("cpu")


def checkpoint(folder: Path, suffix: str) -> tuple[Path, Use]:
    path, model = folder / f"q{suffix}", pixel_model()
    quantize_(model, rank_ratio_config(0.5, 8))
    save_model(model, path, name="tiny", provenance={"source": "s"})
    return path, lambda: digest({"config": str(load_model(path).config)}, load_model(path).state_dict())


def partial(folder: Path) -> tuple[Path, Use]:
    def use() -> object:
        model = pixel_model()
        report = quantize_(model, config, work_dir=folder)
        return digest({"layers": [str(line) for line in report.layers]}, model.state_dict())

    config = rank_ratio_config(0.5, 8)
    use()
    return folder / "blocks.0.attn.proj.safetensors", use


def last(folder: Path) -> tuple[Path, Use]:
    model = pixel_model()
    state = fresh(model, lr=0.1)
    model.final_layer.linear.weight.grad = torch.ones_like(model.final_layer.linear.weight)
    state.optimizer.step()
    state.step = 7
    save(state, folder / "last.pt", {"seed": 3})

    def use() -> object:
        again = fresh(pixel_model(), lr=0.1)
        restore_(again, folder / "last.pt", {"seed": 3})
        moments = {str(k): v["exp_avg"] for k, v in again.optimizer.state_dict()["state"].items()}
        tensors = {**again.model.state_dict(), **{f"ema {k}": v for k, v in again.ema.state_dict().items()}, **moments}
        return digest({"step": again.step, "seconds": again.seconds}, tensors)

    return folder / "last.pt", use


class Network:
    """Features in no time."""

    name, digest, comparable = "inception", "tiny", True
    widths = {"pool": 16, "spatial": 12, "logits": 5}  # noqa: RUF012

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = pixels.double().flatten(1)[:, :16].float()
        return {name: x[:, :width] for name, width in self.widths.items()}

    def to(self, device: torch.device) -> "Network":
        return self


def image_npz(folder: Path) -> tuple[Path, Use]:
    path = folder / "images.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))

    def use() -> object:
        images = open_set(path, Options())
        return [images.read(i).tobytes() for i in range(images.count)]

    return path, use


def features(folder: Path, name: str) -> tuple[Path, Use]:
    path, _ = image_npz(folder)

    def use() -> object:
        result = extract(images, Network(), ("pool",), Extraction(folder / "cache", CPU))
        gaussians = [(g.mean.tobytes(), g.covariance.tobytes(), g.count) for g in result.gaussians.values()]
        return gaussians, result.rows["pool"].tobytes()

    images = open_set(path, Options())
    use()
    return next((folder / "cache").glob(f"*/{name}")), use


def statistics(folder: Path) -> tuple[Path, Use]:
    path, _ = image_npz(folder)
    result = extract(open_set(path, Options()), Network(), ("pool",), Extraction(folder, CPU))
    save_statistics(folder / "stats.npz", result.gaussians, "abc", features=result.rows["pool"])

    def use() -> object:
        source = open_set(folder / "stats.npz", Options()).source
        gaussians = [(g.mean.tobytes(), g.covariance.tobytes(), g.count) for g in source.gaussians.values()]
        return gaussians, source.extractor, None if source.rows is None else source.rows.tobytes()

    return folder / "stats.npz", use


def sample_set(folder: Path, name: str) -> tuple[Path, Use]:
    def use() -> object:
        array = map_npz(draw(folder / "set", count=3))
        pixels = [read_image(path).tobytes() for path in list_images(folder / "set")]
        return array.tobytes(), pixels, (folder / "set" / "manifest.json").read_bytes()

    use()
    return folder / name, use


def shard(folder: Path) -> tuple[Path, Use]:
    def use() -> object:
        array = map_npz(draw(folder / "set", count=3, sink="tar"))
        images = open_set(folder / "set", Options())
        return array.tobytes(), [images.read(i).tobytes() for i in range(3)], images.source.labels

    use()
    return folder / "set" / "000000.tar", use


def finished_batch(folder: Path) -> tuple[Path, Use]:
    """Of an interrupted run, which is completed elsewhere."""
    with pytest.raises(KeyboardInterrupt):
        draw(folder / "set", count=3, batch_size=2, sink="npz", progress=interrupt_at(2.5))

    def use() -> object:
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copytree(folder / "set", Path(temporary) / "set")
            return map_npz(draw(Path(temporary) / "set", count=3, sink="npz")).tobytes()

    return next((folder / "set" / ".parts").iterdir()), use


def only_npz(folder: Path) -> tuple[Path, Use]:
    def use() -> object:
        return map_npz(draw(folder / "set", count=3, sink="npz")).tobytes()

    use()
    return folder / "set.npz", use


def streamed(folder: Path) -> tuple[Path, Use]:
    real, _ = image_npz(folder)

    def use() -> object:
        report = draw(
            folder / "set", count=3, sink=Stream(real, Network(), Options(("fid", "is", "paired"), paired=real))
        )
        return report.metrics, report.inputs, report.images["grid_fake"].tobytes()

    use()
    return next((folder / "set" / "features").iterdir()), use


def manifest(folder: Path) -> tuple[Path, Use]:
    """As `evaluate` reads it."""
    draw(folder / "set", count=3)

    def use() -> object:
        source = open_set(folder / "set", Options()).source
        return [source.manifest.get(key) for key in written], source.labels

    written = read_manifest(folder / "set" / "manifest.json")
    assert written
    return folder / "set" / "manifest.json", use


def image(folder: Path) -> tuple[Path, Use]:
    """As `evaluate` reads it."""
    path = folder / "1.png"
    write_png(path, np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    write_png(folder / "2.png", read_image(path))

    def use() -> object:
        images = open_set(folder, Options())
        return [images.read(i).tobytes() for i in range(2)]

    return path, use


def metrics(folder: Path) -> tuple[Path, Use]:
    """As `compare` reads them."""
    path, _ = image_npz(folder)
    evaluate(None, path, options=Options(("paired",), paired=path)).save(folder)
    written = read_report(folder).keys() - {"sha256"}
    return folder / "metrics.json", lambda: [read_report(folder).get(key) for key in written]


def library(folder: Path) -> tuple[Path, Use]:
    whole = Path(build.library()._name).read_bytes()
    path = folder / f"{build.source_hash()}-{build.sha256(build.library()._name)}.so"
    path.write_bytes(whole)
    path.chmod(0o600)

    def use() -> object:
        intact = build._intact(folder)
        return whole if intact is None else intact.read_bytes()  # None: compiled again

    return path, use


KINDS: dict[str, Callable[[Path], tuple[Path, Use]]] = {
    "checkpoint .safetensors": lambda folder: checkpoint(folder, ".safetensors"),
    "checkpoint .pt": lambda folder: checkpoint(folder, ".pt"),
    "OUTPUT.partial": partial,
    "last.pt": last,
    "feature cache, statistics": lambda folder: features(folder, "statistics.npz"),
    "feature cache, rows": lambda folder: features(folder, "pool.npy"),
    "statistics (`--save-stats`)": statistics,
    "images .npz (`evaluate`)": image_npz,
    "images .npz (`sample_ddp`)": lambda folder: sample_set(folder, "set.npz"),
    "image (`sample_ddp`)": lambda folder: sample_set(folder, "set/000001.png"),
    "shard (`sample_ddp --tar`)": shard,
    "finished batch (`sample_ddp --tar`, `--no-png`)": finished_batch,
    "images .npz (`sample_ddp --no-png`)": only_npz,
    "features (`sample_ddp --evaluate`)": streamed,
    "manifest.json (`sample_ddp`)": lambda folder: sample_set(folder, "set/manifest.json"),
    "manifest.json (`evaluate`)": manifest,
    "image (`evaluate`)": image,
    "metrics.json (`compare`)": metrics,
    "compiled kernels": library,
}


def flips(size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """(position, bit): half in the first and last 600 bytes, where the structure is, half anywhere."""
    draws = random.Random(seed)
    edges = [*range(min(size, 600)), *range(max(0, size - 600), size)]
    positions = [draws.choice(edges) if i % 2 else draws.randrange(size) for i in range(count)]
    return [(position, 1 << draws.randrange(8)) for position in positions]


def outcomes(kind: str, folder: Path, count: int) -> Counter[str]:
    """What became of `count` flips. Raises whatever is no sentence."""
    path, use = KINDS[kind](folder / "whole")
    content, expected, results = path.read_bytes(), use(), Counter[str]()
    saved = folder / "saved"
    shutil.copytree(folder / "whole", saved)
    for position, bit in flips(len(content), count, seed=len(kind)):
        damaged = bytearray(content)
        damaged[position] ^= bit
        path.write_bytes(damaged)
        with contextlib.redirect_stderr(io.StringIO()) as messages:
            try:
                right = use() == expected
            except UserError as error:
                results["refused" if "\n" not in str(error) else "several lines"] += 1
            else:
                warned = "warning: " in messages.getvalue()
                results[("recomputed" if warned else "harmless") if right else f"wrong at {position}, {bit}"] += 1
        shutil.rmtree(folder / "whole")
        shutil.copytree(saved, folder / "whole")
    return results


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_changes_a_result(tmp_path: Path, kind: str, count: int) -> None:
    (tmp_path / "whole").mkdir()
    results = outcomes(kind, tmp_path, count)
    assert set(results) <= {"refused", "recomputed", "harmless"}
    assert results["harmless"] < count / 2


if __name__ == "__main__":
    columns = ("refused", "recomputed", "harmless")
    print("| file | flips | refused | recomputed | harmless | wrong |\n|---|---:|---:|---:|---:|---:|")
    for kind in sys.argv[2:] or KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "whole").mkdir()
            results = outcomes(kind, Path(temporary), int(sys.argv[1]))
        cells = [results.total(), *(results.pop(column, 0) for column in columns), results.total()]
        print("|", " | ".join(map(str, [kind, *cells])), "|", *results, flush=True)
