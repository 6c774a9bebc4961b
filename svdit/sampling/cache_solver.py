"""The cache plan of the least predicted error within a budget of block evaluations, by dynamic programming.

An evaluation i that skips a group has δ_i replaced by a δ_j + b δ_k, where j > k are the last two evaluations that ran
the group. (a, b) minimize the squared error over the calibration images, which follows from the inner products of the
δ alone. Its root times the group's effect is its share of the error of the final images; shares of one trajectory point
in similar directions and add up, as ‖Σ e‖ ≤ Σ ‖e‖. So the best runs of a group depend on the last j and k only, and
groups share the budget, a multiple-choice knapsack. Both are exact, for groups that run at least every GAP-th time.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from svdit.errors import UserError
from svdit.model.caching import Pair

Array = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

GAP = 32  # evaluations from one run of a group to the next, at most
RIDGE = 1e-9  # of the squared norms, on the normal equations
NONE = -1  # in place of k, before a second run


@dataclass(frozen=True)
class Measurement:
    """What is known of G groups and E evaluations; `rows` is 2 for an evaluation with guidance, else 1.

    `products[0]` has the inner products of the conditional δ, `products[1]` of the guided ones, summed over images;
    `effects` the squared change of the final images per squared error of δ; `sizes` the cost of each group.
    """

    products: Array  # (2, G, E, E)
    effects: Array  # (G, E)
    rows: tuple[int, ...]
    sizes: tuple[int, ...]


class Group:
    """The best runs of one group for each cost, counted in evaluations of one row."""

    def __init__(self, measurement: Measurement, g: int) -> None:
        self.rows, self.E = np.array(measurement.rows), len(measurement.rows)
        self.products, self.effects = measurement.products[:, g], measurement.effects[g]
        self._solve()

    def skip(self, i: Indices, j: Indices, k: Indices) -> tuple[Array, Array, Array]:
        """a, b and the error from skipping i after j and, before it, k; infinite where guidance begins."""
        kind = self.rows[i] - 1
        ii, ij, jj = (self.products[kind, x, y] for x, y in ((i, i), (i, j), (j, j)))
        ik, jk, kk = (self.products[kind, x, y] for x, y in ((i, k), (j, k), (k, k)))
        both = (k != NONE) & (self.rows[k] >= self.rows[i])
        A, D = (x + RIDGE * (jj + kk) + 1e-30 for x in (jj, kk))
        det = A * D - jk**2
        a = np.where(both, (D * ij - jk * ik) / det, ij / A)
        b = np.where(both, (A * ik - jk * ij) / det, 0.0)
        squares = ii - 2 * (a * ij + b * ik) + a**2 * jj + 2 * a * b * jk + b**2 * kk
        error = np.sqrt(squares.clip(0) * self.effects[i])
        return a, b, np.where(self.rows[j] >= self.rows[i], error, np.inf)

    def _solve(self) -> None:
        """`least[e, d]` (cost): the least error up to e if e runs (or is the end), and e − d is the run before it."""
        E, width = self.E, int(self.rows.sum()) + 1
        self.least = np.full((E + 1, GAP + 1, width), np.inf)
        self.before = np.zeros((E + 1, GAP + 1, width), np.int8)  # the d of the run before
        self.least[0, 0, self.rows[0]] = 0
        for j in range(E):
            spans = self._spans(j)
            for gap in range(1, min(GAP, E - j) + 1):
                total = self.least[j] + spans[:, gap - 1, None]  # (d, cost)
                best = total.argmin(0)
                cost = self.rows[j + gap] if j + gap < E else 0
                size = width - cost
                self.least[j + gap, gap, cost:] = total[best, np.arange(width)][:size]
                self.before[j + gap, gap, cost:] = best[:size]
        self.error = self.least[E].min(0)

    def _spans(self, j: int) -> Array:
        """The error of skipping no, one, two … evaluations after j, if the run before it was j − d: (d, GAP)."""
        k = np.array([NONE, *(j - d for d in range(1, min(GAP, j) + 1))])[:, None]
        i = np.arange(j + 1, min(j + GAP, self.E))[None]
        error = self.skip(*np.broadcast_arrays(i, j, k))[2].cumsum(1)
        spans = np.full((GAP + 1, GAP), np.inf)
        spans[: len(k), 0] = 0
        spans[: len(k), 1 : 1 + error.shape[1]] = error
        return spans

    def runs(self, cost: int) -> str:
        """The best runs of exactly this cost."""
        e, d, ran = self.E, int(self.least[self.E, :, cost].argmin()), set[int]()
        while e > 0:
            before = int(self.before[e, d, cost])
            cost -= int(self.rows[e]) if e < self.E else 0
            e, d = e - d, before
            ran.add(e)
        return "".join("1" if i in ran else "0" for i in range(self.E))

    def coefficients(self, runs: str) -> tuple[Pair, ...]:
        """(a, b) of every evaluation that `runs` skips."""
        pairs, latest = list[Pair](), (NONE, NONE)
        for i, run in enumerate(runs):
            if run == "1":
                latest = (i, latest[0])
            else:
                a, b, _ = self.skip(*(np.array(n) for n in (i, *latest)))
                pairs.append((float(a), float(b)))
        return tuple(pairs)


@dataclass(frozen=True)
class Choice:
    """The runs and coefficients of every group, their cost, and the predicted ‖error‖ of the calibration images."""

    runs: tuple[str, ...]
    coefficients: tuple[tuple[Pair, ...], ...]
    error: float
    cost: int


class Solver:
    """The best choices for any speed-up of one measurement."""

    def __init__(self, measurement: Measurement) -> None:
        self.sizes, self.evaluations = measurement.sizes, sum(measurement.rows)
        self.groups = [Group(measurement, g) for g in range(len(self.sizes))]
        self.unit = gcd(*self.sizes)
        self.least = [np.zeros(1)]  # error by cost, of the first groups
        self.picked: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        for group, size in zip(self.groups, self.sizes, strict=True):
            self._add(group, size // self.unit)

    @property
    def total(self) -> int:
        """The cost of running everything."""
        return sum(self.sizes) * self.evaluations

    def _add(self, group: Group, size: int) -> None:
        before = self.least[-1]
        after = np.full(len(before) + size * self.evaluations, np.inf)
        picked = np.zeros(len(after), np.int32)
        for cost in np.flatnonzero(np.isfinite(group.error)):
            part = slice(cost * size, cost * size + len(before))
            total = before + group.error[cost]
            better = total < after[part]
            after[part][better], picked[part][better] = total[better], cost
        self.least.append(after)
        self.picked.append(picked)

    def solve(self, speedup: float) -> Choice:
        """The least predicted error that costs at most 1/speedup of everything. Raises UserError if nothing does."""
        errors = self.least[-1][: int(self.total / speedup * (1 + 1e-12)) // self.unit + 1]
        at = int(errors.argmin())
        if np.isinf(errors[at]):
            most = self.total / (int(np.isfinite(self.least[-1]).argmax()) * self.unit)
            raise UserError(f"a speed-up of {speedup:g} is too high; the maximum is {most:.4g}")
        cost, error, runs = at * self.unit, float(errors[at]), list[str]()
        for group, size, picked in zip(self.groups[::-1], self.sizes[::-1], self.picked[::-1], strict=True):
            runs.append(group.runs(int(picked[at])))
            at -= int(picked[at]) * size // self.unit
        runs.reverse()
        pairs = tuple(group.coefficients(run) for group, run in zip(self.groups, runs, strict=True))
        return Choice(tuple(runs), pairs, error, cost)
