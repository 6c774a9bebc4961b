"""The integer product on a GPU and what follows it: residual + gate · gelu(scales · codes + bias + low L1ᵀ).

Tiles are (outputs, rows): four-bit weights are expanded in registers, from where the tensor cores of Hopper take
their left operand only. Byte j of 64 holds column j below and column 64 + j above, so that nothing is interleaved and
a group's multiple is one number a row. Depth is padded with zeros to a multiple of 128. Sums are exact in int32; with
group scales of activations (W4A4) they are exact within a group.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(v):
    """GELU in its tanh form, as v · sigmoid(2u)."""
    u = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    return v / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def plus(acc, w, a, steps, GROUPED: tl.constexpr):
    """acc + w a, times the steps of this group where activations have one for each."""
    if GROUPED:
        return acc + tl.dot(w, a, out_dtype=tl.int32).to(tl.float32) * tl.load(steps)[None, :]
    else:  # noqa: RET505 — compiled even where the branch above returns
        return tl.dot(w, a, acc, out_dtype=tl.int32)


@triton.jit
def widened(nibbles, multiples, at):
    """Nibbles 0 … 15 to int8 codes −8 … 7, times a multiple a row."""
    codes = nibbles.to(tl.int8) - 8
    if multiples is not None:
        codes = codes * tl.load(multiples + at)[:, None]
    return codes


@triton.jit
def tile(M, O, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr):
    """Rows and outputs of this program: eight tiles of rows side by side, so that their weights are in cache."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    first = tl.program_id(0) // (8 * across) * 8
    high = tl.minimum(down - first, 8)
    within = tl.program_id(0) % (8 * across)
    return first + within % high, within // high


