"""The C kernels as operations on tensors: a packed layer, attention.

Integers are those of reference.py. Where the processor has bf16 dot products (avx512bf16, and portable, which
mirrors it), attention and what `inner` layers hand on are bf16, and the low-rank branch rounds x̂ and x̂ L2ᵀ to it;
elsewhere all is fp32.
"""

from dataclasses import replace

import torch
from torch import Tensor

from svdit.kernels.cpu.ffi import (
    DEPTH_STEP,
    Attention,
    Kernels,
    Product,
    Rows,
    WeightOnly,
    pad,
    padded,
    pointer,
    row_pointer,
)
from svdit.kernels.formats import Format
from svdit.kernels.layer import Composed, Layer, Modulation, Residual

GROUPS = (16, 32, 64, 128, 256)  # that are added up in fp32
CHUNK = 32  # columns that WeightOnlyLinear reads at once
EXACT_IN_BF16 = (torch.bfloat16, torch.int8)


class IntegerLinear:
    """W8A8, W4A8 and W4A4: codes of activations and low-rank projection, then the integer product with its epilogue."""

    def __init__(self, layer: Layer, kernels: Kernels, inner: bool = False) -> None:
        assert layer.act is not None, "activations without a format"
        self.kernels, self.shape, self.act = kernels, layer.shape, layer.act
        self.dtype = kernels.low_dtype if inner else torch.float32  # of the output
        O, I = self.shape
        self.depth, self.outputs = padded(I, DEPTH_STEP), padded(O, kernels.panel)
        self.rank = 0 if layer.l1 is None else layer.l1.shape[1]
        self.group, bits = layer.weight.group or self.act.group, layer.weight.bits
        self.floats = bool(self.act.group) or not layer.has_integers  # groups are added up in fp32
        wide = kernels.wide and bits == 8
        self.codes = torch.int16 if wide else torch.uint8  # of activations, with an offset that makes bytes unsigned
        self.offset = 0 if wide else 128 if self.act.bits == 8 else -self.act.lo
        self._keep(layer)
        static = {"depth": I, "rank": self.rank, "offset": self.offset}
        span = {"group": self.act.group, "lo": self.act.lo, "hi": self.act.hi}
        sums = {"group": self.group, "floats": self.floats, "row_steps": self.act.groups(I)}
        inputs = {name: None if x is None else x.data_ptr() for name, x in self.inputs.items()}
        weights = {name: None if x is None else x.data_ptr() for name, x in self.weights.items()}
        self.rows = Rows(hadamard=layer.hadamard, wide=wide, **span, **static, **inputs)
        self.product = Product(outputs=O, bits=bits, **sums, **static, **weights)

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Whether the kernels compute such a layer: integers of 4 or 8 bits, each with a scale a row or scales of the
        same groups, which bf16 holds; bf16 factors."""
        form, act = layer.weight, layer.act
        if act is None or (act.element, form.element) != ("int", "int") or "affine" in (act.span, form.span):
            return False
        rows = act == Format(8) or ((act.bits, act.scale) == (4, "bf16") and act.group in GROUPS)
        if layer.has_integers and not act.group:
            stored = form.scale == "fp32" or form.group % 8 == 0
        else:
            same = form.group in GROUPS and act.group in (0, form.group)
            stored = not form.group or (same and layer.scales.groups.dtype in EXACT_IN_BF16)
        return rows and stored and form.bits in (4, 8) and (layer.l1 is None or layer.l1.dtype == torch.bfloat16)

    def _keep(self, layer: Layer) -> None:
        """Everything the kernels read, packed; `layer` itself is not kept."""
        kernels, low = self.kernels, layer.low_rank()
        weight, sums = kernels.pack_weight(layer)
        offsets = torch.zeros(self.outputs, dtype=torch.int32)
        offsets[: len(sums)] = self.offset * sums
        self.inputs = {
            "in_shift": None if layer.in_shift is None else pad(layer.in_shift, self.depth),
            "in_inverse": None if layer.in_scale is None else pad(layer.in_scale.reciprocal(), self.depth),
            "l2": kernels.pack_factor(low[1].contiguous(), kernels.low_panel, DEPTH_STEP) if low else None,
        }
        self.weights = {
            "weight": weight,
            "multiples": self._multiples(layer) if self.group else None,
            "offsets": offsets,
            "channel": pad(layer.steps() if layer.has_integers else torch.ones(self.shape[0]), self.outputs),
            "bias": torch.zeros(self.outputs) if layer.bias is None else pad(layer.bias, self.outputs),
            "l1": kernels.pack_factor(low[0].contiguous(), kernels.panel, 2) if low else None,
        }

    def _multiples(self, layer: Layer) -> Tensor:
        """One number a group of the weight, (panels, G, panel): int8, or bf16 where groups are added up in fp32."""
        groups, panel = layer.scales.groups, self.kernels.panel
        if not layer.weight.group:
            groups = torch.ones(len(groups), self.act.groups(self.shape[1]))
        whole = torch.zeros(self.outputs, groups.shape[1], dtype=torch.bfloat16 if self.floats else torch.int8)
        whole[: len(groups)] = groups
        return whole.view(-1, panel, groups.shape[1]).transpose(1, 2).contiguous()

    def quantize(self, x: Tensor, modulation: Modulation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, I) to codes (M, padded I) with the offset, steps (M, groups) and x̂ L2ᵀ (M, padded R)."""
        N, T, I = x.shape
        codes = torch.empty(N * T, self.depth, dtype=self.codes)
        steps = torch.empty(N * T, self.act.groups(I))
        low = torch.empty(N * T, padded(self.rank, self.kernels.low_panel), dtype=self.kernels.low_dtype)
        call = Rows.from_buffer_copy(self.rows)
        call.rows, call.tokens, call.bf16 = N * T, T, x.dtype == torch.bfloat16
        call.x = pointer(x, torch.bfloat16 if call.bf16 else torch.float32, (N, T, self.shape[1]))
        call.codes, call.steps, call.low = codes.data_ptr(), steps.data_ptr(), low.data_ptr()
        if modulation is not None:
            call.stride = modulation.shift.stride(0)
            call.shift = row_pointer(modulation.shift, N, I, call.stride)
            call.scale = row_pointer(modulation.scale, N, I, call.stride)
        self.kernels.call("quantize_rows", call)
        return codes, steps, low

    def multiply(
        self, quantized: tuple[Tensor, Tensor, Tensor], N: int, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        """What `quantize` made of N images to (N, T, O)."""
        codes, steps, low = quantized
        M, O = len(codes), self.shape[0]
        out = torch.empty(N, M // N, O, dtype=self.dtype) if residual is None else residual.x
        call = Product.from_buffer_copy(self.product)
        call.rows, call.tokens, call.gelu, call.bf16 = M, M // N, gelu, out.dtype == torch.bfloat16
        call.codes, call.steps, call.low, call.out = (t.data_ptr() for t in (codes, steps, low, out))
        if residual is not None:
            call.stride = residual.gate.stride(0)
            call.gate = row_pointer(residual.gate, N, O, call.stride)
            call.residual = pointer(out, torch.float32, (N, M // N, O))
        self.kernels.call("multiply", call)
        return out

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        return self.multiply(self.quantize(x.contiguous(), modulation), len(x), gelu, residual)


class WeightOnlyLinear(Composed):
    """Quantized weights, float activations: rows of weights are decoded where they are used, and stay small."""

    def __init__(self, layer: Layer, kernels: Kernels) -> None:
        self.kernels, self.shape, self.bits = kernels, layer.shape, layer.weight.bits
        self.weight, self.scales = layer.stored.contiguous(), layer.scales.values().contiguous()
        self.layer = replace(layer, stored=self.weight[:0])

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Whether the kernels compute such a layer: floats in, 8- or 4-bit integer codes, groups of whole chunks."""
        form, I = layer.weight, layer.columns
        whole = form.groups(I) == 1 or (I // form.groups(I)) % CHUNK == 0
        stored = form.bits == 8 or (form.bits == 4 and I % 2 == 0)
        return layer.act is None and form.element == "int" and whole and stored

    def core(self, x: Tensor) -> Tensor:
        (O, I), layer = self.shape, self.layer
        hat = layer.transform(x).flatten(0, -2).contiguous()
        out = torch.empty(len(hat), O)
        call = WeightOnly(rows=len(hat), depth=I, outputs=O, bits=self.bits, groups=self.scales.shape[1])
        call.x, call.out = pointer(hat, torch.float32, (len(hat), I)), out.data_ptr()
        call.weight, call.scales = self.weight.data_ptr(), self.scales.data_ptr()
        call.bias = None if layer.bias is None else pointer(layer.bias, torch.float32, (O,))
        self.kernels.call("weigh", call)
        return layer.completed(out, hat).view(*x.shape[:-1], O)


def attention(qkv: Tensor, heads: int, kernels: Kernels) -> Tensor:
    """softmax(q kᵀ / √head) v of (N, T, 3D) in `kernels.low_dtype` to (N, T, D) fp32."""
    N, T, width = qkv.shape
    out = torch.empty(N, T, width // 3)
    call = Attention(images=N, tokens=T, heads=heads, head=width // 3 // heads, out=out.data_ptr())
    call.qkv = pointer(qkv, kernels.low_dtype, (N, T, width))
    kernels.call("attend", call)
    return out
