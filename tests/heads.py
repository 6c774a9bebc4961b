"""Random attention with norms and rotation of queries and keys, and its value in float64 by torch's modules."""

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels.layer import HeadNorms, Rotation

NORMS = {"none": (), "rms": ("weight",), "layer": ("weight", "bias")}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_inputs(
    N: int, T: int, heads: int, head: int, norm: str, turn: bool
) -> tuple[Tensor, HeadNorms | None, Rotation | None]:
    """qkv (N, T, 3D), norms and angles."""
    weights = [normal(2, head, seed=i + 1) + 1 - i for i, _ in enumerate(NORMS[norm])]
    angles = (normal(T, head // 2, seed=3) * 3).repeat_interleave(2, 1)
    rotation = Rotation(angles.cos(), angles.sin()) if turn else None
    return normal(N, T, 3 * heads * head) * 2, HeadNorms(*weights) if weights else None, rotation


def queries_and_keys(
    qkv: Tensor, heads: int, norms: HeadNorms | None, rotation: Rotation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (N, heads, T, head) in float64; a pair of neighbors is a complex number, multiplied by e^{iθ}."""
    q, k, v = qkv.double().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if norms is not None and norms.bias is None:
        q, k = (F.rms_norm(x, x.shape[-1:], w.double(), 1e-6) for x, w in zip((q, k), norms.weight, strict=True))
    elif norms is not None and norms.bias is not None:
        parameters = zip((q, k), norms.weight.double(), norms.bias.double(), strict=True)
        q, k = (F.layer_norm(x, x.shape[-1:], w, b, 1e-5) for x, w, b in parameters)
    if rotation is not None:
        turn = torch.complex(rotation.cos[:, ::2].double(), rotation.sin[:, ::2].double())
        pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        q, k = (torch.view_as_real(x * turn).flatten(-2) for x in pairs)
    return q, k, v


def attention_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, T, D)"""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
