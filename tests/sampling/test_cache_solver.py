"""The solver of cache plans against enumeration of all plans, with errors from least squares on the δ themselves."""

from itertools import product

import numpy as np
import pytest

from svdit.errors import UserError
from svdit.sampling.cache_solver import GAP, Measurement, Solver

E, ROWS, SIZES = 6, (1, 2, 2, 1, 2, 1), (3, 2)


def walks(seed: int) -> np.ndarray:
    """Conditional and guided δ of both groups: slow random walks, (2, G, E, 20)."""
    return np.random.default_rng(seed).normal(size=(2, len(SIZES), E, 20)).cumsum(2)


def error(deltas: np.ndarray, effects: np.ndarray, runs: tuple[bool, ...]) -> float:
    """Of one group (2, E, 20), by the definition."""
    total, latest = 0.0, list[int]()
    for i, run in enumerate(runs):
        if run:
            latest = [i, *latest[:1]]
            continue
        if ROWS[latest[0]] < ROWS[i]:
            return np.inf
        basis = deltas[ROWS[i] - 1, [j for j in latest if ROWS[j] >= ROWS[i]]].T
        target = deltas[ROWS[i] - 1, i]
        left = target - basis @ np.linalg.lstsq(basis, target, rcond=None)[0]
        total += float(np.linalg.norm(left)) * effects[i] ** 0.5
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_the_best_there_is(seed: int) -> None:
    deltas, effects = walks(seed), np.random.default_rng(seed + 10).uniform(0.1, 2, (len(SIZES), E))
    solver = Solver(Measurement(deltas @ deltas.transpose(0, 1, 3, 2), effects, ROWS, SIZES))
    patterns = [(True, *rest) for rest in product((False, True), repeat=E - 1)]
    costs = [sum(row for row, run in zip(ROWS, runs, strict=True) if run) for runs in patterns]
    options = [
        [(cost * size, error(deltas[:, g], effects[g], runs)) for runs, cost in zip(patterns, costs, strict=True)]
        for g, size in enumerate(SIZES)
    ]
    plans = np.array([(a + b, x + y) for (a, x), (b, y) in product(*options)])
    assert solver.total == plans[:, 0].max() == 45
    for budget in range(10, 46):
        affordable = plans[plans[:, 0] <= budget, 1]
        if np.isinf(affordable.min()):
            with pytest.raises(UserError, match="too high; the maximum is"):
                solver.solve(solver.total / budget)
            continue
        choice = solver.solve(solver.total / budget)
        assert choice.error == pytest.approx(affordable.min(), rel=1e-5, abs=1e-6)
        ran = [tuple(x == "1" for x in runs) for runs in choice.runs]
        spent = sum(size * costs[patterns.index(runs)] for runs, size in zip(ran, SIZES, strict=True))
        assert spent == choice.cost <= budget
        assert sum(error(deltas[:, g], effects[g], runs) for g, runs in enumerate(ran)) == pytest.approx(
            choice.error, rel=1e-5, abs=1e-6
        )


def test_coefficients_are_those_of_least_squares() -> None:
    deltas = walks(5)
    solver = Solver(Measurement(deltas @ deltas.transpose(0, 1, 3, 2), np.ones((2, E)), ROWS, SIZES))
    first, second = solver.groups[0].coefficients("110110")
    (conditional, guided) = deltas[:, 0]
    alone = float(guided[2] @ guided[1] / (guided[1] @ guided[1]))  # evaluation 0 has no unconditional half
    assert first == pytest.approx((alone, 0.0), rel=1e-5)
    both = np.linalg.lstsq(conditional[[4, 3]].T, conditional[5], rcond=None)[0]
    assert second == pytest.approx(tuple(both), rel=1e-5)


def test_every_group_runs_at_least_every_gap() -> None:
    length = 3 * GAP
    deltas = np.random.default_rng(0).normal(size=(2, 1, length, 4))
    solver = Solver(Measurement(deltas @ deltas.transpose(0, 1, 3, 2), np.ones((1, length)), (1,) * length, (1,)))
    assert max(map(len, solver.solve(length / 3).runs[0].split("1"))) == GAP - 1
    with pytest.raises(UserError, match="a speed-up of 97 is too high; the maximum is 32"):
        solver.solve(97)
