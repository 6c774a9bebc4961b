"""SVDLinear: a quantized linear as a module. It stores a `kernels.layer.Layer` and computes `reference.linear`.

Without a residual it is the documented rank-ratio mode (two factors instead of the weight); without an activation
format it is weight-only; without factors it is a plain quantized linear. The bias already includes W·shift. The
original weight is not kept: `weight` decodes it. Float factors and the bias are parameters; everything else is a
buffer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.checks import check
from svdit.kernels.formats import Format as Format  # part of a spec
from svdit.kernels.layer import Layer
from svdit.kernels.layer import LinearSpec as LinearSpec  # what `spec` is
from svdit.quant.lowrank import balanced_svd

PARAMETERS, OPTIONAL = ("bias", "l1", "l2"), ("in_scale", "in_shift")
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def rank_for_ratio(ratio: float, in_features: int, out_features: int) -> int:
    """round(ratio · min(in, out)), at least 1. Raises UserError for a ratio outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise UserError(f"a rank ratio of {ratio} is impossible; pass a number above 0 and up to 1")
    return max(1, round(ratio * min(in_features, out_features)))


class SVDLinear(nn.Module):
    """Replaces an nn.Linear: (…, in_features) to (…, out_features)."""

    bias: Tensor | None
    in_scale: Tensor | None
    in_shift: Tensor | None
    l1: Tensor | None
    l2: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank_ratio: float | None = None,
        *,
        spec: LinearSpec | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype  # of `weight`, and of nothing stored
        if spec is None:
            ratio = 1.0 if rank_ratio is None else rank_ratio
            spec = LinearSpec(rank=rank_for_ratio(ratio, in_features, out_features), rank_ratio=ratio)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        for name in PARAMETERS:
            self.register_parameter(name, None)
        for name in OPTIONAL:
            self.register_buffer(name, None)
        self.store(initial_tensors(spec, out_features, in_features, bias, device) if tensors is None else tensors)

    def store(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors of these names: those of a `Layer`, of any shape (…)."""
        for name, tensor in tensors.items():
            if name in PARAMETERS:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def layer(self) -> Layer:
        """The layer as data; its tensors are this module's own."""
        tensors = {**self._parameters, **self._buffers}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return Layer(self.spec, (self.out_features, self.in_features), present)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) in the model's type, as of an nn.Linear. It is decoded at every access, which is slow."""
        return self.effective_weight().detach().to(self.dtype)

    @classmethod
    def from_tensors(cls, spec: LinearSpec, O: int, I: int, tensors: Mapping[str, Tensor]) -> "SVDLinear":
        """The layer (O, I) of these tensors. Raises UserError where they do not fit the spec or hold other values."""
        check(Layer(spec, (O, I), tensors))
        return cls(I, O, spec=spec, tensors=tensors)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear has
        if not input.numel():
            return input.new_zeros(*input.shape[:-1], self.out_features)
        return ref.linear(self.layer(), input).to(input.dtype)  # (…, O)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SVDLinear":
        """Move tensors, but keep their types: `.half()` and the like would change what the codes stand for."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.layer().device)).dtype

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def store_residual(self, codes: Tensor, scales: ref.Scales) -> None:
        """Store codes (O, I) and scales as the residual."""
        self.store(ref.encoded("residual", codes, scales, self.layer().form("residual")))

    @torch.no_grad()
    def store_factors(self, l1: Tensor, l2: Tensor) -> None:
        """Store L1 (O, R) and L2 (R, I), rounded to the spec's format or float type."""
        for name, factor in (("l1", l1), ("l2", l2)):
            if form := self.spec.factors:
                self.store(ref.encoded(name, *ref.quantize(factor, form), form))
            else:
                self.store({name: factor.to(getattr(torch, self.spec.factor_dtype)).contiguous()})

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """L1 (O, R) and L2 (R, I) as fp32; R is 0 without factors."""
        layer = self.layer()
        if self.spec.rank:
            return ref.matrix(layer, "l1"), ref.matrix(layer, "l2")
        empty = torch.empty(0, device=layer.device)
        return empty.view(self.out_features, 0), empty.view(0, self.in_features)

    def effective_weight(self) -> Tensor:
        """The weight (O, I) that multiplies the untransformed input, fp32."""
        l1, l2 = self.low_rank()
        weight = l1 @ l2 if self.spec.weight is None else ref.matrix(self.layer()) + l1 @ l2
        weight = ref.rotate(weight, self.spec.hadamard)
        return weight if self.in_scale is None else weight / self.in_scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank_ratio: float) -> "SVDLinear":
        """The truncated SVD of a Linear: float factors, √S in each."""
        O, I, like = linear.out_features, linear.in_features, linear.weight
        layer = cls(I, O, linear.bias is not None, rank_ratio, device=like.device, dtype=like.dtype)
        layer.store_factors(*balanced_svd(linear.weight.detach(), layer.spec.rank))
        if linear.bias is not None:
            layer.store({"bias": linear.bias.detach().float().clone()})
        return layer

    @torch.no_grad()
    def quantize_parameters(self, num_bits: int = 8) -> "SVDLinear":
        """Replace float factors by `num_bits`-bit codes: one scale per row of L1 and of L2. Returns self.

        Raises UserError where there are no float factors.
        """
        if self.l1 is None or self.l2 is None:
            raise UserError("this layer's factors are already quantized, or it has none; quantize a float layer once")
        l1, l2 = self.l1.float(), self.l2.float()
        self.spec = replace(self.spec, factors=Format(num_bits))
        self.l1 = self.l2 = None
        self.store_factors(l1, l2)
        return self

    def extra_repr(self) -> str:
        """Shape and formats, for print(model)."""
        spec = self.spec
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, rank={spec.rank}"]
        parts += [f"{k}={v}" for k, v in (("weight", spec.weight), ("act", spec.act), ("factors", spec.factors)) if v]
        return ", ".join(parts)


