"""quantize_ on modules that are not a DiT: shared layers, attention, subclasses, modes, autocast, copies."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import relative
from layers import model_bound
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from svdit.compat import apply_svd_to_dit
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.quant.config import RECIPES, QuantConfig, Recipe, Rule, dit_config, recipe_for
from svdit.quant.linear import SVDLinear, quantized_layers
from svdit.quant.observe import observe
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate

ALL = QuantConfig((Rule("*", recipe_for("w8a8", rank=4, smoothing=0)),))
PLAIN = QuantConfig((Rule("*", recipe_for("rtn")),))
BATCHES = torch.randn(4, 8, 5, 64, generator=torch.Generator().manual_seed(0))


def loop(model: nn.Module) -> None:
    for x in BATCHES:
        model(x)


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()


class Tied(nn.Module):
    """One linear under two names, and a block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.block = two()
        self.second, self.again = self.first, self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.again(self.block(self.first(x))))


class Doubled(nn.Linear):
    """Not what nn.Linear computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_shared_linear_is_quantized_once_and_stays_shared() -> None:
    model = Tied().eval()
    before = model(BATCHES[0])
    report = quantize_(model, ALL, loop)
    assert [line.name for line in report.layers] == ["first", "block.0", "block.2"]
    assert isinstance(model.first, SVDLinear) and model.first is model.second
    assert model.block is model.again
    assert 0 < relative(model(BATCHES[0]), before) < 0.05


@torch.no_grad()
def test_a_shared_layer_stays_shared_when_it_is_accelerated_or_factored() -> None:
    model, x = Tied().eval(), torch.randn(8, 32, 64)
    quantize_(model, QuantConfig((Rule("*", recipe_for("w8a8", rank=8)),)), lambda m: [m(batch) for batch in x])
    expected = model(x)
    fast = accelerate(model)
    assert fast.first is fast.second and relative(fast(x), expected) < 4 * model_bound(ops.choose())  # four layers
    factored = apply_svd_to_dit(Tied(), 0.5)
    assert factored.first is factored.second and isinstance(factored.second, SVDLinear)


def test_one_module_under_two_rules_is_a_sentence() -> None:
    with pytest.raises(UserError, match="first and second are the same module but have different rules"):
        quantize_(Tied(), QuantConfig((Rule("second", None), *ALL.rules)), loop)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_attention_is_skipped_by_name_and_the_rest_of_its_layer_is_quantized(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    before = model(BATCHES[0])
    report = quantize_(model, ALL, loop)
    assert [line.name for line in report.layers] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert sorted(report.skipped) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert "layers.0.self_attn was not quantized: nn.MultiheadAttention" in report.warnings[0]
    assert 0 < relative(model(BATCHES[0]), before) < 0.05  # not the fast path, which reads linear1.weight


@torch.no_grad()
def test_subclasses_with_their_own_forward_are_skipped_by_name() -> None:
    model = nn.Sequential(Doubled(64, 64), nn.Linear(64, 64)).eval()
    report = quantize_(model, ALL, loop)
    assert type(model[0]) is Doubled
    assert list(quantized_layers(model)) == ["1"]
    assert report.warnings[0] == "0 was not quantized: Doubled is a subclass of nn.Linear with its own forward"
    with pytest.raises(UserError, match=r"no rule .* selects a linear layer.*0: Doubled is a subclass"):
        quantize_(nn.Sequential(Doubled(64, 64)), ALL, loop)


PECULIAR: dict[str, Callable[[nn.Linear], object]] = {
    "forward hooks": lambda linear: linear.register_forward_hook(lambda m, x, y: 2 * y),
    "has forward hooks": lambda linear: linear.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "forward was replaced": lambda linear: setattr(linear, "forward", lambda x: 2 * nn.Linear.forward(linear, x)),
}


@pytest.mark.parametrize("reason", PECULIAR)
@torch.no_grad()
def test_linears_that_do_more_are_skipped_by_name(reason: str) -> None:
    model = two()
    PECULIAR[reason](model[0])
    before = model(BATCHES[0])
    report = quantize_(model, ALL, loop)
    assert isinstance(model[0], nn.Linear) and isinstance(model[2], SVDLinear)
    assert report.warnings[0].startswith("0 was not quantized: ") and reason in report.warnings[0]
    assert 0 < relative(model(BATCHES[0]), before) < 0.05


SAME: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass without a forward": lambda linear: NonDynamicallyQuantizableLinear(64, 64),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
}


@pytest.mark.parametrize("kind", SAME)
@torch.no_grad()
def test_linears_that_only_store_their_weight_in_another_way_are_quantized(kind: str) -> None:
    model = two()
    model[0] = SAME[kind](model[0])
    model.eval()
    before = model(BATCHES[0])
    quantize_(model, ALL, loop)
    assert isinstance(model[0], SVDLinear) and 0 < relative(model(BATCHES[0]), before) < 0.05


def test_groups_that_do_not_divide_a_layer_name_it() -> None:
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 64))
    with pytest.raises(
        UserError, match="1 cannot be quantized to INT4 g64: rows of 60 cannot be cut into groups of 64"
    ):
        quantize_(model, QuantConfig((Rule("*", recipe_for("w4a8")),)), loop)


def test_loops_that_cannot_run_are_sentences() -> None:
    with pytest.raises(UserError, match="the forward loop is a Tensor; pass a function of the model"):
        quantize_(two(), ALL, BATCHES)
    once = iter(BATCHES)
    with pytest.raises(UserError, match=r"never reached 2; .* at every run .*not over a generator"):
        quantize_(two(), ALL, lambda m: [m(x) for x in once], max_memory=1)


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_one_row_and_a_dead_column_are_quantized(name: str) -> None:
    for x in (torch.randn(1, 1, 64), torch.randn(9, 8, 64) * (torch.arange(64) != 3)):
        model = two()
        report = quantize_(model, QuantConfig((Rule("*", replace(RECIPES[name], rank=4)),)), lambda m, x=x: m(x))
        json.dumps(report.to_dict(), allow_nan=False)
        assert model(x).isfinite().all()


def test_a_linear_itself_is_a_sentence() -> None:
    with pytest.raises(UserError, match="itself a Linear"):
        quantize_(nn.Linear(64, 64), ALL, lambda m: m(BATCHES[0]))


@pytest.mark.parametrize("recipe", [None, Recipe()])
@pytest.mark.parametrize("pattern", ["blcks.*", "1", "[02"])
def test_patterns_that_match_no_linear_name_themselves(recipe: Recipe | None, pattern: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{pattern!r} matches no linear layer of this model")):
        quantize_(two(), QuantConfig((Rule(pattern, recipe), *PLAIN.rules)), loop)


def test_presets_have_rules_for_layers_that_a_model_may_lack() -> None:
    model = nn.ModuleDict({"blocks": two()})
    report = quantize_(model, dit_config(RECIPES["rtn"]), None)
    assert [line.name for line in report.layers] == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_parameters_that_are_no_numbers_name_the_layer(bad: float, part: str) -> None:
    model = two()
    getattr(model[2], part).data.view(-1)[7] = bad
    with pytest.raises(UserError, match=f"the {part} of 2 contains NaN or Inf"):
        quantize_(model, PLAIN)


def test_weights_without_values_name_the_layer() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(UserError, match="the weight of 0 is on the meta device"):
        quantize_(model, PLAIN)


def test_inputs_of_zeros_are_quantized_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))  # a tall weight needs a Cholesky factor
    report = quantize_(model, ALL, lambda m: m(torch.zeros(3, 64)))
    assert "0: its inputs are constant: plain SVD and rounding to nearest" in report.warnings
    assert len(report.layers) == 2


@torch.no_grad()
def test_training_mode_is_restored_and_calibration_runs_without_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.BatchNorm1d(5)).train()
    model[0].eval()
    running = copy.deepcopy(model[2].state_dict())
    quantize_(model, ALL, loop)
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert all(torch.equal(value, running[name]) for name, value in model[2].state_dict().items())
    statistics = observe(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64)).train(), ["1"], loop)
    batches = {tuple(row.tolist()) for row in BATCHES.flatten(0, 2)}
    assert {tuple(row.tolist()) for row in statistics["1"].sample} < batches  # nothing is dropped or scaled


CONTEXTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "none": nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("inside", CONTEXTS)
def test_the_statistics_do_not_depend_on_the_loops_context(inside: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))

    def within(m: nn.Module) -> None:
        for x in BATCHES:  # entered anew per call: the statistics must outlive it
            with CONTEXTS[inside]():
                m(x)

    found, expected = (observe(model, ["0"], each)["0"] for each in (within, loop))
    assert torch.equal(found.second_moment(None), expected.second_moment(None))
    assert torch.equal(found.sample, expected.sample) and not found.total.is_inference()


@pytest.mark.parametrize("outside", CONTEXTS)
def test_the_result_does_not_depend_on_the_callers_context(outside: str) -> None:
    models = two(), two()
    config = QuantConfig((Rule("0", ALL.rules[0].recipe),))  # its input is the same under autocast
    quantize_(models[0], config, loop)
    with CONTEXTS[outside]():
        quantize_(models[1], config, loop)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
        assert not models[1].state_dict()[name].is_inference()


@torch.no_grad()
def test_linears_called_by_keyword_or_with_no_rows_are_observed() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x[:0]).sum() + self.linear(input=x)

    model = Keyword()
    found = observe(model, ["linear"], loop)["linear"]
    assert found.count + len(found.holdout_rows) == BATCHES[..., 0].numel()
    assert len(quantize_(model, PLAIN, loop).layers) == 1


@torch.no_grad()
def test_a_quantized_model_is_copied_moved_and_pickled() -> None:
    model = two()
    quantize_(model, ALL, loop)
    y = model(BATCHES[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
        assert torch.equal(other(BATCHES[0]), y)
    assert {value.device.type for value in copy.deepcopy(model).to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("message", ["the loop failed", None])
def test_no_hooks_are_left(message: str | None) -> None:
    model = two()

    def failing(m: nn.Module) -> None:
        loop(m)
        if message:
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message) if message else nullcontext():
        quantize_(model, ALL, failing)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert bool(quantized_layers(model)) == (message is None)


class Keyed(nn.Module):
    """Calls its linear by keyword, as nn.Linear allows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["w8a8", "w4a4", "w4a16", "fp8"])
@torch.no_grad()
def test_quantized_layers_are_called_as_a_linear_is(name: str) -> None:
    model = Keyed()
    quantize_(model, QuantConfig((Rule("*", replace(RECIPES[name], rank=4)),)), loop)
    expected = model(BATCHES[0])
    for each in (model, accelerate(model)):
        assert relative(each(BATCHES[0]), expected) < 0.1
        for shape in ((0, 64), (3, 0, 64)):
            assert each(torch.zeros(shape)).shape == (*shape[:-1], 32)
    with pytest.raises(UserError, match="the input of layer linear has 63 columns, not 64"):
        model(torch.zeros(2, 63))


def test_arguments_of_other_types_are_sentences() -> None:
    with pytest.raises(UserError, match="quantize_ got a str; pass a QuantConfig"):
        quantize_(two(), "w8a8", loop)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="quantize_ got a list; pass a Module"):
        quantize_([1], ALL, loop)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_memory is 8; pass a positive number of bytes"):
        quantize_(two(), ALL, loop, max_memory="8")  # type: ignore[arg-type]
