"""Attention on a CUDA device: queries and keys normed and rotated by a Triton kernel, then torch's attention."""

import torch.nn.functional as F
import triton
from torch import Tensor

from svdit.kernels.cuda.heads import prepare
from svdit.kernels.cuda.linear import check_rows, device_of
from svdit.kernels.layer import HeadNorms, Rotation

ELEMENTS = 2048  # of a program: 64 registers a thread


def prepared(qkv: Tensor, norms: HeadNorms | None, rotation: Rotation | None) -> Tensor:
    """qkv (N, T, 3, heads, head) to queries and keys (N, T, 2, heads, head), normed and rotated where asked for."""
    N, T, _, heads, head = qkv.shape
    weight, bias = norms or (None, None)
    cos, sin = rotation or (None, None)
    for table, rows in ((weight, 2), (bias, 2), (cos, T), (sin, T)):
        if table is not None:
            check_rows(table, (rows, head), qkv)
    check_rows(qkv, (N, T, 3, heads, head), qkv)
    out = qkv.new_empty(N, T, 2, heads, head)
    M, width = N * T * 2 * heads, triton.next_power_of_2(head)
    block = max(1, ELEMENTS // width)
    with device_of(qkv):
        prepare[triton.cdiv(M, block),](
            qkv, weight, bias, cos, sin, out, M, T, heads,
            HEAD=head, PADDED=width, BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip
    return out


# fmt: off
def prepared_attention(qkv: Tensor, heads: int, norms: HeadNorms | None, rotation: Rotation | None) -> Tensor:
    """`kernels.fused.attention`, (N, T, 3D) to (N, T, D), q and k first normed and rotated."""
    N, T, width = qkv.shape
    qkv = qkv.contiguous().view(N, T, 3, heads, -1)
    q, k = prepared(qkv, norms, rotation).permute(2, 0, 3, 1, 4)                    # (N, heads, T, head) each
    v = qkv[:, :, 2].transpose(1, 2)                                                # (N, heads, T, head)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, width // 3)
# fmt: on
