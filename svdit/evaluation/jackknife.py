"""Error bars: the delete-block jackknife over the generated images.

    se² = (K-1)/K Σₖ (θ₋ₖ - θ̄)²        bias = (K-1) (θ̄ - θ)                            (Quenouille; Tukey)

θ₋ₖ leaves out block k of the generated images; the reference is fixed. Two sets of the same seeds leave out the same
images, so the jackknife of their difference is not inflated by what both share. The naive bootstrap is not offered:
it draws images twice, which biases FID by more than its spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCKS = 20
Blocks = npt.NDArray[np.int64]  # (N,), the block of each generated image


@dataclass(frozen=True)
class Estimate:
    """A value with its K leave-one-block-out values (empty: not available), or the reason why there is no value.

    `enough`: whether there are so many images that the bias of N of them is about c/N, as the jackknife assumes.
    """

    value: float | None
    leave_out: tuple[float, ...] = ()
    reason: str | None = None
    enough: bool = True

    @property
    def se(self) -> float | None:
        """The jackknife standard error."""
        if len(self.leave_out) < 2:
            return None
        K = len(self.leave_out)
        return float(np.sqrt((K - 1) * np.var(self.leave_out)))

    @property
    def bias(self) -> float | None:
        """The jackknife estimate of the bias due to the finite number of generated images; None for too few."""
        if self.value is None or len(self.leave_out) < 2 or not self.enough:
            return None
        return float((len(self.leave_out) - 1) * (np.mean(self.leave_out) - self.value))

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two sets whose n-th images share a seed, so both leave out the same blocks."""
        if self.value is None or other.value is None:
            return Estimate(None, reason=self.reason or other.reason)
        pairs = zip(self.leave_out, other.leave_out, strict=True)
        left = tuple(a - b for a, b in pairs)
        return Estimate(self.value - other.value, left, enough=self.enough and other.enough)


Estimates = dict[str, Estimate]  # by key of `metrics.json`


def assign_blocks(n: int, seed: int = 0, blocks: int = BLOCKS) -> Blocks:
    """The block, 0 … K-1, of each of n images: a seeded shuffle, because neighbours often share a class.

    Two images form a single block, which is never left out: no metric is defined for one image.
    """
    order = np.random.RandomState(seed).permutation(n)
    blocks_of = np.empty(n, np.int64)
    blocks_of[order] = np.arange(n) % (min(blocks, n) if n > 2 else 1)
    return blocks_of
