"""The trainable linear: what it computes, its gradient, and what it changes in a file."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import relative
from helpers import hard_inputs
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.quant.config import RECIPES, Recipe
from svdit.quant.linear import SVDLinear
from svdit.quant.observe import Statistics
from svdit.quant.solve import quantize_linear
from svdit.recovery.layers import TrainableLinear, check_trainable, observe, row_scales, store_, trainable_

ROUNDED: dict[str, Recipe] = {  # of rank 4
    **{name: replace(RECIPES[name], rank=4) for name in ("w8a8", "w4a8", "w4a4", "w4a16", "fp8", "nvfp4", "mxfp4")},
    "int8 factors": replace(RECIPES["w4a8"], rank=4, factors=Format(8)),
    "no branch": RECIPES["rtn"],
    "zero points": replace(RECIPES["w4a8"], rank=4, weight=Format(4, 64, "fp32", "affine")),
    "factors only": Recipe(
        weight=None, act=None, low_rank="factors", rank=4, factors=Format(8), centre=False, smoothing=0, hadamard=0,
        search_scales=False, rounding="nearest",
    ),
}  # fmt: skip
EPS = torch.finfo(torch.float32).eps


QUANTIZED: dict[str, SVDLinear] = {}


@pytest.fixture(params=ROUNDED)
def layer(request: pytest.FixtureRequest, linear: nn.Linear, statistics: Statistics) -> SVDLinear:
    if request.param not in QUANTIZED:
        QUANTIZED[request.param] = quantize_linear("layer", linear, ROUNDED[request.param], statistics)[0]
    return copy.deepcopy(QUANTIZED[request.param])


def inputs() -> Tensor:
    return hard_inputs(16)


def trainable(layer: SVDLinear, linear: nn.Linear) -> TrainableLinear:
    """The layer made trainable by what `hard_inputs` show of it."""
    model, source = nn.Sequential(layer), nn.Sequential(linear)
    return trainable_(model, observe(model, source, lambda: model(hard_inputs(256))))["0"]


def moved(layer: TrainableLinear) -> TrainableLinear:
    """With other parameters, as after ten training steps in random directions."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for change in layer.changes.values():
            change.copy_(0.2 * torch.randn(change.shape, generator=generator))
    return layer


def output_size(layer: SVDLinear, x: Tensor) -> Tensor:
    """The sum of the absolute terms (M, O) of the layer's output, which bounds the effect of rounding them."""
    hat, (l1, l2) = ref.transform(layer.layer().detached(), x), (f.detach().abs() for f in layer.low_rank())
    size = hat.abs() @ l2.T @ l1.T
    if layer.spec.weight:
        rounded = ref.fake_quantize(hat, layer.spec.act) if layer.spec.act else hat
        size = size + rounded.abs() @ ref.matrix(layer.layer()).abs().T
    return size if layer.bias is None else size + layer.bias.detach().abs()


def differing(y: Tensor, z: Tensor, layer: SVDLinear, x: Tensor) -> int:
    """Rows of outputs (M, O) that differ by more than sums of 128 terms in another order, and scales rounded again."""
    return int(((y - z).abs() > (128 + 8) * EPS * output_size(layer, x)).any(1).sum())


def test_untrained_it_computes_the_layer(layer: SVDLinear, linear: nn.Linear) -> None:
    x = inputs()
    y, z = trainable(layer, linear)(x).detach(), layer(x).detach()
    # The rotation is a matrix product, so a number next to the middle of two codes may be rounded to the other.
    assert differing(y, z, layer, x) <= (2 if layer.spec.hadamard and layer.spec.act else 0)


def test_what_is_stored_computes_what_was_trained(layer: SVDLinear, linear: nn.Linear) -> None:
    x, before = inputs(), layer(inputs()).detach()
    trained = moved(trainable(layer, linear))
    layer.store(trained.stored())
    y, z = trained(x).detach(), layer(x).detach()
    assert differing(y, z, layer, x) <= (2 if layer.spec.hadamard and layer.spec.act else 0)
    assert differing(y, before, layer, x) == len(x)


def test_codes_multiples_and_size_stay(layer: SVDLinear, linear: nn.Linear) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.store(moved(trainable(layer, linear)).stored())
    after = layer.state_dict()
    kept = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    weight = layer.spec.weight
    trained = {"bias", row_scales(weight) if weight else "", *(name for name in after if name[:2] in ("l1", "l2"))}
    assert kept == after.keys() - trained
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }


def test_the_gradient_passes_straight_through(layer: SVDLinear, linear: nn.Linear) -> None:
    module, x = trainable(layer, linear), inputs().requires_grad_()
    g = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward((module(x) * g).sum())
    assert x.grad is not None
    assert relative(x.grad, g @ layer.effective_weight()) < 1e-5  # as if nothing were rounded
    hat = ref.transform(layer.layer().detached(), x.detach())
    rounded = ref.fake_quantize(hat, layer.spec.act) if layer.spec.act else hat
    slopes = {"bias": g.sum(0)}
    if layer.spec.weight:
        slopes["gain"] = (g * (rounded @ ref.matrix(layer.layer()).T)).sum(0)
    if layer.spec.rank:
        l1, l2 = (factor.detach() for factor in layer.low_rank())
        slopes |= {"l1": g.T @ (hat @ l2.T), "l2": (g @ l1).T @ hat}
    for name, change in module.changes.items():
        unit = module.units[name]
        expected = slopes[name] @ unit if unit.ndim else slopes[name] * unit
        assert relative(change.grad, expected) < 1e-3


def test_a_unit_of_each_parameter_changes_outputs_as_rounded_weights_do(layer: SVDLinear, linear: nn.Linear) -> None:
    seen = observe(nn.Sequential(layer), nn.Sequential(linear), lambda: layer(hard_inputs(1024)))["0"]
    x = hard_inputs(1024)
    weight_only = replace(layer.layer().detached(), spec=replace(layer.spec, act=None))
    error = (ref.linear(weight_only, x) - linear(x)).detach()
    assert seen.error == pytest.approx(float(error.square().mean().sqrt()), rel=1e-3)
    module = trainable_(nn.Sequential(layer), {"0": seen})["0"]
    y = module(x).detach()
    generator = torch.Generator().manual_seed(3)
    for name, change in module.changes.items():
        with torch.no_grad():
            change.copy_(torch.randn(change.shape, generator=generator))
            size = float((module(x) - y).square().mean().sqrt())
            change.zero_()
        assert 0.5 * seen.error < size < 2 * seen.error, name


def test_only_the_layers_of_a_model_are_trained(linear: nn.Linear, statistics: Statistics) -> None:
    quantized = quantize_linear("layer", linear, ROUNDED["w4a4"], statistics)[0]
    model, source = nn.Sequential(quantized, nn.Linear(96, 8)), nn.Sequential(linear, nn.Linear(96, 8))
    layers = trainable_(model, observe(model, source, lambda: model(inputs())))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"0.changes.{name}" for name in ("l1", "l2", "bias", "gain")}
    other = nn.Sequential(quantized, nn.Linear(96, 8))
    store_(other, {"0": moved(layers["0"]).stored()})
    assert torch.equal(other[0].bias, layers["0"].values()["bias"])


def test_nothing_to_train_is_an_error(linear: nn.Linear, statistics: Statistics) -> None:
    with pytest.raises(UserError, match="it is not quantized"):
        check_trainable(nn.Sequential(linear))
    branchless = quantize_linear("layer", linear, RECIPES["rtn"], statistics)[0]
    with pytest.raises(UserError, match="no low-rank branch; quantize with a preset that has one"):
        check_trainable(nn.Sequential(branchless))