def initial_tensors(
    spec: LinearSpec, O: int, I: int, bias: bool, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Tensors of a new layer (O, I): random float factors, zero codes and bias, scales of one."""
    tensors = {"bias": torch.zeros(O, dtype=torch.float32, device=device)} if bias else {}
    if spec.scaled:
        tensors["in_scale"] = torch.ones(I, dtype=torch.float32, device=device)
    if spec.shifted:
        tensors["in_shift"] = torch.zeros(I, dtype=torch.float32, device=device)
    matrices = {"l1": ((O, spec.rank), spec.factors), "l2": ((spec.rank, I), spec.factors)} if spec.rank else {}
    for name, (shape, form) in {**matrices, "residual": ((O, I), spec.weight)}.items():
        if form:
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            tensors |= ref.encoded(name, *ref.quantize(zeros, form), form)
        elif name != "residual":
            factor = torch.randn(shape, device=device, dtype=getattr(torch, spec.factor_dtype))
            tensors[name] = factor * shape[1] ** -0.5
    return tensors


def unwrapped(model: Any) -> Any:
    """The model that torch.compile, DataParallel or DistributedDataParallel returned in a wrapper of its own names."""
    while attribute := WRAPPERS.get(type(model).__name__):
        model = getattr(model, attribute)
    return model


def quantized_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """Every SVDLinear of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every nn.Linear of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace the sub-modules of these names, under all their names and in their mode."""
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {modules[name]: layer for name, layer in layers.items()}
    for alias, old in modules.items():
        if old not in new:
            continue
        layer = new[old].train(old.training)
        parent, _, leaf = alias.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, layer)
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # disables its fast path, which reads linear1.weight


def layer_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """JSON-able specs of a model's quantized layers; empty for a float model."""
    return {name: layer.spec.to_dict() for name, layer in quantized_layers(model).items()}


def rebuild_(model: nn.Module, specs: dict[str, dict[str, Any]]) -> None:
    """Replace linears by empty SVDLinears of these specs, on the same device (meta too).

    Raises UserError where a spec's name belongs to something else than a Linear.
    """
    layers: dict[str, nn.Module] = {}
    for name, fields in specs.items():
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise UserError(f"{name} is a {type(old).__name__}, not a Linear; the file does not fit this model")
        layers[name] = SVDLinear(
            old.in_features,
            old.out_features,
            old.bias is not None,
            spec=LinearSpec.from_dict(fields),
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
    swap(model, layers)
