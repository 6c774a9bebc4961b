"""Bits and ranks by budget: exact choice, sensitivities against finite differences, better than uniform."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.quant.budget import HEADER, Option, Planner, Table, layer_options, observed, plan_
from svdit.quant.config import RECIPES, QuantConfig, Rule, dit_config
from svdit.quant.observe import Statistics
from svdit.quant.quantize import quantize_
from svdit.quant.sensitivity import Call, recording, sensitivities
from svdit.sampling.calibration import calibration_loop

LOOP = calibration_loop(images=6, steps=5)
RECIPE = RECIPES["w8a8"]

offered = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 10**6)), min_size=1, max_size=4, unique=True).map(
    lambda pairs: [
        Option(RECIPE, size, float(error))
        for size, error in zip(sorted(p[0] for p in pairs), sorted((p[1] for p in pairs), reverse=True), strict=True)
    ]
)


@given(st.lists(offered, min_size=1, max_size=4), st.integers(0, 120))
@settings(max_examples=60)
def test_the_choice_is_the_best_there_is(choices: list[list[Option]], slack: int) -> None:
    budget = sum(options[0].nbytes for options in choices) + slack
    every = (c for c in product(*choices) if sum(o.nbytes for o in c) <= budget)
    best = min(sum(o.error for o in c) for c in every)
    table = Table(choices)
    assert table.unit == 1
    picked = [options[i] for options, i in zip(choices, table.solve(budget), strict=True)]
    assert sum(o.nbytes for o in picked) <= budget
    assert sum(o.error for o in picked) == pytest.approx(best)
    curve = table.curve()
    assert [e for _, e in curve] == sorted({e for _, e in curve}, reverse=True)


def test_sensitivity_is_the_effect_of_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    data = torch.randn(64, 32)
    calls = [(row[None],) for row in data]
    estimated, energy = sensitivities(model, ["0", "2", "4"], calls)
    with torch.no_grad():
        y = model(data)
        assert energy == pytest.approx(float(y.square().sum() / 64), rel=1e-4)
        noise = 1e-3
        for name in ("0", "2", "4"):
            with model.get_submodule(name).register_forward_hook(lambda m, i, o: o + noise * torch.randn_like(o)):
                change = sum(float((model(data) - y).square().sum()) / 64 for _ in range(50)) / 50
            # the estimate is per unit of squared error of a whole row of outputs
            width = model.get_submodule(name).out_features
            assert estimated[name] == pytest.approx(change / (noise**2 * width), rel=0.2)
    assert not any(module._forward_hooks for module in model.modules())


class Odd(nn.Module):
    """`often` runs three times, `rarely` for three tokens only, and nothing reads what `never` returns."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.often, self.rarely, self.never = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.wrap = wrap

    def forward(self, x: Tensor, time: Tensor) -> Any:
        for _ in range(3):
            x = torch.tanh(self.often(x)) * 1.5 + time
        self.never(x)
        return self.wrap(self.rarely(x) if x.shape[1] == 3 else x)


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, None), lambda y: {"sample": y}, lambda y: [(y,)]],
    ids=["tensor", "tuple", "mapping", "nested"],
)
def test_sensitivity_in_models_of_any_structure(wrap: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, noise, calls = Odd(wrap), 1e-3, list[Call]()
    data = [torch.randn(5, tokens, 16) for tokens in (3, 2) * 20]
    recording(lambda model: [model(x, torch.tensor(0.1)) for x in data], calls)(model)
    assert len(calls) == 16 and all(len(x) == 2 and time.ndim == 0 for x, time in calls)
    estimated, _ = sensitivities(model, ["often", "rarely", "never"], calls)
    assert estimated["never"] == 0
    model.wrap = lambda y: y
    with torch.no_grad():
        for name in ("often", "rarely"):
            layer, change = model.get_submodule(name), 0.0
            for call in calls:
                y = model(*call)
                with layer.register_forward_hook(lambda m, i, o: o + noise * torch.randn_like(o)):
                    change += sum(float((model(*call) - y).square().sum()) for _ in range(50)) / 50 / len(calls)
            assert estimated[name] == pytest.approx(change / (noise**2 * 16), rel=0.25)


@pytest.mark.parametrize("returned", ["text", None, (), {}])
def test_a_model_that_returns_no_tensor_has_no_plan(returned: object) -> None:
    with pytest.raises(UserError, match=r"the model returns a \w+ and no tensor; a plan needs its output"):
        sensitivities(Odd(lambda y: returned), ["often"], [(torch.ones(1, 2, 16), torch.tensor(0.0))])


def test_sensitivity_does_not_overflow_in_half_precision() -> None:
    """Sums of squares exceed float16's largest number, 65504, where no output does."""
    model = nn.Linear(16, 16)
    calls = [(torch.randn(2, 4000, 16),)]
    expected, half = sensitivities(nn.Sequential(model), ["0"], calls), nn.Sequential(deepcopy(model).half())
    estimated = sensitivities(half, ["0"], [(calls[0][0].half(),)])
    assert expected[1] > 1e4 and estimated[1] == pytest.approx(expected[1], rel=1e-2)
    assert estimated[0]["0"] == pytest.approx(expected[0]["0"], rel=1e-2) and expected[0]["0"] * 16 > 65504


def test_an_effect_that_is_not_finite_is_an_error() -> None:
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64)
    planner = observed(model, QuantConfig((Rule("0", RECIPE),)), lambda model: model(inputs))
    model[1].weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"the effect of layer 0 on the output is not finite; use a checkpoint in floa"):
        Planner(model, planner.selection, planner.options, [(inputs,)])


