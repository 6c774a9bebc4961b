"""A packed layer as a module: (…, I) to (…, O), or with the steps around it fused.

Under torch.compile a packed layer is one custom operator, which is not traced into, so no graph breaks.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.fused import by_image, composed
from svdit.kernels.layer import HeadNorms, Linear, Modulation, Residual, Rotation
from svdit.quant.linear import SVDLinear

NUMBERS, LAYERS = count(), WeakValueDictionary[int, "FastLinear"]()


class PackedWeight(Tensor):
    """The weight of a packed layer: type, shape and device, without values."""

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "PackedWeight":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, *args: object, **kwargs: object) -> None:
        """Raises UserError."""
        raise UserError("an accelerated layer has packed weights only; read them before accelerating the model")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class FastLinear(nn.Module):
    """A layer packed for inference. It cannot be saved, copied, moved or trained; with `debug` its inputs are checked.

    As of an nn.Linear there are `in_features`, `out_features`, `bias` and `weight`, a quantized one without values; the
    packed tensors are buffers. `reason`: why the backend does not support the layer, which then runs in fp32; None for
    a layer not quantized.
    """

    def __init__(
        self, linear: Linear, weight: Tensor, bias: Tensor | None, name: str, reason: str | None, debug: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.device = weight, bias, weight.device
        self.out_features, self.in_features = weight.shape
        self.linear, self.outputs, self.name, self.reason, self.debug = linear, len(weight), name, reason, debug
        self.dtype = getattr(linear, "dtype", torch.float32)
        for i, tensor in enumerate({id(tensor): tensor for tensor in held_tensors(linear)}.values()):
            self.register_buffer(f"packed{i}", tensor, persistent=False)
        self.number = next(NUMBERS)
        LAYERS[self.number] = self

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear has
        """(…, I) to (…, O), without gradients. Raises UserError for another width."""
        if input.shape[-1] != self.in_features:
            raise UserError(f"the input of layer {self.name} has {input.shape[-1]} columns, not {self.in_features}")
        if not input.numel():
            return input.new_zeros(*input.shape[:-1], self.out_features)
        with torch.autocast(input.device.type, enabled=False):
            y = self.fused(input.reshape(1, -1, self.in_features).float())
        return y.view(*input.shape[:-1], self.out_features).to(input.dtype)  # (…, O)

    def fused(
        self,
        x: Tensor,
        *,
        modulation: Modulation | None = None,
        gelu: bool = False,
        residual: Residual | None = None,
        glu: bool = False,
    ) -> Tensor:
        """(N, T, I or 2I) to (N, T, O), as `kernels.layer.Linear`. With `debug` raises UserError for NaN or Inf."""
        if self.debug:
            self.check(x, *(modulation or ())[:2], *(residual or ()))
        if not torch.compiler.is_compiling():
            return self.linear(x, modulation=modulation, gelu=gelu, residual=residual, glu=glu)
        shift, scale, rms = modulation or (None, None, False)
        if residual is None:
            return linear(self.number, x, shift, scale, rms, gelu, glu)
        linear_(self.number, x, shift, scale, rms, gelu, glu, residual.gate, residual.x)
        return residual.x

    def check(self, *read: Tensor) -> None:
        """Raises UserError for a tensor (…) that contains NaN or Inf."""
        if not all(bool(part.isfinite().all()) for part in read):
            raise UserError(f"the input of layer {self.name} contains NaN or Inf; check the layers before it")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastLinear":
        check_move(self, fn)
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        refuse_loading()

    def _save_to_state_dict(self, *args: object) -> None:
        raise UserError("an accelerated model cannot be saved; save the quantized model before accelerating it")

    def __reduce_ex__(self, protocol: object) -> str:
        """For copy and pickle. Raises UserError."""
        raise UserError(
            "an accelerated model cannot be copied or pickled; copy the quantized model, then accelerate it"
        )


def packed_floats(weight: Tensor, bias: Tensor | None, name: str, backend: str, debug: bool = False) -> FastLinear:
    """A layer of float weight (O, I) and bias (O,)."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return FastLinear(ops.float_linear(weight, bias, backend), weight, bias, name, None, debug)


