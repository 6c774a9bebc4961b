"""The search for a plan by measured images: targets reached, few tries, the choice among plans of one size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdit.errors import UserError
from svdit.model.config import DiTConfig
from svdit.model.dit import DiT
from svdit.quant.budget import Plan, Planner, observed
from svdit.quant.config import RECIPES, dit_config
from svdit.quant.trials import TRIES, best_within, smallest_reaching
from svdit.sampling.calibration import calibration_loop
from tests.conftest import randomize

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(scope="module")
def model() -> DiT:
    made = randomize(DiT(CONFIG))
    assert isinstance(made, DiT)
    return made


@pytest.fixture(scope="module")
def planner(model: DiT) -> Planner:
    return observed(model, dit_config(RECIPES["w8a8"]), calibration_loop(images=6, steps=5))


@given(st.floats(0.6, 1.6), st.floats(-8, 12), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_a_target_is_reached_in_few_tries(planner: Planner, slope: float, offset: float, share: float) -> None:
    """PSNR grows with the predicted SQNR, but neither its offset nor its slope is known."""

    def measure(plan: Plan) -> float:
        return offset + slope * plan.sqnr

    low, high = (measure(planner.within(size)) for size in (planner.curve[0][0], planner.curve[-1][0]))
    target = low + share * (high - low)
    first, *others = smallest_reaching(planner, target, measure)
    assert first.psnr >= target
    assert len(others) < TRIES
    assert all(first.plan.nbytes <= trial.plan.nbytes for trial in others if trial.psnr >= target)


@pytest.mark.parametrize("offset", [-8.0, 0.0, 12.0])
def test_a_constant_between_prediction_and_images_is_found_at_once(planner: Planner, offset: float) -> None:
    target = planner.curve[len(planner.curve) // 2][1] + offset
    first, *others = smallest_reaching(planner, target, lambda plan: plan.sqnr + offset)
    assert len(others) <= 3 and target <= first.psnr < target + 1


def test_a_target_that_no_file_reaches_is_a_sentence(planner: Planner) -> None:
    most = planner.within(planner.curve[-1][0]).sqnr
    for offset in (0.0, -30.0):  # the prediction promises it, or not
        with pytest.raises(UserError, match=rf"90 dB is too high: .* have {most + offset:.1f} dB"):
            smallest_reaching(planner, 90.0, lambda plan, offset=offset: plan.sqnr + offset)


def test_the_largest_file_is_tried_before_giving_up(planner: Planner) -> None:
    """The search creeps towards a target that seems near, and only the largest file reaches it."""
    largest, target = planner.within(planner.curve[-1][0]).nbytes, planner.curve[len(planner.curve) // 4][1]
    first, *others = smallest_reaching(planner, target, lambda plan: target + (0.1 if plan.nbytes == largest else -0.1))
    assert first.plan.nbytes == largest
    assert len(others) == TRIES - 1


def test_the_best_of_different_plans_of_one_size_is_first(planner: Planner) -> None:
    size = planner.curve[-1][0] * 9 // 10
    plans = planner.choices(size)
    assert len(plans) > 1 and all(plan.nbytes <= size for plan in plans)
    assert plans[0] == planner.within(size)
    formats = {
        (rule.recipe.weight, rule.recipe.rank) for rule in plans[-1].config.rules if rule.recipe and rule.recipe.act
    }
    assert len(formats) == 1  # uniform
    psnrs = iter(range(len(plans)))
    trials = best_within(planner, size, lambda plan: float(next(psnrs)))
    assert [trial.psnr for trial in trials] == sorted(range(len(plans)), reverse=True)
    assert trials[0].plan == plans[-1]