def test_calls_are_recorded_and_cut(tiny: DiT) -> None:
    calls: list[Call] = []
    recording(LOOP, calls)(tiny)
    assert 0 < len(calls) <= 16
    assert all(len(x) == len(t) == len(y) == 2 for x, t, y in calls)
    assert len({int(t[0]) for _, t, _ in calls}) > 1


def test_the_prediction_knows_what_gptq_leaves(linear: nn.Linear, statistics: Statistics) -> None:
    recipe = replace(RECIPES["w4a16"], smoothing=0)
    found, nearest = (
        [option.error for option in layer_options(linear, replace(recipe, rounding=rounding), statistics)]
        for rounding in ("gptq", "nearest")
    )
    ratios = [a / b for a, b in zip(found, nearest, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert 0 < ratios[0] < 0.7


def file_bytes(model: nn.Module) -> int:
    return sum(v.nbytes for v in model.state_dict().values()) + HEADER * 11


@pytest.mark.parametrize(("preset", "factor"), [("w4a8", 0.95), ("w8a8", 1.02)])  # at W8A8 the inputs' error rules
def test_a_plan_meets_its_size_and_beats_the_uniform_setting(tiny: DiT, preset: str, factor: float) -> None:
    uniform = DiT(tiny.config).eval()
    uniform.load_state_dict(tiny.state_dict())
    config = dit_config(replace(RECIPES[preset], rank=8), "int4" if preset == "w4a8" else "int8")
    quantize_(uniform, config, LOOP)
    target = file_bytes(uniform)
    plan = plan_(tiny, config, LOOP, target_bytes=target)
    assert plan.curve == sorted(plan.curve)
    assert [s for _, s in plan.curve] == sorted(s for _, s in plan.curve)
    bits, rank = (4, 8) if preset == "w4a8" else (8, 8)
    (own,) = [setting for setting in plan.uniform if setting[:2] == (bits, rank)]
    assert own[2] == pytest.approx(file_bytes(uniform), rel=0.01)  # up to the zero points of adaLN
    assert max(s for size, s in plan.curve if size <= 1.001 * own[2]) >= own[3]  # the curve is of the best choices
    x, y = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(5)), torch.arange(64) % 6
    t = torch.linspace(0, 999, 64).long()
    with torch.no_grad():
        before = tiny(x, t, y)
        planned = DiT(tiny.config).eval()
        planned.load_state_dict(tiny.state_dict())
        quantize_(planned, plan.config, LOOP)
        assert file_bytes(planned) <= plan.nbytes <= target
        errors = [float((model(x, t, y) - before).norm()) for model in (planned, uniform)]
    assert 0 < errors[0] < factor * errors[1]
    if preset == "w8a8":  # from 6 bits on no layer gets less than all could have
        assert all(
            rule.recipe.weight.bits == 8 and rule.recipe.rank >= 8 * bool(rule.recipe.act) for rule in plan.config.rules
        )


def test_a_quality_is_reached_with_the_fewest_bytes(tiny: DiT) -> None:
    config = dit_config(RECIPES["w8a8"])
    low, high = (plan_(tiny, config, LOOP, target_sqnr=db) for db in (15.0, 30.0))
    assert low.nbytes < high.nbytes
    assert low.sqnr >= 15
    assert high.sqnr >= 30
    with pytest.raises(UserError, match="99 dB is too high; the maximum is"):
        plan_(tiny, config, LOOP, target_sqnr=99)
    with pytest.raises(UserError, match=r"0\.00 MB is too small; the minimum is"):
        plan_(tiny, config, LOOP, target_bytes=1)
    with pytest.raises(UserError, match="pass one of them"):
        plan_(tiny, config, LOOP)
    with pytest.raises(UserError, match="pass one of them"):
        plan_(tiny, config, LOOP, target_bytes=10**6, target_sqnr=20)


def test_memory_bounds_the_plan_and_does_not_change_it(tiny: DiT) -> None:
    config, runs = dit_config(replace(RECIPES["w8a8"], smoothing=0)), list[int]()

    def counting(model: nn.Module) -> None:
        runs.append(1)
        LOOP(model)

    whole = plan_(tiny, config, counting, target_sqnr=20.0)
    assert len(runs) == 1
    pieces = plan_(tiny, config, counting, target_sqnr=20.0, max_memory=Statistics.nbytes(256))
    assert len(runs) > 4
    assert (pieces.config, pieces.curve) == (whole.config, whole.curve)
    assert whole.statistics is not None and pieces.statistics is None
    with pytest.raises(UserError, match="max_memory is 0"):
        plan_(tiny, config, counting, target_sqnr=20.0, max_memory=0)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_a_plan_needs_no_gradients_of_the_caller(context: type[torch.no_grad]) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).train()
    config = QuantConfig((Rule("*", replace(RECIPES["w4a16"], smoothing=0)),))
    x = torch.randn(64, 64)

    def loop(model: nn.Module) -> None:
        with context():
            model(x)

    with context():
        within = plan_(model, config, loop, target_sqnr=15.0)
    assert within.curve == plan_(model, config, loop, target_sqnr=15.0).curve  # without dropout
    assert model[0].training


def test_a_model_called_by_keyword_only_is_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(UserError, match="pass its input by position"):
        plan_(model, QuantConfig((Rule("*", RECIPES["rtn"]),)), lambda m: m(input=torch.ones(2, 64)), target_sqnr=9.0)