def refuse_loading() -> NoReturn:
    """Raises UserError: packed layers would keep what they have."""
    raise UserError(
        "an accelerated model cannot load a state dict; load it into the quantized model before accelerating it"
    )


def check_move(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raises UserError if `fn`, tensors (…) to tensors, would move or cast a packed layer of `model`."""
    for layer in model.modules():
        if isinstance(layer, FastLinear):
            before = torch.empty(0, device=layer.device)
            after = fn(before)
            if (after.device, after.dtype) != (before.device, before.dtype):
                raise UserError(
                    f"accelerated layers stay on {before.device} in their own types; move the model before "
                    "accelerating it"
                )


def held_tensors(part: object) -> Iterator[Tensor]:
    """The tensors (…) that a packed layer, a callable, keeps in attributes and closures."""
    if isinstance(part, Tensor):
        yield part
        return
    if isinstance(part, Mapping | list | tuple):
        parts = part.values() if isinstance(part, Mapping) else part
    elif isinstance(part, partial):
        parts = [part.func, *part.args]
    elif cells := getattr(part, "__closure__", None):
        parts = [cell.cell_contents for cell in cells]
    else:
        parts = vars(part).values() if type(part).__module__.startswith("svdit.kernels") else []
    for each in parts:
        yield from held_tensors(each)


def packed(module: nn.Module, name: str, backend: str, debug: bool = False, inner: bool = False) -> FastLinear:
    """The layer `module` packed for a backend; an SVDLinear is left without memory. `inner` as in `ops.pack`."""
    if type(module) is nn.Linear:
        return packed_floats(module.weight, module.bias, name, backend, debug)
    if not isinstance(module, SVDLinear):
        linear = composed(by_image(lambda x: module(x.float())))
        return FastLinear(linear, next(module.parameters()).detach(), None, name, None, debug)
    with torch.no_grad():
        layer = module.layer().detached()
        reason = ops.unsupported(layer.spec, layer.shape, backend, layer.device)
        linear = ops.pack(layer, backend, inner)
    weight = PackedWeight(layer.shape, module.dtype, layer.device)
    module.to("meta")
    return FastLinear(linear, weight, layer.bias, name, reason, debug)


def _modulation(shift: Tensor | None, scale: Tensor | None, rms: bool) -> Modulation | None:
    return None if shift is None or scale is None else Modulation(shift, scale, rms)


@torch.library.custom_op("svdit::linear", mutates_args=())
def linear(
    number: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, rms: bool, gelu: bool, glu: bool
) -> Tensor:
    """The layer of that number: (N, T, I or 2I) to (N, T, O)."""
    return LAYERS[number].linear(x, modulation=_modulation(shift, scale, rms), gelu=gelu, glu=glu)


@linear.register_fake
def _(number: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, rms: bool, gelu: bool, glu: bool) -> Tensor:
    layer = LAYERS[number]
    return x.new_empty(*x.shape[:-1], layer.outputs, dtype=layer.dtype)


@torch.library.custom_op("svdit::linear_", mutates_args=("stream",))
def linear_(
    number: int,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rms: bool,
    gelu: bool,
    glu: bool,
    gate: Tensor,
    stream: Tensor,
) -> None:
    """The same, times the gate (N, O) and added to the stream (N, T, O)."""
    modulation, residual = _modulation(shift, scale, rms), Residual(stream, gate)
    LAYERS[number].linear(x, modulation=modulation, gelu=gelu, residual=residual, glu=glu)


@torch.library.custom_op("svdit::attention", mutates_args=())
def attention(
    qkv: Tensor,
    heads: int,
    backend: str,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """Attention of a backend with kernels for it, with optional norms and rotation: (N, T, 3D) to (N, T, D)."""
    norms = None if weight is None else HeadNorms(weight, bias)
    rotation = None if cos is None or sin is None else Rotation(cos, sin)
    return ops.attention(qkv, heads, backend, norms=norms, rotation=rotation)


@attention.register_fake
def _(qkv: Tensor, heads: int, *_: object) -> Tensor:
    dtype = torch.bfloat16 if qkv.is_cuda else torch.float32
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=dtype)
