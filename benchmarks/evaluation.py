"""Evaluation against `torch_fidelity.calculate_metrics`, in one run on the same images and the same random weights.

    python benchmarks/evaluation.py                      everything; appends to results.csv
    python benchmarks/evaluation.py --quick --dry        a smoke test; writes nothing

Network: images per second of torch-fidelity's extractor (batch 64, its default) and of ours, interleaved, best of the
rounds. Job: wall time of FID, KID, IS, precision and recall for two sets; ours adds sFID, density, coverage, MIND and
all standard errors. Trace: the Fréchet distance of two full-rank 2048-wide Gaussians, and of one of 1000 images.
Memory: the peak of precision and recall for 50 000 × 10 000 features, in a process of its own.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import record

from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.frechet import jackknifed_distance
from svdit.evaluation.inception import Extractor, load_extractor, random_extractor
from svdit.evaluation.neighbours import neighbour_metrics
from svdit.evaluation.options import Options
from svdit.evaluation.statistics import Gaussian
from svdit.extras import require

torch_fidelity = require("torch_fidelity")

Say = Callable[[str, float, str, str], None]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=1000)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--quick", action="store_true", help="few images, small matrices")
    p.add_argument("--dry", action="store_true", help="print, do not append to results.csv")
    p.add_argument("--only", choices=PARTS, help="one part")
    p.add_argument("--peak", nargs=2, type=int, metavar="N", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peak:
        print(peak_of_neighbours(*args.peak))
        return
    if args.quick:
        args.images, args.size, args.rounds = 32, 64, 1

    def say(name: str, value: float, unit: str, note: str = "") -> None:
        if args.dry:
            print(f"{name:40} {value:12.5g} {unit:10} {note}", flush=True)
        else:
            record("evaluation", name, value, unit, note)

    for name, part in PARTS.items():
        if args.only in (None, name):
            part(args, say)


def make_images(n: int, size: int, seed: int) -> np.ndarray:
    """uint8 (n, size, size, 3): coarse random colours with fine noise, which PNG decodes at a realistic speed."""
    stream = np.random.RandomState(seed)
    coarse = stream.randint(0, 256, (n, 8, 8, 3)).repeat(size // 8, 1).repeat(size // 8, 2)
    return np.clip(coarse + stream.randn(n, size, size, 3) * 12, 0, 255).astype(np.uint8)


def write(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    return folder


def weights(folder: Path) -> Path:
    torch.save(random_extractor(fast=False).network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def ours(path: Path) -> Extractor:
    return load_extractor(torch.load(path), "benchmark")


@torch.inference_mode()
def network(args: argparse.Namespace, say: Say) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = weights(Path(folder))
        network = require("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        stock = network("stock", ["2048", "logits_unbiased"], str(path))
        fast = ours(path)
    n = 32 if args.quick else 128
    images = torch.from_numpy(make_images(n, args.size, 0)).permute(0, 3, 1, 2).contiguous()
    speeds: dict[str, float] = {"stock": 0.0, "ours": 0.0}
    for _ in range(args.rounds):
        for name, model, batch in (("stock", stock, 64), ("ours", fast, 32)):
            started = time.perf_counter()
            for part in images.split(batch):
                model(part)
            speeds[name] = max(speeds[name], n / (time.perf_counter() - started))
    note = f"{n} images of {args.size} px, best of {args.rounds} interleaved rounds"
    say("network_torch_fidelity", speeds["stock"], "images/s", note)
    say("network_ours", speeds["ours"], "images/s", note)
    say("network_ratio", speeds["ours"] / speeds["stock"], "x", note)


def job(args: argparse.Namespace, say: Say) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = weights(root)
        sets = [write(root / name, make_images(args.images, args.size, i)) for i, name in enumerate(("real", "fake"))]
        started = time.perf_counter()
        theirs = torch_fidelity.calculate_metrics(
            input1=str(sets[1]), input2=str(sets[0]), cuda=torch.cuda.is_available(), verbose=False, cache=False,
            fid=True, isc=True, kid=True, prc=True, isc_splits=1, kid_subset_size=min(1000, args.images),
            feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path),
        )  # fmt: skip
        between = time.perf_counter()
        model = ours(path)
        report = evaluate(*sets, model, Options(("fid", "sfid", "kid", "is", "prc", "mind")))
        ended = time.perf_counter()
    note = f"{args.images} against {args.images} PNG of {args.size} px"
    say("job_torch_fidelity", between - started, "s", f"{note}; FID, KID, IS, precision, recall")
    say("job_ours", ended - between, "s", f"{note}; and sFID, density, coverage, MIND, errors")
    say("job_ratio", (between - started) / (ended - between), "x", note)
    fid = report.metrics["fid"].value or 0.0
    say("job_fid_difference", fid - theirs["frechet_inception_distance"], "", f"of {fid:.6g}, ours minus theirs")


def best(rounds: int, function: Callable[[], float]) -> tuple[float, float]:
    """The least seconds of all rounds, and the value."""
    least = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        value = function()
        least = min(least, time.perf_counter() - started)
    return least, value


def trace(args: argparse.Namespace, say: Say) -> None:
    D = 256 if args.quick else 2048
    stock = require("torch_fidelity.metric_fid").fid_statistics_to_metric
    mix = np.random.RandomState(0).randn(D, D) / np.arange(1, D + 1) ** 0.5
    for n, name in ((3 * D, "full_rank"), (D * 1000 // 2048, "1000_images")):
        x, y = ((np.random.RandomState(i).randn(m, D) @ mix + i).astype(np.float32) for i, m in enumerate((3 * D, n)))
        a, b = (Gaussian(z.mean(0, np.float64), np.cov(z, rowvar=False, dtype=np.float64), len(z)) for z in (x, y))
        stats = [{"mu": g.mean, "sigma": g.covariance} for g in (a, b)]
        one = np.zeros(n, np.int64)

        def theirs(stats: list[dict[str, np.ndarray]] = stats) -> float:
            return stock(*stats, False)["frechet_inception_distance"]

        def ours(a: Gaussian = a, b: Gaussian = b, y: np.ndarray = y, one: np.ndarray = one) -> float:
            return jackknifed_distance(Gaussian(a.mean, a.covariance, a.count), b, y, one)[0]

        def ours_cached(a: Gaussian = a, b: Gaussian = b, y: np.ndarray = y, one: np.ndarray = one) -> float:
            return jackknifed_distance(a, b, y, one)[0]

        assert a.root.rank == D
        (slow, expected), (cold, value), (warm, _) = (best(args.rounds, f) for f in (theirs, ours, ours_cached))
        note = f"D = {D}, best of {args.rounds}"
        say(f"trace_torch_fidelity_{name}", slow, "s", note)
        say(f"trace_ours_{name}", cold, "s", note)
        say(f"trace_ours_cached_root_{name}", warm, "s", note)
        say(f"trace_ratio_{name}", slow / cold, "x", note)
        say(f"trace_ratio_cached_root_{name}", slow / warm, "x", note)
        say(f"trace_difference_{name}", value - expected, "", f"of {expected:.6g}, ours minus theirs")


def memory(args: argparse.Namespace, say: Say) -> None:
    fakes, reals = (500, 100) if args.quick else (50_000, 10_000)
    command = [sys.executable, __file__, "--peak", str(fakes), str(reals)]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    note = f"{fakes} × {reals} features of 2048, float32, features included"
    say("neighbours_peak", float(words[0]), "GiB", f"{note}; above the libraries alone")
    say("neighbours_time", float(words[1]), "s", note)


def peak_of_neighbours(fakes: int, reals: int) -> str:
    """Peak memory above that of the imports, in GiB, and seconds."""
    before = peak_memory()
    stream = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 2048, generator=stream) for n in (reals, fakes))
    started = time.perf_counter()
    neighbour_metrics(real, fake, np.arange(fakes) % 20)
    seconds = time.perf_counter() - started
    return f"{(peak_memory() - before) / 2**20} {seconds}"


def peak_memory() -> int:
    """Peak memory of this program in KiB; getrusage would include that of the parent process."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


PARTS: dict[str, Callable[[argparse.Namespace, Say], None]] = {
    "network": network,
    "job": job,
    "trace": trace,
    "memory": memory,
}

if __name__ == "__main__":
    main()
