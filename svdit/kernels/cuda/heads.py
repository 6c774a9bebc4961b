"""Norms and rotary positions of queries and keys on a GPU, in one pass.

A program takes BLOCK rows, each a token's query or key of one head, padded to the next power of two. Arithmetic is that
of fused.py in fp32 (compile without fused multiply-adds): a rotation alone is equal bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def turned(x):
    """(rows, columns): pairs of neighbors (a, b) become (−b, a)."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(-b, a), x.shape)


@triton.jit(do_not_specialize=["M"])
def prepare(
    qkv, weight, bias, cos, sin, out, M, tokens, heads, HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Queries and keys of qkv (images, tokens, 3, heads, HEAD) to out (images, tokens, 2, heads, HEAD): M rows.

    weight and bias (2, HEAD), cos and sin (tokens, HEAD): RMSNorm without bias, else LayerNorm; each may be None.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)[None, :]
    inside = (row < M)[:, None] & (column < HEAD)
    token, head = row // (2 * heads), row % (2 * heads)
    x = tl.load(qkv + ((token * 3 * heads + head) * HEAD)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        at = (head // heads * HEAD)[:, None] + column
        if bias is not None:
            x = tl.where(inside, x - (tl.sum(x, 1) / HEAD)[:, None], 0.0)
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / HEAD + (1e-6 if bias is None else 1e-5)))[:, None]
        x = x * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            x = x + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        at = (token % tokens * HEAD)[:, None] + column
        c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        x = x * c + turned(x) * tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (row * HEAD)[:, None] + column, x.to(out.dtype.element_ty), mask=inside)
