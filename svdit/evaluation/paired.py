"""How far each image is from its full-precision counterpart of the same seed; needs no weights.

PSNR = 10 log₁₀ 255² / mean (a-b)²          at most 100 dB, which identical pairs get
SSIM   Wang et al. 2004: Gaussian window 11, σ 1.5, only where it fits, population covariance, mean of channels
relative L2 = |a - b| / |b|                 over pixels in [-1, 1]
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.distributed import gather, shard
from svdit.evaluation.features import Track
from svdit.evaluation.inputs import Set
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.lpips import Distance
from svdit.images import Pixels

PSNR_CAP = 100.0
WINDOW, SIGMA = 11, 1.5


def paired_metrics(
    fake: Set, other: Set, blocks: npt.NDArray[np.int64], track: Track, lpips: Distance | None = None
) -> tuple[dict[str, Estimate], npt.NDArray[np.float64]]:
    """Averages over pairs, how many are identical, and every pair's PSNR (N,).

    Image n of one set belongs to image n of the other. The processes share the pairs.
    """
    distances = DISTANCES | ({} if lpips is None else {"lpips": lpips})
    scores = torch.zeros(len(distances), fake.count, dtype=torch.float64)
    mine = shard(fake.count)
    for n in track(mine, "pairs", len(mine)):
        a, b = fake.source.read(int(fake.indices[n])), other.source.read(int(other.indices[n]))
        scores[:, n] = torch.tensor([distance(a, b) for distance in distances.values()])
    found = dict(zip(distances, torch.stack(gather(scores)).sum(0).numpy(), strict=True))
    metrics = {name: _average(values, blocks) for name, values in found.items()}
    if np.isnan(found["ssim"]).any():
        metrics["ssim"] = Estimate(None, reason=f"images must be at least {WINDOW}×{WINDOW}")
    metrics["identical_pairs"] = Estimate(float((found["relative_l2"] == 0).sum()))
    return metrics, found["psnr"]


def _average(scores: npt.NDArray[np.float64], blocks: npt.NDArray[np.int64]) -> Estimate:
    sums, sizes = np.bincount(blocks, scores), np.bincount(blocks)
    if len(sizes) < 2:
        return Estimate(float(scores.mean()))
    leave_out = (scores.sum() - sums) / (len(scores) - sizes)
    return Estimate(float(scores.mean()), tuple(leave_out.tolist()))


def psnr(a: Pixels, b: Pixels) -> float:
    """Decibels for two uint8 (H, W, 3) images."""
    error = np.square(a.astype(np.float64) - b).mean()
    return PSNR_CAP if error == 0 else min(PSNR_CAP, float(10 * np.log10(255**2 / error)))


def relative_l2(a: Pixels, b: Pixels) -> float:
    """|a - b| / |b| in [-1, 1], where no uint8 level is zero."""
    x, y = (pixels.astype(np.float64) / 127.5 - 1 for pixels in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity of two uint8 (H, W, 3) images; NaN where the window does not fit."""
    if min(a.shape[:2]) < WINDOW:
        return float("nan")
    x, y = (torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1) for pixels in (a, b))
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))  # (3, H - 10, W - 10) each
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean())


def _window() -> Tensor:
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _blur(x: Tensor) -> Tensor:
    """(A, B, H, W) to (A, B, H - 10, W - 10)."""
    window = _window().view(1, 1, WINDOW, 1)
    blurred = F.conv2d(F.conv2d(x.view(-1, 1, *x.shape[2:]), window), window.transpose(2, 3))
    return blurred.view(*x.shape[:2], *blurred.shape[2:])


DISTANCES: dict[str, Distance] = {"psnr": psnr, "ssim": ssim, "relative_l2": relative_l2}
