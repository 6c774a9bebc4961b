"""A quantized linear whose low-rank branch, bias and output scales are trained; its codes do not change.

    y = g · Qa(x̂) Resᵀ + (x̂ L2ᵀ) L1ᵀ + b

g (O,) multiplies the fp32 scale of each row of Res. L1 and L2 are rounded to their stored type, and x̂ to the format of
activations, in the forward pass; the gradient of a rounding is the identity (straight-through, arXiv 1308.3432). What
is trained are changes, zero at the start, in coordinates in which a unit changes the layer's output by its error from
rounded weights: those of L1 and L2 are whitened by the second moment of their inputs. So one learning rate serves all.
The error from rounded activations is no measure: training cannot remove it, and at 4 bits it is larger.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import TWO_LEVEL, Format
from svdit.quant.linear import SVDLinear, quantized_layers, swap

Rounding = Callable[[Tensor], Tensor]
LEAST = 1e-3  # variance of a direction of the input, relative to the mean


class StraightThrough(torch.autograd.Function):
    """`rounding(x)`, whose gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        """(…)"""
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        """(…)"""
        return grads[0], None


def straight_through(x: Tensor, rounding: Rounding) -> Tensor:
    """x (…), rounded."""
    rounded: Tensor = StraightThrough.apply(x, rounding)  # type: ignore[no-untyped-call]
    return rounded


def row_scales(form: Format) -> str:
    """The stored tensor (O, 1) or (O, G) of fp32 scales that a gain of the rows multiplies; "" without one."""
    if form.scale in TWO_LEVEL:
        return "residual_steps"
    return "residual_scales" if form.scale == "fp32" else ""


class Observed(NamedTuple):
    """Of a layer: the second moment (I, I) of x̂, the RMS of Qa(x̂) Resᵀ, and that of the error by rounded weights."""

    moment: Tensor
    product: float
    error: float


class TrainableLinear(nn.Module):
    """Stands in for an SVDLinear, (…, I) to (…, O), while it is trained; `stored` has its tensors afterwards."""

    def __init__(self, layer: SVDLinear, observed: Observed) -> None:
        super().__init__()
        self.layer, spec = layer.layer().detached(), layer.spec
        self.plain = replace(self.layer, spec=replace(spec, hadamard=0))  # the rotation is a product here: it is faster
        device, (O, I), error = self.layer.device, self.layer.shape, observed.error
        self.rotation = ref.hadamard_matrix(spec.hadamard, device) if spec.hadamard else None
        self.act = partial(ref.fake_quantize, form=spec.act) if spec.act else None
        self.residual = ref.matrix(self.layer) if spec.weight else None  # (O, I)
        self.units: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        if self.layer.bias is not None:
            shapes["bias"], self.units["bias"] = (O,), torch.tensor(error, device=device)
        if spec.weight and row_scales(spec.weight) and observed.product:
            shapes["gain"], self.units["gain"] = (O,), torch.tensor(error / observed.product, device=device)
        if spec.rank:
            self.l1, self.l2 = ref.matrix(self.layer, "l1"), ref.matrix(self.layer, "l2")
            inner = self.l2.double() @ observed.moment @ self.l2.double().T
            size = max(float(self.l1.norm()), 1e-8)
            self.units["l1"] = whitening(inner) * (error / spec.rank**0.5)
            self.units["l2"] = whitening(observed.moment) * (error * (O / I) ** 0.5 / size)
            shapes |= {"l1": (O, spec.rank), "l2": (spec.rank, I)}
        self.changes = nn.ParameterDict({name: torch.zeros(shape, device=device) for name, shape in shapes.items()})

    def values(self) -> dict[str, Tensor]:
        """Bias and gain (O,), L1 (O, R) and L2 (R, I), where the layer has them, not rounded."""
        values = dict[str, Tensor]()
        for name, change in self.changes.items():
            if name in ("l1", "l2"):
                values[name] = getattr(self, name) + change @ self.units[name]
            else:
                start = 1.0 if name == "gain" else self.layer.tensors["bias"]
                values[name] = start + change * self.units[name]
        return values

    def round_factor(self, factor: Tensor) -> Tensor:
        """L1 (O, R) or L2 (R, I) as it is stored, in fp32."""
        spec = self.layer.spec
        if spec.factors:
            return ref.fake_quantize(factor, spec.factors)
        return factor.to(getattr(torch, spec.factor_dtype)).float()

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear has
        """(…, I) to (…, O)"""
        hat, values, terms = ref.transform(self.plain, input), self.values(), list[Tensor]()
        if self.rotation is not None:
            hat = (hat.reshape(-1, len(self.rotation)) @ self.rotation).view(hat.shape)
        if self.residual is not None:
            y = F.linear(straight_through(hat, self.act) if self.act else hat, self.residual)
            terms.append(y * values["gain"] if "gain" in values else y)
        if "l1" in values:
            l1, l2 = (straight_through(values[name], self.round_factor) for name in ("l1", "l2"))
            terms.append(F.linear(F.linear(hat, l2), l1))
        if "bias" in values:
            terms.append(values["bias"])
        return sum(terms[1:], terms[0]).to(input.dtype)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The tensors (…) that training changed, under their names in a file and in their types."""
        spec, tensors = self.layer.spec, dict[str, Tensor]()
        for name, value in self.values().items():
            if name == "gain" and spec.weight:
                scales = row_scales(spec.weight)
                tensors[scales] = self.layer.tensors[scales] * value[:, None]
            elif name == "bias":
                tensors[name] = value
            elif spec.factors:
                tensors |= ref.encoded(name, *ref.quantize(value, spec.factors), spec.factors)
            else:
                tensors[name] = value.to(getattr(torch, spec.factor_dtype))
        return tensors


def whitening(moment: Tensor) -> Tensor:
    """The inverse square root of a second moment (I, I), fp32; directions of little variance count as LEAST."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=max(LEAST * float(values.mean()), 1e-30))
    return ((vectors * values.rsqrt()) @ vectors.T).float()


