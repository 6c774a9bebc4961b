"""Precision, recall, density and coverage from nearest neighbours, in tiles: memory does not grow with N².

    precision  share of generated images inside the ball of some real image      (Kynkäänniemi et al. 2019, k = 3)
    recall     share of real images inside the ball of some generated image
    density    mean over k of the number of real balls around a generated image  (Naeem et al. 2020, k = 5)
    coverage   share of real balls that contain a generated image

A ball's radius is the distance to its centre's k-th neighbour, the centre excluded; its boundary is included, but for
rounding: the same pair may be a last digit farther apart among generated and real images than among real ones alone.
Distances are float32; ADM's evaluator uses float16, which shifts precision by about +0.001 and recall by +0.002.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from svdit.evaluation.jackknife import Blocks, Estimate, Estimates

K_PRECISION, K_DENSITY = 3, 5
ROWS, COLUMNS = 1024, 4096


def neighbour_metrics(
    real: Tensor, fake: Tensor, blocks: Blocks | None = None, rows: int = ROWS, columns: int = COLUMNS
) -> Estimates:
    """The four metrics of (N, D) features; `blocks` (N_fake,) adds leave-one-block-out values, except for recall.

    Those of recall would need every radius among the generated images K times. Raises ValueError for small sets.
    """
    if min(len(real), len(fake)) <= K_DENSITY:
        raise ValueError(f"needs more than {K_DENSITY} images on both sides, found {len(real)} and {len(fake)}")
    small, large = radii(real, (K_PRECISION, K_DENSITY), rows, columns)
    (reach,) = radii(fake, (K_PRECISION,), rows, columns)
    blocks = np.zeros(len(fake), np.int64) if blocks is None else blocks
    block_of, sizes = (torch.from_numpy(x).to(fake.device) for x in (blocks, np.bincount(blocks)))
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    balls = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    # images of each block inside each real ball
    inside = torch.zeros(len(sizes), len(real), dtype=torch.float32, device=real.device)
    for i, j, distance in _tiles(fake, real, rows, columns):
        precise[i] |= (distance <= small[j]).any(1)
        recalled[j] |= (distance <= reach[i, None]).any(0)
        within = distance <= large[j]
        balls[i] += within.sum(1)
        inside[:, j] = inside[:, j].index_add(0, block_of[i], within.float())
    covered = inside.sum(0)
    return {
        "precision": _mean(precise.double(), block_of, sizes),
        "recall": Estimate(recalled.double().mean().item()),
        "density": _mean(balls / K_DENSITY, block_of, sizes),
        "coverage": _estimate((covered > 0).double().mean(), ((covered - inside) > 0).double().mean(1)),
    }


def radii(x: Tensor, ks: tuple[int, ...], rows: int = ROWS, columns: int = COLUMNS) -> list[Tensor]:
    """(N,) distances from each row of x (N, D) to its k-th nearest other row, for each k."""
    most = max(ks) + 1  # the nearest row is the row itself
    nearest = torch.full((len(x), most), torch.inf, dtype=x.dtype, device=x.device)
    for i, _, distance in _tiles(x, x, rows, columns):
        nearest[i] = torch.cat([nearest[i], distance], 1).topk(most, 1, largest=False).values
    return [nearest[:, k] for k in ks]


def _tiles(a: Tensor, b: Tensor, rows: int, columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
    for top in range(0, len(a), rows):
        for left in range(0, len(b), columns):
            i, j = slice(top, top + rows), slice(left, left + columns)
            yield i, j, torch.cdist(a[i], b[j])


def _mean(values: Tensor, block_of: Tensor, sizes: Tensor) -> Estimate:
    """The mean of (N,) values; `sizes` (K,) counts the images of each block."""
    sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add(0, block_of, values)
    return _estimate(values.mean(), (sums.sum() - sums) / (len(values) - sizes))


def _estimate(value: Tensor, leave_out: Tensor) -> Estimate:
    return Estimate(value.item(), tuple(leave_out.tolist()) if len(leave_out) > 1 else ())