@triton.jit
def halves(y):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def finish(y, bias, gate, out, first, other, M, O, tokens, stride, GELU: tl.constexpr):
    """Write the tile whose first row is `first` and whose first output is `other`."""
    r, c = tl.arange(0, y.shape[1]), tl.arange(0, y.shape[0])
    inside = (first + r < M)[None, :] & (other + c < O)[:, None]
    at = out + first.to(tl.int64) * O + other + (r[None, :] * O + c[:, None])
    if bias is not None:
        y += tl.load(bias + other + c, mask=other + c < O, other=0.0)[:, None]
    if GELU:
        y = gelu(y)
    if gate is not None:
        image = tl.minimum(first + r, M - 1) // tokens
        g = tl.load(gate + (image * stride)[None, :] + (other + c)[:, None], mask=inside, other=0.0)
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32) + g * y
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sums(codes, steps, weight, multiples, m, o, O, width, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """Σ weight · code over the depth, for outputs o and rows m counted from where the pointers are."""
    HALF: tl.constexpr = 64
    BLOCK_K: tl.constexpr = HALF if GROUPED or BITS == 4 else 2 * HALF
    k = tl.arange(0, BLOCK_K)
    a_at = m[None, :] * width + k[:, None]
    w_at = o[:, None] * (width * BITS // 8) + k[None, :]
    steps += m * (width // HALF) if GROUPED else m
    acc = tl.zeros((o.shape[0], m.shape[0]), tl.float32 if GROUPED else tl.int32)
    for _ in range(0, width, BLOCK_K * 8 // BITS):
        if BITS == 4:
            pair = tl.load(weight + w_at)
            acc = plus(acc, widened(pair & 15, multiples, o), tl.load(codes + a_at), steps, GROUPED)
            codes += BLOCK_K
            steps += GROUPED
            acc = plus(acc, widened(pair >> 4, multiples, O + o), tl.load(codes + a_at), steps, GROUPED)
            if multiples is not None:
                multiples += 2 * O
        else:
            acc = plus(acc, tl.load(weight + w_at), tl.load(codes + a_at), steps, GROUPED)
        codes += BLOCK_K
        steps += GROUPED
        weight += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["M", "rank", "tokens", "stride", "tuned_for"])
def multiply(
    codes, steps, low, weight, multiples, channel, bias, l1, gate, out,
    M, O, width, rank, tokens, stride, tuned_for,
    BITS: tl.constexpr, GROUPED: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """codes (M, width) int8, weight (O, width) int8 or (O, width / 2) bytes, out (M, O).

    steps (M,), or (M, width / 64) where GROUPED; multiples (width / 64, O) int8; channel and bias (O,);
    low (M, rank) and l1 (O, rank), rank a multiple of BLOCK_R; gate (M / tokens, O), rows `stride` apart, with which
    the product is added to `out`. Multiples, bias, l1 and gate may be None.
    """
    down, across = tile(M, O, BLOCK_M, BLOCK_O)
    first, other = down * BLOCK_M, across * BLOCK_O
    m, o = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first), tl.minimum(tl.arange(0, BLOCK_O), O - 1 - other)
    above, before = first.to(tl.int64), other.to(tl.int64)
    steps += above * (width // 64) if GROUPED else above
    here = None if multiples is None else multiples + other
    acc = sums(codes + above * width, steps, weight + before * (width * BITS // 8), here, m, o, O, width, BITS, GROUPED)
    size = tl.load(channel + other + o)[:, None]
    y = acc.to(tl.float32) * size
    if not GROUPED:
        y *= tl.load(steps + m)[None, :]
    if l1 is not None:
        r = tl.arange(0, BLOCK_R)
        for start in tl.range(0, rank, BLOCK_R, num_stages=1):
            left = tl.load(l1 + before * rank + start + (o[:, None] * rank + r[None, :]))
            right = tl.load(low + above * rank + start + (m[None, :] * rank + r[:, None]))
            y = tl.dot(left, right, y, input_precision="ieee")
    pieces: tl.constexpr = 4 if BLOCK_M * BLOCK_O > 16384 else 2 if BLOCK_M * BLOCK_O > 4096 else 1
    PIECE: tl.constexpr = BLOCK_M // pieces
    if pieces == 1:
        finish(y, bias, gate, out, first, other, M, O, tokens, stride, GELU)
    else:
        y0, y1 = halves(y)
        if pieces == 2:
            finish(y0, bias, gate, out, first, other, M, O, tokens, stride, GELU)
            finish(y1, bias, gate, out, first + PIECE, other, M, O, tokens, stride, GELU)
        else:
            y00, y01 = halves(y0)
            finish(y00, bias, gate, out, first, other, M, O, tokens, stride, GELU)
            finish(y01, bias, gate, out, first + PIECE, other, M, O, tokens, stride, GELU)
            y10, y11 = halves(y1)
            finish(y10, bias, gate, out, first + 2 * PIECE, other, M, O, tokens, stride, GELU)
            finish(y11, bias, gate, out, first + 3 * PIECE, other, M, O, tokens, stride, GELU)


@triton.jit(do_not_specialize=["M"])
def weigh(
    x, weight, scales, bias, out, M, O, K, width,
    BITS: tl.constexpr, GROUPED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Weight-only: out (M, O) fp32 of x (M, K) fp32, weights as for `multiply`, scales (O,) or (width / 64, O) fp32.

    Where SPLIT, products are those of bfloat16: x is the sum of two such numbers, and codes are exact in one.
    """
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    outputs = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    m, o = tl.minimum(rows, M - 1), tl.minimum(outputs, O - 1)
    HALF: tl.constexpr = 64
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for start in range(0, width, HALF):
        k = start + tl.arange(0, HALF)
        if BITS == 4:
            byte = start // 2 - start % 128 // 2 + tl.arange(0, HALF)
            pair = tl.load(weight + o[:, None] * (width // 2) + byte[None, :])
            w = ((pair >> (start % 128 // 16)) & 15).to(tl.int8) - 8
        else:
            w = tl.load(weight + o[:, None] * width + k[None, :])
        v = tl.load(x + m[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)
        if SPLIT:
            high = v.to(tl.bfloat16)
            part = tl.dot(w.to(tl.bfloat16), high)
            part = tl.dot(w.to(tl.bfloat16), (v - high.to(tl.float32)).to(tl.bfloat16), part)
        else:
            part = tl.dot(w.to(tl.float32), v, input_precision="ieee")
        acc += part * tl.load(scales + start // HALF * O + o)[:, None] if GROUPED else part
    if not GROUPED:
        acc *= tl.load(scales + o)[:, None]
    if bias is not None:
        acc += tl.load(bias + o)[:, None]
    tl.store(out + rows[None, :] * O + outputs[:, None], acc, mask=(rows < M)[None, :] & (outputs < O)[:, None])
