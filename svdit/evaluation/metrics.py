"""From features to numbers: FID and sFID, FID∞, KID, Inception Score, MIND; the neighbour metrics have their own file.

Where torch-fidelity's function is right it is called, with its seed (2020), so its users find their numbers again.
Rows are float32 (N, D), in the order of the source; `blocks` (N,) asks for leave-one-block-out values.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svdit.evaluation.frechet import TILE, Blocks, Rows, frechet_distance, jackknifed_distance
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.statistics import Gaussian, Moments
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402

SEED = 2020  # torch-fidelity's default
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS, IS_SPLIT_SIZE = 10, 5000
INFINITY_POINTS, INFINITY_START = 15, 2000
MIND_PROJECTIONS = 1000


def frechet(reference: Gaussian, fake: Gaussian, rows: Rows, blocks: Blocks) -> Estimate:
    """FID or sFID, by which layer is given; `rows` are the features that `fake` sums up."""
    value, *leave_out = jackknifed_distance(reference, fake, rows, blocks)
    return Estimate(value, tuple(leave_out))


def fid_infinity(reference: Gaussian, rows: Rows, start: int = INFINITY_START) -> Estimate:
    """FID at 1/N = 0: a line through 15 subset sizes (Chong and Forsyth 2020, arXiv 1911.07023), nested subsets."""
    n = len(rows)
    if n < 2 * start:
        raise ValueError(f"needs at least {2 * start} images for its line, found {n}")
    order = np.random.RandomState(SEED).permutation(n)
    sizes = np.linspace(max(start, n // 10), n, INFINITY_POINTS).astype(int)
    sums, values, taken = Moments(rows.shape[1]), [], 0
    for size in sizes:
        sums.add(torch.from_numpy(rows[np.sort(order[taken:size])]))
        values.append(frechet_distance(reference, sums.gaussian()))
        taken = size
    return Estimate(float(np.polyfit(1 / sizes, values, 1)[1]))


def inception_score(logits: Rows, blocks: Blocks) -> dict[str, Estimate]:
    """exp E KL(p(y|x) | p(y)), averaged over shuffled splits of about 5000 images, at most 10, at least 1.

    The shuffle matters: files in class order would score 62 instead of 298. `is_std` is the spread over splits.
    """
    n = len(logits)
    order = np.random.RandomState(SEED).permutation(n)
    count = max(1, min(IS_SPLITS, n // IS_SPLIT_SIZE))
    splits = [order[i * n // count : (i + 1) * n // count] for i in range(count)]
    scores = [isc_features_to_metric(torch.from_numpy(logits[s]), 1, False)["inception_score_mean"] for s in splits]
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


def kernel_distance(real: Tensor, fake: Tensor, blocks: Blocks) -> dict[str, Estimate]:
    """KID, kernel (x·y/D + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401), in its two estimates.

    `kid`: mean over 100 subsets of at most 1000 images, as usually quoted; `kid_std` is the spread over subsets, not
    an error. `kid_full`: the unbiased statistic of all pairs, without random numbers, with a standard error.
    """
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    subsets = kid_features_to_metric(fake.cpu(), real.cpu(), **options)
    return {
        "kid": Estimate(subsets["kernel_inception_distance_mean"]),
        "kid_std": Estimate(subsets["kernel_inception_distance_std"]),
        "kid_full": _kernel_statistic(real, fake, blocks),
    }


def _kernel_statistic(real: Tensor, fake: Tensor, blocks: Blocks) -> Estimate:
    one = np.zeros(len(real), np.int64)
    size = np.bincount(blocks).astype(np.float64)  # (K,)
    within = _kernel_sums(fake, fake, blocks, blocks)  # (K, K)
    across = _kernel_sums(fake, real, blocks, one)[:, 0]  # (K,)
    among = _kernel_sums(real, real, one, one)[0, 0] / (len(real) * (len(real) - 1))

    def statistic(n: float, pairs: float, crossed: float) -> float:
        return float(pairs / (n * (n - 1)) + among - 2 * crossed / (n * len(real)))

    value = statistic(len(fake), within.sum(), across.sum())
    pairs_left = within.sum() - within.sum(0) - within.sum(1) + within.diagonal()
    left = zip(len(fake) - size, pairs_left, across.sum() - across, strict=True)
    return Estimate(value, tuple(statistic(*sums) for sums in left) if len(size) > 1 else ())


def _kernel_sums(a: Tensor, b: Tensor, blocks_a: Blocks, blocks_b: Blocks) -> npt.NDArray[np.float64]:
    """Sums of k(x, y) over the pairs of each two blocks, (K_a, K_b); a set with itself leaves i = j out."""
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
    """(N, K), one where image n is in block k."""
    return torch.eye(K, dtype=torch.float64)[torch.from_numpy(blocks)]


def monge_distance(real: Tensor, fake: Tensor) -> Estimate:
    """MIND: 3 D times the squared 2-Wasserstein distance averaged over 1000 random directions (arXiv 2605.06797).

    The larger set is cut to the smaller by a seeded choice, as torch-fidelity does (seed, order of draws and all).
    """
    stream, n, D = torch.Generator().manual_seed(SEED), min(len(real), len(fake)), real.shape[1]
    fake, real = (_subset(x, n, stream) for x in (fake, real))
    directions = torch.randn(MIND_PROJECTIONS, D, generator=stream)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(real.device)
    total = 0.0
    for part in directions.split(100):
        gap = (fake @ part.T).sort(0).values - (real @ part.T).sort(0).values
        total += gap.double().square().mean(0).sum().item()
    return Estimate(3.0 * D * total / MIND_PROJECTIONS)


def _subset(x: Tensor, n: int, stream: torch.Generator) -> Tensor:
    return x if len(x) == n else x[torch.randperm(len(x), generator=stream)[:n].to(x.device)]
