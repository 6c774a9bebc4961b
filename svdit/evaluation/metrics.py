"""METRICS, the table of metrics, and the functions behind it: FID, sFID, FID∞, KID, Inception Score, MIND.

A new metric is one entry of METRICS. Where torch-fidelity 0.4.0 has a metric, its function is called with its default
seed, 2020, so the numbers agree. Rows are float32 (N, D) in the order of the source; `blocks` (N,) are the blocks
that leave-one-block-out values leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svdit.evaluation.features import Features
from svdit.evaluation.frechet import TILE, frechet_distance, jackknifed_distance
from svdit.evaluation.jackknife import Blocks, Estimate, Estimates
from svdit.evaluation.neighbours import neighbour_metrics
from svdit.evaluation.paired import OF_ALL_PAIRS, Distance, load_lpips, psnr, relative_l2, ssim
from svdit.evaluation.rows import Rows
from svdit.evaluation.statistics import Gaussian, Moments
from svdit.extras import require
from svdit.progress import Update, counted

SEED = 2020
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS, IS_SPLIT_SIZE = 10, 5000
INFINITY_POINTS, INFINITY_START = 15, 2000
MIND_PROJECTIONS = 1000
RANDOM = "random_"  # prefix of keys computed with random features


@dataclass(frozen=True)
class Data:
    """The input of a metric: features of both sets, the block of each generated image (N,), and the device."""

    real: Features
    fake: Features
    blocks: Blocks
    device: torch.device

    def pool(self) -> tuple[Tensor, Tensor]:
        """Pool features of the real and of the generated images, (N, 2048) each."""
        real, fake = (torch.from_numpy(np.asarray(f.rows["pool"])).to(self.device) for f in (self.real, self.fake))
        return real, fake


@dataclass(frozen=True)
class Metric:
    """One name of `--metrics`. It has either `compute`, from features, or `distances`, from pairs of images.

    headline: the key of `metrics.json` that must have a value for the metric to count as available.
    compute: estimates by key. distances: by key, a function of the device that returns a distance of two images.
    needs: what the real set must have: "pool statistics", "spatial statistics" or "pool rows".
    biased: tables also show the value without the bias of few images.
    in_comparison: the keys that `svdit compare` shows by default. higher: the keys whose higher values are better.
    on_request: measured only if named.
    """

    headline: str
    compute: Callable[[Data], Estimates] | None = None
    distances: Mapping[str, Callable[[torch.device], Distance]] = field(default_factory=dict)
    needs: str = ""
    biased: bool = False
    in_comparison: tuple[str, ...] = ()
    higher: tuple[str, ...] = ()
    on_request: bool = False

    def __post_init__(self) -> None:
        if (self.compute is None) != bool(self.distances):
            raise ValueError(f"{self.headline} needs either compute or distances")


METRICS: dict[str, Metric] = {
    "fid": Metric(
        "fid", lambda d: {"fid": frechet(d, "pool")}, needs="pool statistics", biased=True, in_comparison=("fid",)
    ),
    "sfid": Metric(
        "sfid",
        lambda d: {"sfid": frechet(d, "spatial")},
        needs="spatial statistics",
        biased=True,
        in_comparison=("sfid",),
    ),
    "kid": Metric(
        "kid", lambda d: kernel_distance(*d.pool(), d.blocks), needs="pool rows", in_comparison=("kid_full",)
    ),
    "is": Metric(
        "is",
        lambda d: inception_score(d.fake.rows["logits"], d.blocks),
        biased=True,
        in_comparison=("is",),
        higher=("is",),
    ),
    "prc": Metric(
        "precision",
        lambda d: neighbour_metrics(*d.pool(), d.blocks),
        needs="pool rows",
        in_comparison=("precision", "recall"),
        higher=("precision", "recall", "density", "coverage"),
    ),
    "mind": Metric("mind", lambda d: {"mind": monge_distance(*d.pool())}, needs="pool rows"),
    "fid_inf": Metric(
        "fid_inf",
        lambda d: {"fid_inf": fid_infinity(d.real.gaussians["pool"], d.fake.rows["pool"])},
        needs="pool statistics",
    ),
    "paired": Metric(
        "psnr",
        distances={"psnr": lambda device: psnr, "ssim": lambda device: ssim, "relative_l2": lambda device: relative_l2},
        in_comparison=("psnr", "psnr_pooled", "ssim"),
        higher=("psnr", "ssim", *OF_ALL_PAIRS),
    ),
    "lpips": Metric("lpips", distances={"lpips": load_lpips}, in_comparison=("lpips",), on_request=True),
}


def compute_metrics(names: Sequence[str], data: Data, update: Update = lambda done, total: None) -> Estimates:
    """The estimates of the named metrics; an unavailable metric has an empty one under its name, with the reason."""
    gaussians, rows = data.real.gaussians, data.real.rows
    available = {"", *(f"{layer} statistics" for layer in gaussians), *(f"{layer} rows" for layer in rows)}
    estimates: Estimates = {}
    for name in counted(names, len(names), update):
        metric = METRICS[name]
        layer, _, kind = metric.needs.partition(" ")
        try:
            if metric.needs in available and metric.compute is not None:
                estimates |= metric.compute(data)
            elif kind == "statistics":
                raise ValueError(f"the reference has no statistics of the {layer} features")
            else:
                raise ValueError("the reference has statistics only, no images")
        except ValueError as error:
            estimates[name] = Estimate(None, reason=str(error))
    return estimates


def frechet(data: Data, layer: str) -> Estimate:
    """FID ("pool") or sFID ("spatial"). With fewer than twice as many images as features its bias is not c/N."""
    gaussian, rows = data.fake.gaussians[layer], data.fake.rows[layer]
    distances = jackknifed_distance(data.real.gaussians[layer], gaussian, rows, data.blocks)
    return Estimate(distances[0], tuple(distances[1:]), enough=len(rows) >= 2 * rows.shape[1])


def fid_infinity(reference: Gaussian, rows: Rows, start: int = INFINITY_START) -> Estimate:
    """FID at 1/N = 0: a line through 15 nested subsets (Chong and Forsyth 2020, arXiv 1911.07023).

    Raises ValueError for fewer than 2 `start` images.
    """
    n = len(rows)
    if n < 2 * start:
        raise ValueError(f"needs at least {2 * start} images for its line, found {n}")
    order = np.random.RandomState(SEED).permutation(n)
    sizes = np.linspace(max(start, n // 10), n, INFINITY_POINTS).astype(int)
    sums, values = Moments(rows.shape[1]), []
    for previous, size in zip([0, *sizes], sizes, strict=False):
        sums.add(torch.from_numpy(rows[np.sort(order[previous:size])]))
        values.append(frechet_distance(reference, sums.gaussian()))
    return Estimate(float(np.polyfit(1 / sizes, values, 1)[1]))


def inception_score(logits: Rows, blocks: Blocks) -> Estimates:
    """exp E KL(p(y|x) | p(y)) of logits (N, 1008), averaged over shuffled splits of about 5000 images, 1 to 10 splits.

    The shuffle matters: files sorted by class would score 62 instead of 298. `is_std` is the spread over splits.
    """
    isc = require("torch_fidelity.metric_isc").isc_features_to_metric
    n = len(logits)
    order = np.random.RandomState(SEED).permutation(n)
    count = max(1, min(IS_SPLITS, n // IS_SPLIT_SIZE))
    splits = [order[i * n // count : (i + 1) * n // count] for i in range(count)]
    scores = [isc(torch.from_numpy(logits[s]), 1, False)["inception_score_mean"] for s in splits]
    K = int(blocks.max()) + 1
    left = np.mean([_scores_without_blocks(logits[s], blocks[s], K) for s in splits], axis=0) if K > 1 else np.empty(0)
    spread = {"is_std": Estimate(float(np.std(scores)))} if count > 1 else {}
    return {"is": Estimate(float(np.mean(scores)), tuple(left.tolist())), **spread}


def _scores_without_blocks(logits: Rows, blocks: Blocks, K: int) -> npt.NDArray[np.float64]:
    """(K,) scores of one split, each without one block, from sums over the blocks."""
    members = _memberships(blocks, K)
    log_p = torch.from_numpy(logits).double().log_softmax(1)
    p = log_p.exp()
    kept = len(logits) - members.sum(0)  # (K,)
    marginal = (p.sum(0) - members.T @ p) / kept[:, None]  # (K, 1008)
    entropy = (p * log_p).sum(1)
    entropy_kept = (entropy.sum() - members.T @ entropy) / kept
    scores: npt.NDArray[np.float64] = (entropy_kept - torch.xlogy(marginal, marginal).sum(1)).exp().numpy()
    return scores


def kernel_distance(real: Tensor, fake: Tensor, blocks: Blocks) -> Estimates:
    """KID of (N, D) features, kernel (x·y/D + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401), in two estimates.

    `kid`: the mean over 100 subsets of at most 1000 images, as usually quoted; `kid_std`, the spread over subsets, is
    not an error bar. `kid_full`: the unbiased statistic of all pairs, deterministic, with a standard error.
    """
    kid = require("torch_fidelity.metric_kid").kid_features_to_metric
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    subsets = kid(fake.cpu(), real.cpu(), **options)
    return {
        "kid": Estimate(subsets["kernel_inception_distance_mean"]),
        "kid_std": Estimate(subsets["kernel_inception_distance_std"]),
        "kid_full": _kernel_statistic(real, fake, blocks),
    }


def _kernel_statistic(real: Tensor, fake: Tensor, blocks: Blocks) -> Estimate:
    single = np.zeros(len(real), np.int64)
    size = np.bincount(blocks).astype(np.float64)  # (K,)
    within = _kernel_sums(fake, fake, blocks, blocks)  # (K, K)
    across = _kernel_sums(fake, real, blocks, single)[:, 0]  # (K,)
    among = _kernel_sums(real, real, single, single)[0, 0] / (len(real) * (len(real) - 1))

    def statistic(n: float, pairs: float, crossed: float) -> float:
        return float(pairs / (n * (n - 1)) + among - 2 * crossed / (n * len(real)))

    value = statistic(len(fake), within.sum(), across.sum())
    pairs_left = within.sum() - within.sum(0) - within.sum(1) + within.diagonal()
    left = zip(len(fake) - size, pairs_left, across.sum() - across, strict=True)
    return Estimate(value, tuple(statistic(*sums) for sums in left) if len(size) > 1 else ())


def _kernel_sums(a: Tensor, b: Tensor, blocks_a: Blocks, blocks_b: Blocks) -> npt.NDArray[np.float64]:
    """Sums of k(x, y) over the pairs of every two blocks, (K_a, K_b); within one set i = j is left out."""
    in_a, in_b = (_memberships(blocks, blocks.max() + 1).to(a.device) for blocks in (blocks_a, blocks_b))
    sums = torch.zeros(in_a.shape[1], in_b.shape[1], dtype=torch.float64, device=a.device)
    for i in range(0, len(a), TILE):
        for j in range(0, len(b), TILE):
            base = (a[i : i + TILE] @ b[j : j + TILE].T).double().div_(a.shape[1]).add_(1)
            kernel = base.square().mul_(base)
            if a is b and i == j:
                kernel.fill_diagonal_(0)
            sums += in_a[i : i + TILE].T @ (kernel @ in_b[j : j + TILE])
    return sums.cpu().numpy()


def _memberships(blocks: Blocks, K: int) -> Tensor:
    """(N, K), 1 where image n is in block k."""
    return torch.eye(K, dtype=torch.float64, device="cpu")[torch.from_numpy(blocks)]


def monge_distance(real: Tensor, fake: Tensor) -> Estimate:
    """MIND of (N, D) features (Berthet et al. 2026, arXiv 2605.06797): 3 D E W₂² over 1000 random directions.

    The larger set is cut to the smaller one by a seeded choice. torch-fidelity 0.4.0 does not have MIND; seed and
    order of the random draws are those of its development branch (metric_mind.py).
    """
    stream, n, D = torch.Generator("cpu").manual_seed(SEED), min(len(real), len(fake)), real.shape[1]
    fake, real = (_subset(x, n, stream) for x in (fake, real))
    directions = torch.randn(MIND_PROJECTIONS, D, generator=stream, dtype=torch.float32, device="cpu")
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(real.device)
    total = 0.0
    for part in directions.split(100):
        gap = (fake @ part.T).sort(0).values - (real @ part.T).sort(0).values
        total += gap.double().square().mean(0).sum().item()
    return Estimate(3.0 * D * total / MIND_PROJECTIONS)


def _subset(x: Tensor, n: int, stream: torch.Generator) -> Tensor:
    chosen = torch.randperm(len(x), generator=stream, device="cpu")[:n] if len(x) > n else None
    return x if chosen is None else x[chosen.to(x.device)]
