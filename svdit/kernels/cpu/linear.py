"""The C kernels as operations on tensors: packed layers, attention.

Integers equal those of reference.py. Floats are fp32, with two exceptions. Where there are bf16 products (amx,
avx512bf16, neonbf16, and portable, which emulates them) attention reads bf16. The low-rank branch multiplies integers
of 16 bits, called words here, on x86 and in portable, which costs 2^−12 of it where bf16 would cost 2^−9; for AMX the
numbers of x̂ and x̂ L2ᵀ are sums of two bf16. Without words factors are rounded to bf16, unless they are stored so.
"""

from collections.abc import Callable
from ctypes import Structure

import torch
from torch import Tensor

from svdit.kernels import generic
from svdit.kernels import reference as ref
from svdit.kernels.checks import check
from svdit.kernels.cpu import packing
from svdit.kernels.cpu.ffi import (
    DEPTH_STEP,
    Attention,
    Kernels,
    Product,
    Rows,
    WeightOnly,
    empty,
    pad,
    padded,
    pointer,
    row_pointer,
)
from svdit.kernels.formats import Format
from svdit.kernels.fused import composed
from svdit.kernels.layer import HeadNorms, Layer, Linear, LinearSpec, Modulation, Residual, Rotation

GROUPS = (16, 32, 64, 128, 256)  # group sizes that are summed in fp32
LONGEST = 2**16  # columns, of which the products of codes, 255 · 128 at most, sum to less than 2³¹
ALIGNMENT = 64  # of buffers, in bytes
CHUNK = 32  # columns that the weight-only kernel reads at once


def unsupported(spec: LinearSpec, shape: tuple[int, int], device: torch.device) -> str:
    """Why the kernels do not support a layer of this spec and shape (O, I); empty where they do."""
    form = spec.weight
    if form is None:
        return generic.FACTORS_ONLY
    if form.element != "int" or form.span == "unsigned" or form.bits not in (4, 8):
        return f"the CPU kernels read signed integer weights, not {form}"
    if shape[1] > LONGEST:
        return f"the sums of the CPU kernels hold {LONGEST} products, not {shape[1]}"
    return _integer(spec, spec.act, form) if spec.act else _weight_only(form, shape[1])


def _integer(spec: LinearSpec, act: Format, form: Format) -> str:
    """Integers of 4 or 8 bits, with one scale per row or scales per group that bf16 represents."""
    if act != Format(8) and (not act.group or (act.element, act.bits, act.scale) != ("int", 4, "bf16")):
        return f"the CPU kernels read INT8 activations or INT4 groups, not {act}"
    if "affine" in (act.span, form.span):
        return "the CPU kernels have no zero points beside quantized activations"
    if generic.has_integers(spec) and not act.group:
        return "" if form.group % 8 == 0 else f"groups of {form.group} are not a multiple of 8"
    sizes = sorted({form.group, act.group} - {0})
    if any(size not in GROUPS for size in sizes):
        return f"the CPU kernels sum groups of {', '.join(map(str, GROUPS))}, not {' and '.join(map(str, sizes))}"
    stored = not form.group or form.scale in ("bf16", "int8")
    return "" if stored else f"the CPU kernels read scales of groups in bf16 or int8, not {form.scale}"


def _weight_only(form: Format, I: int) -> str:
    if form.bits == 4 and I % 2:
        return f"rows of {I} 4-bit codes do not fill whole bytes"
    whole = form.groups(I) == 1 or form.group % CHUNK == 0
    return "" if whole else f"weight-only groups of {form.group} are not a multiple of {CHUNK}"


def pack(layer: Layer, kernels: Kernels, dtype: torch.dtype = torch.float32) -> Linear | None:
    """The layer for these kernels, None where they do not support it; an integer product's output is of `dtype`."""
    if unsupported(layer.spec, layer.shape, layer.device):
        return None
    return IntegerLinear(layer, kernels, dtype) if layer.spec.act else weight_only(layer, kernels)


def require(layer: Layer) -> None:
    """Raises ValueError where the kernels do not support the layer, UserError where its tensors do not fit it."""
    check(layer)
    if reason := unsupported(layer.spec, layer.shape, layer.device):
        raise ValueError(reason)