@torch.no_grad()
def observe(model: nn.Module, source: nn.Module, run: Callable[[], Any]) -> dict[str, Observed]:
    """What `run`, which calls `model`, shows of its quantized layers; errors are those to `source`'s linears."""
    layers = quantized_layers(model)
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    rows = dict.fromkeys(layers, 0)

    def watch(name: str, layer: SVDLinear, linear: nn.Module) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            stored, spec = layer.layer().detached(), layer.spec
            hat = ref.transform(stored, inputs[0]).flatten(0, -2)
            rounded = ref.fake_quantize(hat, spec.act) if spec.act else hat
            product = rounded @ ref.matrix(stored).T if spec.weight else hat.new_zeros(1)
            error = (output - linear(inputs[0])).flatten(0, -2)
            if spec.act and spec.weight:
                error = error - (product - hat @ ref.matrix(stored).T)  # of rounded activations, which stays
            squares = product.double().square().sum(), error.double().square().sum()
            new = [(hat.T @ hat).double(), *squares]
            sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if sums[name] else new
            rows[name] += len(hat)

        return add

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(watch(name, layer, source.get_submodule(name))))
        run()
    means = {name: [part / rows[name] for part in parts] for name, parts in sums.items()}
    return {
        name: Observed(moment, *(float((part / layers[name].out_features).sqrt()) for part in (product, error)))
        for name, (moment, product, error) in means.items()
    }


def check_trainable(model: nn.Module) -> None:
    """Raises UserError for a model without a low-rank branch."""
    layers = quantized_layers(model)
    if not any(layer.spec.rank for layer in layers.values()):
        what = "its layers have no low-rank branch" if layers else "it is not quantized"
        raise UserError(f"there is nothing to recover: {what}; quantize with a preset that has one, w4a8 for example")


def trainable_(model: nn.Module, observed: Mapping[str, Observed]) -> dict[str, TrainableLinear]:
    """Replace the quantized layers of a model by trainable ones; nothing else of it has a gradient."""
    model.requires_grad_(False)
    trainable = {name: TrainableLinear(layer, observed[name]) for name, layer in quantized_layers(model).items()}
    swap(model, trainable)
    return trainable


def store_(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write trained tensors (…) into the quantized layers of those names."""
    layers = quantized_layers(model)
    for name, changed in tensors.items():
        layers[name].store(changed)
