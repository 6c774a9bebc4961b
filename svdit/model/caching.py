"""Feature caching: a plan of the blocks that run at each evaluation of a trajectory, and its application.

A group of consecutive blocks adds δ = x_out − x_in to the residual stream. Where the plan skips the group, a δ' + b δ''
takes its place, of the last two evaluations that ran it, δ' the later one: a = 1, b = 0 reuses features, a + b = 1
extrapolates them. This acts on each image by itself, so images do not depend on the batch.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

from torch import Tensor

from svdit.errors import UserError
from svdit.model.config import DiTConfig

Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]  # a model: images, times and labels to its output
Pair = tuple[float, float]


class Blocks(Protocol):
    """What a model's forward pass runs its blocks through."""

    def runs(self, i: int) -> bool:
        """Whether this evaluation runs block i."""

    def block(self, i: int, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens (N, L + T, D) behind block i, which `run` computes, possibly in place."""


@dataclass(frozen=True)
class CachePlan:
    """`runs[g][n]` is "1" where evaluation n runs group g; `coefficients[g]` has (a, b) of its other evaluations.

    `groups` has the first block of each group, `sampling` the settings of the trajectories that the plan is for, and
    `record` what was measured.
    """

    groups: tuple[int, ...]
    runs: tuple[str, ...]
    coefficients: tuple[tuple[Pair, ...], ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError for a plan that no model can follow."""
        pairs = tuple(tuple((a, b) for a, b in group) for group in self.coefficients)
        object.__setattr__(self, "coefficients", pairs)
        if not 0 < len(self.groups) == len(self.runs) == len(pairs):
            raise UserError("each group of a cache plan needs runs and coefficients")
        if any(type(first) is not int for first in self.groups) or list(self.groups) != sorted({0, *self.groups}):
            raise UserError(f"the groups of a cache plan start at {self.groups}, not at ascending blocks from 0 on")
        for runs, group in zip(self.runs, pairs, strict=True):
            if type(runs) is not str or set(runs) - set("01") or runs[:1] != "1" or len(runs) != len(self.runs[0]):
                raise UserError("each group of a cache plan runs first, and has as many evaluations as the others")
            if len(group) != runs.count("0") or not all(type(x) is float and isfinite(x) for p in group for x in p):
                raise UserError("each evaluation that a cache plan skips needs two finite coefficients")
            once = len(runs.removeprefix("1").partition("1")[0])
            if any(b for _, b in group[:once]):
                raise UserError("a cache plan extrapolates a group that ran only once")

    def check(self, config: DiTConfig) -> None:
        """Raises UserError where the groups are not those of a model."""
        if self.groups[-1] >= config.depth:
            raise UserError(f"a group of the cache plan starts at block {self.groups[-1]} of {config.depth}")
        if config.context_tokens and config.context_start not in self.groups:
            raise UserError(f"no group of the cache plan starts at block {config.context_start}, which adds tokens")


class Cache:
    """A plan in one generation: the number of the evaluation, and the latest two δ of each group, newest first."""

    def __init__(self, plan: CachePlan, depth: int) -> None:
        self.plan, self.ends, self.evaluation = plan, (*plan.groups[1:], depth), -1
        self.latest: list[list[Tensor]] = [[] for _ in plan.groups]

    def advance(self) -> None:
        """Begin the next evaluation. Raises UserError after the plan's last one."""
        self.evaluation += 1
        if self.evaluation == len(self.plan.runs[0]):
            raise UserError(
                f"the cache plan is for {self.evaluation} evaluations of the model, and sampling needs more"
            )

    def runs(self, i: int) -> bool:
        """Whether this evaluation runs block i."""
        return self.plan.runs[self.group(i)][self.evaluation] == "1"

    def group(self, i: int) -> int:
        """The group of block i."""
        return bisect_right(self.plan.groups, i) - 1

    def block(self, i: int, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens (N, L + T, D) behind block i, which `run` computes, possibly in place."""
        g = self.group(i)
        first = i == self.plan.groups[g]
        if not self.runs(i):
            return x + self.predicted(g, len(x)) if first else x
        kept = "0" in self.plan.runs[g][self.evaluation :]
        if first and kept:
            self.latest[g] = [x.clone(), *self.latest[g][:1]]
        x = run(x)
        if i + 1 == self.ends[g] and kept:
            self.latest[g][0] = x - self.latest[g][0]
        return x

    def predicted(self, g: int, N: int) -> Tensor:
        """a δ' + b δ'' of group g, (N, L + T, D): with guidance the first half of the rows is conditional.

        Raises UserError where guidance begins, since the unconditional half has no earlier δ.
        """
        a, b = self.plan.coefficients[g][self.plan.runs[g][: self.evaluation].count("0")]
        newest, *older = (delta[:N] for delta in self.latest[g])
        if len(newest) < N or (b and len(older[0]) < N):
            raise UserError("the cache plan skips blocks where guidance begins; run `svdit cache` again")
        return a * newest + b * older[0] if b else a * newest


def cached(model: Callable[..., Tensor], plan: CachePlan, depth: int) -> Evaluate:
    """A model (N, C, H, W) → (N, C or 2C, H, W) that follows the plan for one generation."""
    cache = Cache(plan, depth)

    def evaluate(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        cache.advance()
        return model(x, t, y, cache)

    return evaluate
