"""Activations to codes on a GPU: silu(a) · b, norm, modulation, in_shift, in_scale, Hadamard, scales, low-rank product.

A program takes BLOCK_M whole rows, BLOCK_K columns at a time: once for the norm, once for the largest magnitude and
x̂ L2ᵀ, once for the codes; only the first reading comes from memory. Sums, products and quotients are those of
reference.py in its order (compile without fused multiply-adds), so that without norm and silu the codes are its, bit
for bit. A row with a NaN or infinity gets a scale that is NaN. Works on columns padded with zeros to `width`.
"""

import triton
import triton.language as tl


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22: 1.5 · 2^23 leaves no bits below one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_bf16(x):
    """To the nearest bfloat16, ties to even, as fp32."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def rotate(x, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """(rows, columns) times the block-diagonal Hadamard matrix but for its factor: neighbours at distance 1, 2, 4 …"""
    rows: tl.constexpr = x.shape[0] * x.shape[1] // BLOCK
    y = tl.reshape(x, (rows, BLOCK))
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(y, (rows, BLOCK // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (rows, BLOCK))
    return tl.reshape(y, x.shape)


@triton.jit
def silu(a):
    """a / (1 + e^−a)"""
    return tl.div_rn(a, 1.0 + tl.exp(-a))


@triton.jit
def read(x, rows, columns, inside, K, GLU: tl.constexpr):
    """x (M, K) at these places in fp32, zeros outside; where GLU, silu(a) · b of the halves a and b of x (M, 2K)."""
    at = x + rows[:, None] * (2 * K if GLU else K) + columns[None, :]
    v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if GLU:
        v = silu(v) * tl.load(at + K, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def moments(x, rows, some, K, RMS: tl.constexpr, GLU: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a norm subtracts from whole rows, and then multiplies them by.

    Mean and one over the standard deviation, chunk by chunk (Chan, Golub & LeVeque 1979); where RMS, zero and one over
    the root of the mean square.
    """
    mean = tl.zeros(rows.shape, tl.float32)
    squares = tl.zeros(rows.shape, tl.float32)
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = some[:, None] & (columns < K)[None, :]
        v = read(x, rows, columns, inside, K, GLU)
        if RMS:
            squares += tl.sum(v * v, 1)
        else:
            n = tl.minimum(K - k, BLOCK_K).to(tl.float32)
            local = tl.sum(v, 1) / n
            d = tl.where(inside, v - local[:, None], 0.0)
            delta = local - mean
            mean += delta * (n / (k + n))
            squares += tl.sum(d * d, 1) + delta * delta * (k * n / (k + n))
    return mean, 1.0 / tl.sqrt_rn(squares / K + 1e-6)


