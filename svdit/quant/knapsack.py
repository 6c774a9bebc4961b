"""One option per layer for the least total error within a size: a multiple-choice knapsack.

Sizes are rounded up to 1/RESOLUTION of the largest; for those dynamic programming is exact.
"""

from typing import NamedTuple

import numpy as np

from svdit.quant.config import Recipe

RESOLUTION = 1 << 14


class Option(NamedTuple):
    """One way to store a layer."""

    recipe: Recipe
    nbytes: int
    error: float  # added to the squared norm of the model's output error

    @property
    def bits(self) -> int:
        """Bits per weight of the residual."""
        assert self.recipe.weight is not None
        return self.recipe.weight.bits


def frontier(options: list[Option]) -> list[Option]:
    """The options that no smaller one equals or beats, by size."""
    best, kept = float("inf"), []
    for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
        if option.error < best:
            best = option.error
            kept.append(option)
    return kept


class Table:
    """Dynamic programming over layers: the least error for every size up to the largest useful one."""

    def __init__(self, choices: list[list[Option]]) -> None:
        self.choices = choices
        total = sum(options[-1].nbytes for options in choices)
        self.unit = max(1, -(-total // RESOLUTION))
        self.sizes = [[-(-o.nbytes // self.unit) for o in options] for options in choices]
        width = sum(sizes[-1] for sizes in self.sizes) + 1
        least = np.full(width, np.inf)
        least[0] = 0.0
        self.picked: list[np.ndarray[tuple[int], np.dtype[np.int16]]] = []
        for options, sizes in zip(choices, self.sizes, strict=True):
            after, picked = np.full(width, np.inf), np.full(width, -1, np.int16)
            for i, (option, size) in enumerate(zip(options, sizes, strict=True)):
                error = np.full(width, np.inf)
                error[size:] = least[: width - size] + option.error
                better = error < after
                after[better], picked[better] = error[better], i
            least = after
            self.picked.append(picked)
        self.least = least

    def solve(self, nbytes: int) -> list[int]:
        """Indices of the options of the least total error within `nbytes`; all 0 if only the rounding exceeds it."""
        at = int(self.least[: nbytes // self.unit + 1].argmin())
        if np.isinf(self.least[at]):
            return [0] * len(self.choices)
        picks: list[int] = []
        for picked, sizes in zip(reversed(self.picked), reversed(self.sizes), strict=True):
            picks.append(int(picked[at]))
            at -= sizes[picks[-1]]
        return picks[::-1]

    def curve(self) -> list[tuple[int, float]]:
        """(bytes, error) of every total that no smaller one equals or beats, by size."""
        best = np.minimum.accumulate(self.least)
        steps = np.flatnonzero(np.isfinite(best) & (best < np.concatenate([[np.inf], best[:-1]])))
        return [(int(s) * self.unit, float(best[s])) for s in steps]
