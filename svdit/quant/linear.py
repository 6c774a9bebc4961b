"""SVDLinear: y = Qa(x̂) Q(Res)ᵀ + (x̂ L2ᵀ) L1ᵀ + b with x̂ = ((x − shift) / scale) H; every part but one optional.

Without a residual it is the documented rank-ratio mode (two factors in place of the weight); without an activation
format it is weight-only; without factors it is a plain quantized linear. The factors are floats or integer codes.
The bias already holds W·shift. Nothing keeps the original weight.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format


@dataclass(frozen=True)
class LinearSpec:
    """What an SVDLinear stores; enough to build an empty one."""

    rank: int = 0
    factors: Format | None = None  # None: floats of `factor_dtype`
    factor_dtype: str = "float32"
    weight: Format | None = None  # None: no residual
    act: Format | None = None  # None: activations stay as they are
    scaled: bool = False
    shifted: bool = False
    hadamard: int = 0
    rank_ratio: float | None = None  # remembered, where the rank came from one

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LinearSpec":
        """The inverse of dataclasses.asdict."""
        formats = {k: Format(**fields[k]) for k in ("factors", "weight", "act") if fields.get(k)}
        return cls(**{**fields, **formats})

    def nbytes(self, out_features: int, in_features: int, bias: bool = True) -> int:
        """Bytes of all tensors of such a layer, on disk and in memory."""
        total = 4 * out_features * bias + 4 * in_features * (self.scaled + self.shifted)
        if self.weight:
            total += self.weight.nbytes(out_features, in_features)
        if self.rank and self.factors:
            total += self.factors.nbytes(out_features, self.rank) + self.factors.nbytes(self.rank, in_features)
        elif self.rank:
            total += (out_features + in_features) * self.rank * getattr(torch, self.factor_dtype).itemsize
        return total


def rank_for_ratio(ratio: float, in_features: int, out_features: int) -> int:
    """round(ratio · min(in, out)), at least 1."""
    if not 0 < ratio <= 1:
        raise UserError(f"a rank ratio of {ratio} is impossible; give a number above 0 and up to 1")
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
    ) -> None:
        super().__init__()
        if spec is None:
            ratio = 1.0 if rank_ratio is None else rank_ratio
            spec = LinearSpec(rank=rank_for_ratio(ratio, in_features, out_features), rank_ratio=ratio)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self._allocate(device)

    def _allocate(self, device: torch.device | None) -> None:
        O, I, spec = self.out_features, self.in_features, self.spec
        self.register_buffer("in_scale", torch.ones(I, device=device) if spec.scaled else None)
        self.register_buffer("in_shift", torch.zeros(I, device=device) if spec.shifted else None)
        for name, shape in (("l1", (O, spec.rank)), ("l2", (spec.rank, I))):
            if spec.rank and not spec.factors:
                factor = torch.randn(shape, device=device, dtype=getattr(torch, spec.factor_dtype)) * shape[1] ** -0.5
                setattr(self, name, nn.Parameter(factor))
            else:
                setattr(self, name, None)
                self._allocate_codes(name, shape, spec.factors if spec.rank else None, device)
        self._allocate_codes("residual", (O, I), spec.weight, device)

    def _allocate_codes(
        self, name: str, shape: tuple[int, int], form: Format | None, device: torch.device | None
    ) -> None:
        if form is None:
            return
        codes, scales = ref.quantize(torch.zeros(shape, device=device), form)
        self._store(name, codes, scales, form)

    def _store(self, name: str, codes: Tensor, scales: ref.Scales, form: Format) -> None:
        self.register_buffer(f"{name}_codes", ref.pack(codes, form).contiguous())
        self.register_buffer(f"{name}_scales", scales.groups.contiguous())
        if scales.steps is not None:
            self.register_buffer(f"{name}_steps", scales.steps.contiguous())
        if scales.zeros is not None:
            self.register_buffer(f"{name}_zeros", scales.zeros.contiguous())

    def store_residual(self, codes: Tensor, scales: ref.Scales) -> None:
        """Keep these codes (O, I) and scales as the residual."""
        assert self.spec.weight is not None
        self._store("residual", codes, scales, self.spec.weight)

    @torch.no_grad()
    def store_factors(self, l1: Tensor, l2: Tensor) -> None:
        """Keep L1 (O, R) and L2 (R, I), rounded to the spec's format or float type."""
        for name, factor in (("l1", l1), ("l2", l2)):
            if self.spec.factors:
                self._store(name, *ref.quantize(factor, self.spec.factors), self.spec.factors)
            else:
                setattr(self, name, nn.Parameter(factor.to(getattr(torch, self.spec.factor_dtype)).contiguous()))

    def scales(self, name: str) -> ref.Scales:
        """The stored scales of the `residual`, or of a quantized `l1` or `l2`."""
        steps, zeros = (getattr(self, f"{name}_{part}", None) for part in ("steps", "zeros"))
        return ref.Scales(getattr(self, f"{name}_scales"), steps, zeros)

    def _matrix(self, name: str, form: Format, columns: int) -> Tensor:
        codes = ref.unpack(getattr(self, f"{name}_codes"), form, columns)
        return ref.dequantize(codes, self.scales(name), form)

    def residual(self) -> Tensor:
        """The quantized residual as fp32 (O, I); zeros where there is none."""
        if self.spec.weight is None:
            return torch.zeros(self.out_features, self.in_features)
        return self._matrix("residual", self.spec.weight, self.in_features)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """L1 (O, R) and L2 (R, I) as fp32."""
        if self.spec.factors and self.spec.rank:
            return (
                self._matrix("l1", self.spec.factors, self.spec.rank),
                self._matrix("l2", self.spec.factors, self.in_features),
            )
        if self.l1 is None or self.l2 is None:
            return torch.zeros(self.out_features, 0), torch.zeros(0, self.in_features)
        return self.l1.float(), self.l2.float()

    def effective_weight(self) -> Tensor:
        """The weight (O, I) that multiplies the untransformed input, fp32."""
        l1, l2 = self.low_rank()
        weight = self.residual().to(l1.device) + l1 @ l2
        weight = ref.rotate(weight, self.spec.hadamard)
        return weight if self.in_scale is None else weight / self.in_scale

    def transform(self, x: Tensor) -> Tensor:
        """x̂, fp32"""
        x = x.float()
        if self.in_shift is not None:
            x = x - self.in_shift
        if self.in_scale is not None:
            x = x * self.in_scale.reciprocal()  # as every backend does: codes are equal bit for bit
        return ref.rotate(x, self.spec.hadamard)

    def forward(self, x: Tensor) -> Tensor:
        hat = self.transform(x)  # (…, I)
        y: Tensor | None = None
        if self.spec.weight is not None:
            rounded = ref.fake_quantize(hat, self.spec.act) if self.spec.act else hat
            y = F.linear(rounded, self.residual())  # (…, O)
        if self.spec.rank:
            l1, l2 = self.low_rank()
            branch = F.linear(F.linear(hat, l2), l1)  # (…, R) then (…, O)
            y = branch if y is None else y + branch
        assert y is not None, "an SVDLinear without residual and without factors"
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank_ratio: float) -> "SVDLinear":
        """The truncated SVD of a Linear, float factors, √S on either side."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, rank_ratio, device=linear.weight.device
        )
        U, S, Vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        root = S[: layer.spec.rank].sqrt()
        layer.store_factors((U[:, : len(root)] * root).float(), (root[:, None] * Vh[: len(root)]).float())
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().float().clone())
        return layer

    @torch.no_grad()
    def quantize_parameters(self, num_bits: int = 8) -> "SVDLinear":
        """Replace float factors by `num_bits`-bit codes: a scale a row of L1 and a rank row of L2. Returns self."""
        if self.l1 is None or self.l2 is None:
            raise UserError("this layer's factors are already quantized, or it has none; quantize a float layer once")
        l1, l2 = self.l1.float(), self.l2.float()
        self.l1 = self.l2 = None
        self.spec = replace(self.spec, factors=Format(num_bits))
        self.store_factors(l1, l2)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, rank={spec.rank}"]
        parts += [f"{k}={v}" for k, v in (("weight", spec.weight), ("act", spec.act), ("factors", spec.factors)) if v]
        return ", ".join(parts)


def quantized_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """Every SVDLinear of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every nn.Linear of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def swap(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in place of the sub-module called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def layer_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """JSON-able specs of a model's quantized layers; empty for a float model."""
    return {name: asdict(layer.spec) for name, layer in quantized_layers(model).items()}


def rebuild_(model: nn.Module, specs: dict[str, dict[str, Any]]) -> None:
    """Swap in empty SVDLinears of these specs, on the device of the linears they replace (meta too)."""
    for name, fields in specs.items():
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise UserError(f"{name} is a {type(old).__name__}, not a Linear; the file does not fit this model")
        layer = SVDLinear(
            old.in_features,
            old.out_features,
            old.bias is not None,
            spec=LinearSpec.from_dict(fields),
            device=old.weight.device,
        )
        swap(model, name, layer)
