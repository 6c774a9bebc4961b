"""Times of several candidates in one process, in shuffled order each round, and whether their ratios can be kept."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from record import record
from scipy.stats import quantile_test

SPREAD = 1.15
Run = Callable[[], Any]


class Median(NamedTuple):
    """A median of rounds with the limits of its 95 % confidence interval; NaN for fewer than six rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "too few rounds" if math.isnan(self.low) else f"95 % {self.low:.3g} to {self.high:.3g}"

    def record(self, benchmark: str, name: str, unit: str, note: str = "") -> None:
        """Append the median and its interval to results.csv, unless that is wider than 10 %, or 3 points for shares."""
        if self.high - self.low <= (3 if unit == "%" else 0.1 * self.value):
            record(benchmark, name, self.value, unit, "; ".join(filter(None, [note, str(self)])))
        else:
            print(f"VOID: {name}: {self.value:.3g} {unit}, {self}; run more rounds")


def measure(candidates: dict[str, Run], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds per candidate and round, after a warm-up, in a newly shuffled order each round.

    Of `calls` consecutive calls the last is timed: a runtime with its own threads is slowed down at first by the
    previous candidate's threads, which still spin on the cores.
    """
    order, times = random.Random(0), {name: list[float]() for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            for _ in range(calls - 1):
                candidates[name]()
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return times


def median(values: Sequence[float]) -> Median:
    """The median and its 95 % interval from order statistics, which holds for any distribution of the rounds."""
    interval = quantile_test(values, p=0.5).confidence_interval(0.95)
    return Median(statistics.median(values), float(interval.low), float(interval.high))


def ratios(times: dict[str, list[float]], slow: str, fast: str) -> list[float]:
    """How many times faster `fast` is than `slow` in every round."""
    return [a / b for a, b in zip(times[slow], times[fast], strict=True)]


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> Median:
    """The median of `ratios`."""
    return median(ratios(times, slow, fast))


def steady(times: list[float]) -> bool:
    """Whether the spread of the times of the same work is at most SPREAD. On a busy machine ratios differ too:
    its other users take caches and memory, which quantized layers need more than fp32 does."""
    low, *_, high = statistics.quantiles(times, n=10)
    if high / low > SPREAD:
        print(f"VOID: the same work varied by a factor of {high / low:.2f} (limit {SPREAD}); the machine is busy")
    return high / low <= SPREAD