class IntegerLinear:
    """W8A8, W4A8 and W4A4: codes of activations and low-rank projection, then the integer product with its epilogue."""

    def __init__(self, layer: Layer, kernels: Kernels, dtype: torch.dtype = torch.float32) -> None:
        require(layer)
        spec, form, (O, I) = layer.spec, layer.form("residual"), layer.shape
        if spec.act is None:
            raise ValueError("the layer's activations are not quantized")
        self.kernels, self.shape, self.act, self.dtype = kernels, layer.shape, spec.act, dtype  # dtype: of the output
        self.depth, self.outputs, self.rank = padded(I, DEPTH_STEP), padded(O, kernels.panel), spec.rank
        self.low_rank = kernels.parts * padded(spec.rank, kernels.low_step)
        self.group = min({form.group, spec.act.group} - {0}, default=0)  # columns that have the same scales
        self.floats = bool(spec.act.group) or not generic.has_integers(spec)  # groups are summed in fp32
        wide = kernels.wide and form.bits == 8
        signed = wide or kernels.signed
        self.codes = torch.int16 if wide else torch.int8 if signed else torch.uint8  # of activations
        self.offset = 0 if signed else 128 if self.act.bits == 8 else -self.act.lo  # makes bytes unsigned
        branch = kernels.branch_dtype
        numbers = (self.codes.itemsize * self.depth, 4 * self.act.groups(I), branch.itemsize * self.low_rank, 4)
        self.row_bytes = numbers  # of codes, steps, x̂ L2ᵀ and its step
        self._keep(generic.with_float_factors(layer, torch.float32 if branch == torch.int16 else torch.bfloat16))
        static = {"depth": I, "rank": self.rank, "offset": self.offset}
        span = {"group": self.act.group, "lo": self.act.lo, "hi": self.act.hi}
        sums = {"group": self.group, "floats": self.floats, "row_steps": self.act.groups(I)}
        inputs = {name: None if x is None else x.data_ptr() for name, x in self.inputs.items()}
        weights = {name: None if x is None else x.data_ptr() for name, x in self.weights.items()}
        self.rows = Rows(hadamard=spec.hadamard, wide=wide, **span, **static, **inputs)
        self.product = Product(outputs=O, bits=form.bits, **sums, **static, **weights)

    def _keep(self, layer: Layer) -> None:
        """Everything the kernels read, packed; `layer` itself is not kept."""
        kernels, (O, I) = self.kernels, self.shape
        weight, sums = packing.pack_weight(layer, kernels)
        offsets = torch.zeros(self.outputs, dtype=torch.int32, device="cpu")
        offsets[:O] = self.offset * sums
        ones, zeros = (torch.full((O,), x, dtype=torch.float32, device="cpu") for x in (1, 0))
        channel = generic.row_steps(layer) if generic.has_integers(layer.spec) else ones
        self.inputs: dict[str, Tensor | None] = {
            "in_shift": None if layer.in_shift is None else pad(layer.in_shift, self.depth),
            "in_inverse": None if layer.in_scale is None else pad(layer.in_scale.reciprocal(), self.depth),
        }
        self.weights = {
            "weight": weight,
            "multiples": self._multiples(layer) if self.group else None,
            "offsets": offsets,
            "channel": pad(channel, self.outputs),
            "bias": pad(zeros if layer.bias is None else layer.bias, self.outputs),
        }
        if R := self.rank:
            l1, l2 = layer.tensors["l1"].detach(), layer.tensors["l2"].detach()
            self.inputs["l2"], self.inputs["l2_steps"] = packing.pack_l2(l2, (R, I), kernels)
            self.weights["l1"], self.weights["l1_steps"] = packing.pack_l1(l1, (O, R), kernels)

    def _multiples(self, layer: Layer) -> Tensor:
        """One number per group of columns, (panels, G, panel): int8, or bf16 where groups are summed in fp32."""
        (O, I), panel = self.shape, self.kernels.panel
        G = I // self.group
        whole = torch.zeros(self.outputs, G, dtype=torch.bfloat16 if self.floats else torch.int8, device="cpu")
        if layer.form("residual").group:
            groups = ref.layer_scales(layer).groups
            whole[:O] = groups.repeat_interleave(G // groups.shape[1], 1)  # activations may have smaller groups
        else:
            whole[:O] = 1
        return whole.view(-1, panel, G).transpose(1, 2).contiguous()

    def quantize(self, x: Tensor, modulation: Modulation | None = None, glu: bool = False) -> tuple[Tensor, ...]:
        """x (N, T, I or 2I) to codes (M, padded I) with the offset, steps (M, groups), x̂ L2ᵀ (M, padded R) and the
        steps of its words (M, 1)."""
        M, groups = x.shape[0] * x.shape[1], self.act.groups(self.shape[1])
        codes = torch.empty(M, self.depth, dtype=self.codes, device="cpu")
        steps = torch.empty(M, groups, dtype=torch.float32, device="cpu")
        low = torch.empty(M, self.low_rank, dtype=self.kernels.branch_dtype, device="cpu")
        low_steps = torch.zeros(M, 1, dtype=torch.float32, device="cpu")
        call = self._rows(x, modulation, glu)
        call.codes, call.steps = codes.data_ptr(), steps.data_ptr()
        call.low, call.low_steps = low.data_ptr(), low_steps.data_ptr()
        self.kernels.call("quantize_rows", call)
        return codes, steps, low, low_steps

    def multiply(
        self, quantized: tuple[Tensor, ...], N: int, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        """The results of `quantize` for N images to (N, T, O)."""
        codes, steps, low, low_steps = quantized
        M = len(codes)
        out, call = self._product(N, M // max(N, 1), gelu, residual)
        call.codes = pointer(codes, self.codes, (call.rows, self.depth))
        call.steps = pointer(steps, torch.float32, (call.rows, self.act.groups(self.shape[1])))
        call.low = pointer(low, self.kernels.branch_dtype, (call.rows, self.low_rank))
        call.low_steps = pointer(low_steps, torch.float32, (call.rows, 1))
        self.kernels.call("multiply", call)
        return out

    def _rows(self, x: Tensor, modulation: Modulation | None, glu: bool) -> Structure:
        """The call that quantizes x (N, T, I or 2I), except where to."""
        (N, T, _), I = x.shape, self.shape[1]
        call = Rows.from_buffer_copy(self.rows)
        call.rows, call.tokens, call.glu, call.bf16 = N * T, T, glu, x.dtype == torch.bfloat16
        call.x = pointer(x, torch.bfloat16 if call.bf16 else torch.float32, (N, T, 2 * I if glu else I))
        if modulation is not None:
            call.stride, call.rms = modulation.shift.stride(0), modulation.rms
            call.shift = row_pointer(modulation.shift, N, I, call.stride)
            call.scale = row_pointer(modulation.scale, N, I, call.stride)
        call.kept = self, x, modulation
        return call

    def _product(self, N: int, T: int, gelu: bool, residual: Residual | None) -> tuple[Tensor, Structure]:
        """The output (N, T, O) and the call that computes it, except from what."""
        O = self.shape[0]
        out = empty((N, T, O), self.dtype) if residual is None else residual.x
        call = Product.from_buffer_copy(self.product)
        call.rows, call.tokens, call.gelu, call.bf16 = N * T, T, gelu, out.dtype == torch.bfloat16
        call.out = out.data_ptr()
        if residual is not None:
            call.stride = residual.gate.stride(0)
            call.gate = row_pointer(residual.gate, N, O, call.stride)
            call.residual = pointer(out, torch.float32, (N, T, O))
        call.kept = out, residual
        return out, call

    def __call__(
        self,
        x: Tensor,
        *,
        modulation: Modulation | None = None,
        gelu: bool = False,
        residual: Residual | None = None,
        glu: bool = False,
    ) -> Tensor:
        x = x.contiguous()
        rows = self._rows(x, modulation, glu)
        out, product = self._product(x.shape[0], x.shape[1], gelu, residual)
        codes, steps, low, low_steps = (padded(rows.rows * size, ALIGNMENT) for size in self.row_bytes)
        buffer = empty((codes + steps + low + low_steps,), torch.uint8)
        start = buffer.data_ptr()
        rows.codes = product.codes = start
        rows.steps = product.steps = start + codes
        rows.low = product.low = start + codes + steps
        rows.low_steps = product.low_steps = start + codes + steps + low
        rows.buffer = buffer
        self.kernels.call("linear", rows, product)
        return out


def weigh(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels, scales: Tensor | None = None) -> Tensor:
    """x (…, I) times weight (O, I) transposed, plus bias (O,): (…, O) fp32. A row depends neither on the others nor on
    the number of threads. The weight is fp32; or int8 codes, or uint8 pairs of 4-bit codes, with scales (O, G)."""
    rows, I = x.flatten(0, -2).contiguous(), x.shape[-1]
    O, bits = len(weight), {torch.float32: 32, torch.int8: 8}.get(weight.dtype, 4)
    scales = torch.ones(O, 1, dtype=torch.float32, device="cpu") if scales is None else scales
    out = torch.empty(len(rows), O, dtype=torch.float32, device="cpu")
    if not out.numel():
        return out.view(*x.shape[:-1], O)
    call = WeightOnly(rows=len(rows), depth=I, outputs=O, bits=bits, groups=scales.shape[1], out=out.data_ptr())
    call.x, call.bias = pointer(rows, torch.float32, (len(rows), I)), pointer(bias, torch.float32, (O,))
    call.weight = pointer(weight, torch.uint8 if bits == 4 else weight.dtype, (O, I // 2 if bits == 4 else I))
    call.scales = pointer(scales, torch.float32, (O, scales.shape[1]))
    call.kept = rows, weight, bias, scales, out
    kernels.call("weigh", call)
    return out.view(*x.shape[:-1], O)


def weight_only(layer: Layer, kernels: Kernels) -> Linear:
    """Quantized weights, float activations: rows of weights are decoded where they are used, and stay small."""
    require(layer)
    return composed(_weighed(generic.shift_in_bias(layer, _weighed(layer, kernels)), kernels))


def _weighed(layer: Layer, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    """x (…, I) to (…, O) by a weight-only layer."""
    weight, stored = layer.tensors["residual_codes"].contiguous(), ref.layer_scales(layer)
    scales, offsets = stored.values().contiguous(), stored.offsets()
    factors = [ref.matrix(layer, name).contiguous() for name in ("l2", "l1")] if layer.spec.rank else []
    form, bias, inputs = layer.form("residual"), layer.bias, layer.only("in_")

    def call(x: Tensor) -> Tensor:
        hat = ref.transform(inputs, x)
        y = weigh(hat, weight, bias, kernels, scales)
        if offsets is not None:
            y = y - weigh(ref.grouped(hat, form).sum(-1), offsets, None, kernels)
        return y + weigh(weigh(hat, factors[0], None, kernels), factors[1], None, kernels) if factors else y

    return call


def float_linear(weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Linear:
    """A layer of fp32 weight (O, I) and bias (O,)."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return composed(lambda x: weigh(x.float(), weight, bias, kernels))


def attention(
    qkv: Tensor, heads: int, kernels: Kernels, norms: HeadNorms | None = None, rotation: Rotation | None = None
) -> Tensor:
    """softmax(q kᵀ / √head) v of (N, T, 3D) in `kernels.low_dtype` to (N, T, D) fp32, as `fused.attention`."""
    N, T, width = qkv.shape
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"got {width} columns and {heads} heads, expected a multiple of three times the heads")
    head = width // 3 // heads
    out = empty((N, T, width // 3), torch.float32)
    call = Attention(images=N, tokens=T, heads=heads, head=head, out=out.data_ptr())
    if norms is not None:
        call.weight, call.bias = (pointer(part, torch.float32, (2, head)) for part in norms)
    if rotation is not None:
        if head % 2:
            raise ValueError(f"got heads of {head} columns, expected pairs to rotate")
        call.cos, call.sin = (pointer(table, torch.float32, (T, head)) for table in rotation)
    call.qkv = pointer(qkv, kernels.low_dtype, (N, T, width))
    call.kept = qkv, norms, rotation, out
    kernels.call("attend", call)
    return out
