"""Plans chosen by the images of the quantized model: the predicted errors of layers order plans only roughly.

`measure` quantizes a model by a plan and returns the PSNR in dB of its images to those of full precision.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from svdit.errors import UserError
from svdit.quant.budget import Plan, Planner

TRIES = 6
CLOSE = 0.2  # dB above the target that are not worth another try
NEAR = 1.01  # ratio of two sizes between which no other is tried
SLOPES = 0.5, 2.0  # of the PSNR over the predicted SQNR, at least and at most
Measure = Callable[[Plan], float]


class Trial(NamedTuple):
    """A plan and its PSNR in dB."""

    plan: Plan
    psnr: float


def best_within(planner: Planner, target_bytes: int, measure: Measure) -> list[Trial]:
    """Trials of different plans for a file of at most `target_bytes`, best first.

    Raises UserError for a size that is too small.
    """
    trials = [Trial(plan, measure(plan)) for plan in planner.choices(target_bytes)]
    return sorted(trials, key=lambda trial: -trial.psnr)


def smallest_reaching(planner: Planner, target_psnr: float, measure: Measure) -> list[Trial]:
    """Trials of several sizes, first the smallest file that reached `target_psnr`.

    PSNR is taken as linear in the predicted SQNR.
    Raises UserError for a target that the largest file does not reach.
    """
    sizes, sqnrs = zip(*planner.curve, strict=True)
    largest, trials, sqnr = len(sizes) - 1, dict[int, Trial](), target_psnr
    for left in reversed(range(TRIES)):
        failed = max((i for i, trial in trials.items() if trial.psnr < target_psnr), default=-1)
        passed = min((i for i, trial in trials.items() if trial.psnr >= target_psnr), default=largest + 1)
        if failed + 1 == passed or (failed >= 0 and passed <= largest and sizes[passed] <= NEAR * sizes[failed]):
            break
        at = min(max(bisect_left(sqnrs, sqnr), failed + 1), passed - 1)
        if passed > largest and not left:
            at = largest
        plan = planner.within(sizes[at])
        trials[at] = Trial(plan, measure(plan))
        if 0 <= trials[at].psnr - target_psnr <= CLOSE:
            break
        sqnr = next_sqnr({sqnrs[i]: trial.psnr for i, trial in trials.items()}, target_psnr)
    reached = [i for i, trial in trials.items() if trial.psnr >= target_psnr]
    if not reached:
        most = max(trial.psnr for trial in trials.values())
        raise UserError(
            f"{target_psnr:g} dB is too high: the images of the largest file, {sizes[-1] / 1e6:.2f} MB, have "
            f"{most:.1f} dB; choose a lower PSNR"
        )
    return [trials.pop(min(reached)), *trials.values()]


def next_sqnr(psnrs: dict[float, float], target: float) -> float:
    """The predicted SQNR to try after the PSNR of others, by the line through the two nearest to `target`.

    Between two, nearer to their middle: a line alone would creep from one end.
    """
    nearest = sorted(psnrs, key=lambda sqnr: abs(psnrs[sqnr] - target))
    above, below = ([sqnr for sqnr in nearest if (psnrs[sqnr] >= target) == side] for side in (True, False))
    first, *others = [above[0], below[0]] if above and below else nearest
    slope = (psnrs[first] - psnrs[others[0]]) / (first - others[0]) if others else 1.0
    guess = first + (target - psnrs[first]) / min(max(slope, SLOPES[0]), SLOPES[1])
    return (guess + (above[0] + below[0]) / 2) / 2 if above and below else guess
