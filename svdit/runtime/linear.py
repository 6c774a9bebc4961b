"""A packed layer as a module: (…, I) to (…, O), or with the steps around it fused.

Under torch.compile a packed layer is one custom operator, which is not traced into, so no graph breaks.
"""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels import reference as ref
from svdit.kernels.layer import Linear, Modulation, Residual
from svdit.quant.linear import SVDLinear

NUMBERS, LAYERS = count(), WeakValueDictionary[int, "FastLinear"]()


class FastLinear(nn.Module):
    """A layer packed for inference. It cannot be saved, copied, moved or trained; with `debug` its inputs are checked.

    `reason`: why the backend does not support the layer, which then runs in fp32; None for a layer not quantized.
    """

    def __init__(
        self, linear: Linear, outputs: int, name: str, reason: str | None, device: torch.device, debug: bool
    ) -> None:
        super().__init__()
        self.linear, self.outputs, self.name, self.reason, self.debug = linear, outputs, name, reason, debug
        self.device, self.dtype = device, getattr(linear, "dtype", torch.float32)
        self.number = next(NUMBERS)
        LAYERS[self.number] = self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = self.fused(x.reshape(1, -1, x.shape[-1]).float())
        return y.view(*x.shape[:-1], -1).to(x.dtype)  # (…, O)

    def fused(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        """(N, T, I) to (N, T, O), as `kernels.layer.Linear`. With `debug` raises UserError for NaN or Inf."""
        if self.debug and not all(bool(p.isfinite().all()) for p in (x, *(modulation or ()), *(residual or ()))):
            raise UserError(f"the input of layer {self.name} contains NaN or Inf; check the layers before it")
        if not torch.compiler.is_compiling():
            return self.linear(x, modulation=modulation, gelu=gelu, residual=residual)
        shift, scale = modulation or (None, None)
        if residual is None:
            return linear(self.number, x, shift, scale, gelu)
        linear_(self.number, x, shift, scale, gelu, residual.gate, residual.x)
        return residual.x

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raises UserError if `fn`, tensors (…) to tensors, moves or casts."""
        before = torch.empty(0, device=self.device)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise UserError(
                f"accelerated layers stay on {before.device} in their own types; move the model before accelerating it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastLinear":
        self.check_move(fn)
        return self

    def _save_to_state_dict(self, *args: object) -> None:
        raise UserError("an accelerated model cannot be saved; save the quantized model before accelerating it")

    def __reduce_ex__(self, protocol: object) -> str:
        """For copy and pickle. Raises UserError."""
        raise UserError(
            "an accelerated model cannot be copied or pickled; copy the quantized model, then accelerate it"
        )


def packed_floats(weight: Tensor, bias: Tensor | None, name: str, backend: str, debug: bool = False) -> FastLinear:
    """A layer of float weight (O, I) and bias (O,)."""
    linear = ops.float_linear(weight.detach(), None if bias is None else bias.detach(), backend)
    return FastLinear(linear, len(weight), name, None, weight.device, debug)


def packed(module: nn.Module, name: str, backend: str, debug: bool = False, inner: bool = False) -> FastLinear:
    """The layer `module` packed for a backend; an SVDLinear is left without memory. `inner` as in `ops.pack`."""
    if type(module) is nn.Linear:
        return packed_floats(module.weight, module.bias, name, backend, debug)
    if not isinstance(module, SVDLinear):
        weight = next(module.parameters())
        linear = ref.composed(ref.by_image(lambda x: module(x.float())))
        return FastLinear(linear, len(weight), name, None, weight.device, debug)
    with torch.no_grad():
        layer = module.layer()
        reason = ops.unsupported(layer.spec, layer.shape, backend, layer.device)
        linear = ops.pack(layer.detached(), backend, inner)
    module.to("meta")
    return FastLinear(linear, module.out_features, name, reason, layer.device, debug)


def _modulation(shift: Tensor | None, scale: Tensor | None) -> Modulation | None:
    return None if shift is None or scale is None else Modulation(shift, scale)


@torch.library.custom_op("svdit::linear", mutates_args=())
def linear(number: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, gelu: bool) -> Tensor:
    """The layer of that number: (N, T, I) to (N, T, O)."""
    return LAYERS[number].linear(x, modulation=_modulation(shift, scale), gelu=gelu)


@linear.register_fake
def _(number: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, gelu: bool) -> Tensor:
    layer = LAYERS[number]
    return x.new_empty(*x.shape[:-1], layer.outputs, dtype=layer.dtype)


@torch.library.custom_op("svdit::linear_", mutates_args=("stream",))
def linear_(
    number: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, gelu: bool, gate: Tensor, stream: Tensor
) -> None:
    """The same, times the gate (N, O) and added to the stream (N, T, O)."""
    LAYERS[number].linear(x, modulation=_modulation(shift, scale), gelu=gelu, residual=Residual(stream, gate))


@torch.library.custom_op("svdit::attention", mutates_args=())
def attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of the backend `cpu`: (N, T, 3D) to (N, T, D)."""
    return ops.attention(qkv, heads, "cpu")


@attention.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=torch.float32)
