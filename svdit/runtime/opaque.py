"""Packed layers as torch operators: torch.compile sees a node for each and looks no further, so no graph breaks.

Outside of torch.compile a layer is called as it is.
"""

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from svdit.kernels import ops
from svdit.kernels.layer import Linear, Modulation, Residual

NUMBERS, LAYERS = count(), WeakValueDictionary[int, "Opaque"]()


class Opaque:
    """A packed layer of `outputs` outputs."""

    def __init__(self, linear: Linear, outputs: int) -> None:
        self.linear, self.outputs, self.number = linear, outputs, next(NUMBERS)
        self.dtype: torch.dtype = getattr(linear, "dtype", torch.float32)
        LAYERS[self.number] = self

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.linear(x, modulation=modulation, gelu=gelu, residual=residual)
        shift, scale = modulation or (None, None)
        if residual is None:
            return linear(self.number, x, shift, scale, gelu)
        linear_(self.number, x, shift, scale, gelu, residual.gate, residual.x)
        return residual.x


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
    """The same, times the gate (N, O) onto the stream (N, T, O)."""
    LAYERS[number].linear(x, modulation=_modulation(shift, scale), gelu=gelu, residual=Residual(stream, gate))


@torch.library.custom_op("svdit::attention", mutates_args=())
def attention(qkv: Tensor, heads: int) -> Tensor:
    """That of the backend `cpu`: (N, T, 3D) to (N, T, D)."""
    return ops.attention(qkv, heads, "cpu")


@attention.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=torch.float32)
