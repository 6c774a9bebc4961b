"""Times of several candidates in one process, in shuffled order each round, and whether the machine was quiet."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

SPREAD = 1.15
Run = Callable[[], Any]


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


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: median of per-round ratios."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def steady(times: list[float]) -> bool:
    """Whether the spread of the times of the same work is at most SPREAD."""
    low, *_, high = statistics.quantiles(times, n=10) if len(times) > 2 else times
    if high / low > SPREAD:
        print(f"VOID: the same work varied by a factor of {high / low:.2f} (limit {SPREAD}); the machine is busy")
    return high / low <= SPREAD
