"""How sure is a number: the delete-block jackknife, and the extrapolation of FID to infinitely many images.

    se² = (K-1)/K Σₖ (θ₋ₖ - θ̄)²        bias = (K-1) (θ̄ - θ)                            (Quenouille; Tukey)

θ₋ₖ leaves block k of the generated images out; the reference is held fixed. Two sets made from the same seeds keep
their θ₋ₖ in step, so the jackknife of the difference sees only what differs. The naive bootstrap is not here: it
draws images twice, which biases FID by more than its own spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCKS = 20


@dataclass(frozen=True)
class Estimate:
    """A number, its K leave-one-block-out values (empty: not available), or the reason why there is none."""

    value: float | None
    leave_out: tuple[float, ...] = ()
    reason: str | None = None

    @property
    def se(self) -> float | None:
        """The jackknife's standard error."""
        if len(self.leave_out) < 2:
            return None
        K = len(self.leave_out)
        return float(np.sqrt((K - 1) * np.var(self.leave_out)))

    @property
    def bias(self) -> float | None:
        """The jackknife's estimate of value minus truth that is due to the number of generated images."""
        if self.value is None or len(self.leave_out) < 2:
            return None
        return float((len(self.leave_out) - 1) * (np.mean(self.leave_out) - self.value))

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two sets whose images of one place share their seed, so that both leave out the same."""
        if self.value is None or other.value is None:
            return Estimate(None, reason=self.reason or other.reason)
        pairs = zip(self.leave_out, other.leave_out, strict=True)
        return Estimate(self.value - other.value, tuple(a - b for a, b in pairs))


def assign_blocks(n: int, seed: int = 0, blocks: int = BLOCKS) -> npt.NDArray[np.int64]:
    """The block, 0 … K-1, of each of n images: a seeded shuffle, because neighbours often share a class.

    Two images are one block, which is never left out: nothing can be measured on one.
    """
    order = np.random.RandomState(seed).permutation(n)
    blocks_of = np.empty(n, np.int64)
    blocks_of[order] = np.arange(n) % (min(blocks, n) if n > 2 else 1)
    return blocks_of
