"""Layers of a model as callables of the kernels' schema."""

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.layer import Composed, Layer, Linear, Modulation, Residual
from svdit.kernels.reference import Scales
from svdit.quant.linear import SVDLinear
from svdit.runtime.opaque import Opaque


def stored(layer: SVDLinear) -> Layer:
    """What an SVDLinear with a residual stores, for a backend to pack."""
    spec = layer.spec
    assert spec.weight is not None
    factors = layer.low_rank() if spec.factors and spec.rank else (layer.l1, layer.l2)
    l1, l2 = (None if factor is None else factor.detach() for factor in factors)
    groups, steps, zeros = layer.scales("residual")
    return Layer(
        stored=layer.get_buffer("residual_codes"),
        columns=layer.in_features,
        scales=Scales(groups, steps, zeros),
        weight=spec.weight,
        act=spec.act,
        bias=None if layer.bias is None else layer.bias.detach().float(),
        in_shift=layer.in_shift,
        in_scale=layer.in_scale,
        hadamard=spec.hadamard,
        l1=l1,
        l2=l2,
    )


class Plain(Composed):
    """A module as it is: a float layer, a layer of factors alone, or the reference."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def core(self, x: Tensor) -> Tensor:
        return self.module(x.float())


class Checked:
    """A layer that refuses input that is not finite and says which layer it is."""

    def __init__(self, linear: Linear, name: str) -> None:
        self.linear, self.name = linear, name

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        if not all(bool(part.isfinite().all()) for part in (x, *(modulation or ()), *(residual or ()))):
            raise UserError(f"layer {self.name} was given a number that is not finite; look at what comes before it")
        return self.linear(x, modulation=modulation, gelu=gelu, residual=residual)


class Packer:
    """Packs the layers of one model, one after the other, and frees each layer that it packed."""

    def __init__(self, backend: str, debug: bool = False) -> None:
        self.backend, self.debug = backend, debug

    def __call__(self, module: nn.Module, name: str, inner: bool = False) -> Linear:
        """The layer called `name`; a packed SVDLinear is left without memory. `inner` as in `ops.pack`."""
        linear: Linear = Plain(module)
        if isinstance(module, SVDLinear) and module.spec.weight and self.backend != "reference":
            linear = Opaque(ops.pack(stored(module), self.backend, inner), module.out_features)
            module.to("meta")
        return Checked(linear, name) if self.debug else linear


class FastLinear(nn.Module):
    """A packed layer as a module, in place of an SVDLinear of any model: (…, I) to (…, O)."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.reshape(1, -1, x.shape[-1]).float())
        return y.view(*x.shape[:-1], -1).to(x.dtype)
