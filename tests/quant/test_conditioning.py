"""adaLN: few distinct inputs with a large mean, whose error all tokens and steps share."""

import pytest
import torch
from torch import Tensor

from svdit.checkpoints.store import load_model
from svdit.model.dit import DiT
from svdit.quant.config import ADALN, CONDITIONING, PLAIN, RECIPES, QuantConfig, Recipe, Rule, dit_config
from svdit.quant.gptq import Inverse
from svdit.quant.observe import observe
from svdit.quant.quantize import linear_of, quantize_
from svdit.sampling.calibration import CONDITIONS, show_conditions

NAME = "blocks.3.adaLN_modulation.1"


@pytest.fixture(scope="module")
def digits() -> DiT:
    return load_model("digits")


@pytest.fixture(scope="module")
def fresh(digits: DiT) -> Tensor:
    """Inputs of adaLN (M, I) that were not calibrated on."""
    inputs: list[Tensor] = []
    hook = digits.get_submodule(NAME).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    show_conditions(digits, 9, CONDITIONS)
    hook.remove()
    return inputs[0].detach().double()


@torch.no_grad()
def errors(digits: DiT, fresh: Tensor, recipe: Recipe) -> tuple[float, float]:
    """The squared error of the mean modulation, and the variance of the error, of a layer with this recipe."""
    model = load_model("digits")
    quantize_(model, QuantConfig((Rule(NAME, recipe),)), lambda m: show_conditions(m, 0, CONDITIONS))
    layer, linear = model.get_submodule(NAME), linear_of(digits, NAME)
    error = layer(fresh.float()) - (fresh @ linear.weight.double().T + linear.bias)
    return float(error.mean(0).square().sum()), float((error - error.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize("adaln", ["int8", "int4"])
def test_centring_removes_the_error_that_all_steps_share(digits: DiT, fresh: Tensor, adaln: str) -> None:
    recipe = ADALN[adaln]
    assert recipe is not None
    share, variance = errors(digits, fresh, recipe)
    # Both sets of inputs have a mean with the variance of the error over CONDITIONS.
    assert 0 < share < 5 * 2 / CONDITIONS * variance


def test_gptq_leaves_of_the_variance_what_it_predicts(digits: DiT, fresh: Tensor) -> None:
    """And rounding to nearest has the share of the mean in the inputs as the share of the mean in its error."""
    nearest, best = errors(digits, fresh, PLAIN), errors(digits, fresh, CONDITIONING)
    statistics = observe(digits, [NAME], lambda m: show_conditions(m, 0, CONDITIONS))[NAME]
    left = Inverse(statistics.expected_moment(statistics.mean)).left
    assert best[1] == pytest.approx(left * nearest[1], rel=0.3)
    assert left < 0.1
    mean = float(fresh.mean(0).square().sum() / fresh.square().sum(1).mean())
    assert nearest[0] / sum(nearest) == pytest.approx(mean, abs=0.2)
    assert mean > 0.5


def test_recipes_without_calibration_round_adaln_to_nearest() -> None:
    assert dit_config(RECIPES["rtn"]).recipe(NAME) == PLAIN
    assert dit_config(RECIPES["gptq"]).recipe(NAME) == ADALN["int8"] != PLAIN
    assert not any(rule.recipe.needs_inputs for rule in dit_config(RECIPES["rtn"]).rules if rule.recipe)