@triton.jit
def transformed(
    x, shift, scale, in_shift, in_inverse, rows, some, k, K, place, mean, inverse,
    GLU: tl.constexpr, HADAMARD: tl.constexpr, STAGES: tl.constexpr, ROOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x̂ of columns k … k + BLOCK_K, zeros beyond K; `place` is where an image's modulation begins."""
    columns = k + tl.arange(0, BLOCK_K)
    inside = some[:, None] & (columns < K)[None, :]
    v = read(x, rows, columns, inside, K, GLU)
    if shift is not None:
        at = place[:, None] + columns[None, :]
        v = (v - mean[:, None]) * inverse[:, None]
        v = v * (1.0 + tl.load(scale + at, mask=inside, other=0.0)) + tl.load(shift + at, mask=inside, other=0.0)
    if in_shift is not None:
        v = v - tl.load(in_shift + columns)[None, :]
    if in_inverse is not None:
        v = v * tl.load(in_inverse + columns)[None, :]
    v = tl.where(inside, v, 0.0)
    if HADAMARD > 0:
        v = rotate(v, HADAMARD, STAGES) * ROOT
    return v


@triton.jit
def group_codes(v, GROUP: tl.constexpr):
    """Codes −8 … 7 and bf16 scales of every GROUP columns: the first largest magnitude comes to lie on −8."""
    rows: tl.constexpr = v.shape[0]
    groups: tl.constexpr = v.shape[1] // GROUP
    v = tl.reshape(v, (rows, groups, GROUP))
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # magnitudes in order, NaN above all
    most = tl.max(bits, 2)
    lane = tl.arange(0, GROUP)[None, None, :]
    first = tl.min(tl.where(bits == most[:, :, None], lane, GROUP), 2)
    ideal = tl.sum(tl.where(lane == first[:, :, None], v, 0.0), 2) * -0.125
    value = round_bf16(tl.where(ideal == 0, 1.0, ideal))
    ratio = tl.minimum(tl.maximum(tl.div_rn(v, tl.broadcast_to(value[:, :, None], v.shape)), -8.0), 7.0)
    value = tl.where(most >= 0x7F800000, float("nan"), value)
    return tl.reshape(round_even(ratio), (rows, groups * GROUP)), value


@triton.jit(do_not_specialize=["M", "tokens", "stride", "rank", "tuned_for"])
def quantize_rows(
    x, shift, scale, in_shift, in_inverse, l2, codes, steps, low,
    M, tokens, stride, K, width, rank, tuned_for,
    RMS: tl.constexpr, GLU: tl.constexpr, HADAMARD: tl.constexpr, STAGES: tl.constexpr, ROOT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (M, K), where GLU (M, 2K), to codes (M, width) int8, steps (M,) or (M, width / GROUP), low (M, rank) = x̂ L2ᵀ.

    shift and scale (images, K) with rows `stride` apart; in_shift and in_inverse (width,); l2 (rank, width), rank a
    multiple of BLOCK_R; each may be None. The second program axis runs over parts of the rank.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    some = rows < M
    place = rows // tokens * stride
    mean = tl.zeros((BLOCK_M,), tl.float32)
    inverse = mean
    if shift is not None:
        mean, inverse = moments(x, rows, some, K, RMS, GLU, BLOCK_K)
    most = tl.zeros((BLOCK_M,), tl.int32)
    if l2 is not None:
        part = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        projected = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if GROUP == 0 or l2 is not None:
        for k in range(0, width, BLOCK_K):
            v = transformed(x, shift, scale, in_shift, in_inverse, rows, some, k, K, place, mean, inverse,
                            GLU, HADAMARD, STAGES, ROOT, BLOCK_K)  # fmt: skip
            most = tl.maximum(most, tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
            if l2 is not None:
                factor = tl.load(l2 + part[None, :] * width + (k + tl.arange(0, BLOCK_K))[:, None])
                projected = tl.dot(v.to(factor.dtype), factor, projected, input_precision="ieee")
    if l2 is not None:
        tl.store(low + rows[:, None] * rank + part[None, :], projected.to(low.dtype.element_ty), mask=some[:, None])
    if tl.program_id(1) == 0:
        step = tl.div_rn(most.to(tl.float32, bitcast=True), tl.full((BLOCK_M,), 127.0, tl.float32))
        step = tl.where(step == 0, 1.0, step)
        if GROUP == 0:
            tl.store(steps + rows, tl.where(most >= 0x7F800000, float("nan"), step), mask=some)
        for k in range(0, width, BLOCK_K):
            v = transformed(x, shift, scale, in_shift, in_inverse, rows, some, k, K, place, mean, inverse,
                            GLU, HADAMARD, STAGES, ROOT, BLOCK_K)  # fmt: skip
            if GROUP > 0:
                code, values = group_codes(v, GROUP)
                group = k // GROUP + tl.arange(0, BLOCK_K // GROUP)
                tl.store(steps + rows[:, None] * (width // GROUP) + group[None, :], values, mask=some[:, None])
            else:
                ratio = tl.div_rn(v, tl.broadcast_to(step[:, None], v.shape))
                code = round_even(tl.minimum(tl.maximum(ratio, -127.0), 127.0))
            columns = k + tl.arange(0, BLOCK_K)
            tl.store(codes + rows[:, None] * width + columns[None, :], code.to(tl.int8), mask=some[:, None])
