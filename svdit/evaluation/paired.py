"""Distances of each generated image to its full-precision counterpart of the same seed.

PSNR = 10 log₁₀ 255² / mean (a-b)²          at most 100 dB, the value of identical pairs
pooled PSNR: the same of the mean over all pairs; a mean of decibels hides few bad pairs among many good ones
SSIM   Wang et al. 2004: Gaussian window 11, σ 1.5, valid positions only, population covariance, mean over channels
relative L2 = |a - b| / |b|                 over pixels in [-1, 1]
LPIPS  Zhang et al. 2018, arXiv 1801.03924, VGG16 backbone through torch-fidelity; papers often quote AlexNet's,
       which has other values. Its two weight files must be in torch hub's checkpoints folder; never downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svdit.distributed import gather, rank, shard
from svdit.errors import UserError
from svdit.evaluation.features import full_precision
from svdit.evaluation.jackknife import Blocks, Estimate, Estimates
from svdit.evaluation.sources import ImageSet
from svdit.extras import require
from svdit.images import Pixels
from svdit.progress import progress
from svdit.storage import pickles

Distance = Callable[[Pixels, Pixels], float]
Scores = npt.NDArray[np.float64]

PSNR_CAP = 100.0
OF_ALL_PAIRS = ("psnr_pooled", "identical_pairs")  # keys without a value of each pair
WINDOW, SIGMA = 11, 1.5
SMALLEST = {"ssim": WINDOW, "lpips": 16}  # height and width; VGG16 halves images four times
LPIPS_URLS = (
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
)


def pair_scores(
    fake: ImageSet, other: ImageSet, distances: Mapping[str, Distance], show_progress: bool = False
) -> dict[str, Scores]:
    """Each distance of each pair, (N,), on every process. Image n of `fake` belongs to image n of `other`.

    The processes share the pairs.
    """
    scores = np.zeros((len(distances), fake.count), np.float32)
    mine = shard(fake.count)
    with full_precision(), progress("comparing", show_progress and rank() == 0, "pairs") as update:
        for done, n in enumerate(mine):
            a, b = fake.read(n), other.read(n)
            scores[:, n] = [distance(a, b) for distance in distances.values()]
            update(done + 1, len(mine))
    return dict(zip(distances, np.stack(gather(scores)).sum(0, np.float64), strict=True))


def paired_metrics(scores: Mapping[str, Scores], blocks: Blocks) -> Estimates:
    """Means over pairs of the distances (N,) by name, the pooled PSNR, and the number of identical pairs."""
    estimates = {name: _mean(values, blocks) for name, values in scores.items()}
    for name, size in SMALLEST.items():
        if name in scores and np.isnan(scores[name]).any():
            estimates[name] = Estimate(None, reason=f"images must be at least {size}×{size}")
    identical = scores["relative_l2"] == 0
    squares = _mean(np.where(identical, 0, 255**2 * 10 ** (-scores["psnr"] / 10)), blocks)
    pooled = [_decibels(square or 0) for square in (squares.value, *squares.leave_out)]
    estimates["psnr_pooled"] = Estimate(pooled[0], tuple(pooled[1:]))
    estimates["identical_pairs"] = Estimate(float(identical.sum()))
    return estimates


def _mean(scores: Scores, blocks: Blocks) -> Estimate:
    sums, sizes = np.bincount(blocks, scores), np.bincount(blocks)
    if len(sizes) < 2:
        return Estimate(float(scores.mean()))
    leave_out = (scores.sum() - sums) / (len(scores) - sizes)
    return Estimate(float(scores.mean()), tuple(leave_out.tolist()))


def psnr(a: Pixels, b: Pixels) -> float:
    """PSNR in dB of two uint8 (H, W, 3) images."""
    return _decibels(float(np.square(a.astype(np.float64) - b).mean()))


def _decibels(square: float) -> float:
    """The PSNR of a mean squared error."""
    return PSNR_CAP if square == 0 else min(PSNR_CAP, float(10 * np.log10(255**2 / square)))


def relative_l2(a: Pixels, b: Pixels) -> float:
    """|a - b| / |b| over pixels scaled to [-1, 1], where no uint8 level is zero."""
    x, y = (pixels.astype(np.float64) / 127.5 - 1 for pixels in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def ssim(a: Pixels, b: Pixels) -> float:
    """SSIM of two uint8 (H, W, 3) images; NaN for those smaller than SMALLEST."""
    if min(a.shape[:2]) < SMALLEST["ssim"]:
        return float("nan")
    x, y = (torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1) for pixels in (a, b))
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))  # (3, H - 10, W - 10) each
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean())


def _blur(x: Tensor) -> Tensor:
    """(A, B, H, W) to (A, B, H - 10, W - 10); sums of shifted images are five times as fast as conv2d in float64."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device="cpu") - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    first, *others = (weights / weights.sum()).tolist()
    for dim in (2, 3):
        size = x.shape[dim] - WINDOW + 1
        blurred = first * x.narrow(dim, 0, size)
        for start, weight in enumerate(others, 1):
            blurred.add_(x.narrow(dim, start, size), alpha=weight)
        x = blurred
    return x


def load_lpips(device: torch.device) -> Distance:
    """LPIPS on `device`, NaN for images smaller than SMALLEST.

    Raises UserError if a weight file is missing or contains code.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for url in LPIPS_URLS:
        _check_weights(folder / url.rsplit("/", 1)[1], url)
    network = require("torch_fidelity.sample_similarity_lpips").SampleSimilarityLPIPS("lpips-vgg16").to(device)

    @torch.inference_mode()
    def distance(a: Pixels, b: Pixels) -> float:
        if min(a.shape[:2]) < SMALLEST["lpips"]:
            return float("nan")
        pair = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).to(device)
        return float(network(pair[:1], pair[1:]))

    return distance


def _check_weights(path: Path, url: str) -> None:
    if not path.is_file():
        raise UserError(f"LPIPS needs {path}, which does not exist; download it from {url}, or omit lpips")
    try:
        pickles.load(path)
    except UserError as error:
        reason = str(error).removeprefix(f"{path} ").rpartition("; ")[0]
        raise UserError(f"{path} is not a weights file ({reason}); download {url} again") from None
