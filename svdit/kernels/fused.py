"""The definition of what backends fuse around a linear, in plain torch: norm and modulation, activations, attention.

Floats of faster backends differ by rounding. No image depends on the others.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels.layer import HeadNorms, Linear, Modulation, Residual, Rotation


def by_image(core: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`core`, (N, T, I) to (N, T, O), for one image after the other on a CPU.

    A float product rounds by its number of rows, and one code that tips over changes more than rounding does.
    """

    def call(x: Tensor) -> Tensor:
        return torch.cat([core(image) for image in torch.split(x, 1)]) if x.device.type == "cpu" else core(x)

    return call


def rms_norm(x: Tensor) -> Tensor:
    """x (…, D) / √(mean x² + 1e-6)"""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def modulated(x: Tensor, modulation: Modulation) -> Tensor:
    """norm(x) · (1 + scale) + shift of x (N, T, D)."""
    x = rms_norm(x) if modulation.rms else F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + modulation.scale[:, None]) + modulation.shift[:, None]


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU of x (…), x / (1 + e^−2√(2/π)(x + 0.044715 x³)).

    On a CPU an element's result does not depend on its place; torch's own gelu treats the ends of a tensor otherwise.
    """
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    return x / (1 + (x * (x * x * 0.044715 + 1) * -math.sqrt(8 / math.pi)).exp())


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^−x) of x (…), as `gelu`."""
    return x / (1 + (-x).exp())


def gated(x: Tensor) -> Tensor:
    """silu(a) · b of the halves a and b of x (…, 2D): (…, D), fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return silu(a) * b


def composed(core: Callable[[Tensor], Tensor]) -> Linear:
    """`core`, (N, T, I) to (N, T, O), with everything around it from torch's own operations."""

    activation = gelu

    def call(
        x: Tensor,
        *,
        modulation: Modulation | None = None,
        gelu: bool = False,
        residual: Residual | None = None,
        glu: bool = False,
    ) -> Tensor:
        x = gated(x) if glu else x
        x = x if modulation is None else modulated(x, modulation)
        y = core(x)
        y = activation(y) if gelu else y
        return y if residual is None else residual.x.add_(residual.gate[:, None] * y)

    return call


# fmt: off
def attention(qkv: Tensor, heads: int, norms: HeadNorms | None = None, rotation: Rotation | None = None) -> Tensor:
    """softmax(q kᵀ / √head) v of (N, T, 3D) to (N, T, D), q and k first normed and rotated where that is asked for."""
    N, T, width = qkv.shape
    qkv = prepared(qkv.view(N, T, 3, heads, -1), norms, rotation)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # (N, heads, T, head) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, width // 3)


def prepared(qkv: Tensor, norms: HeadNorms | None, rotation: Rotation | None) -> Tensor:
    """qkv (N, T, 3, heads, head) with the norms and the rotation of q and k, computed in fp32."""
    if norms is None and rotation is None:
        return qkv
    qk = qkv[:, :, :2].float()                                                      # (N, T, 2, heads, head)
    qk = qk if norms is None else head_norms(qk, norms)
    qk = qk if rotation is None else rotated(qk, rotation)
    return torch.cat([qk.to(qkv.dtype), qkv[:, :, 2:]], dim=2)


def head_norms(qk: Tensor, norms: HeadNorms) -> Tensor:
    """qk (N, T, 2, heads, head), each row of a head normed."""
    if norms.bias is None:
        return rms_norm(qk) * norms.weight[:, None]
    return F.layer_norm(qk, qk.shape[-1:], eps=1e-5) * norms.weight[:, None] + norms.bias[:, None]


def rotated(qk: Tensor, rotation: Rotation) -> Tensor:
    """qk (N, T, 2, heads, head), pairs of neighbors turned by the angles of their token."""
    cos, sin = (table[:, None, None] for table in rotation)                         # (T, 1, 1, head)
    turned = torch.stack([-qk[..., 1::2], qk[..., 0::2]], dim=-1).flatten(-2)
    return qk * cos + turned * sin
# fmt: on
