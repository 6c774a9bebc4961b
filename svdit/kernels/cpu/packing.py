"""Weights and low-rank factors as the C kernels read them (csrc/kernels.h)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.cpu.ffi import DEPTH_STEP, Kernels, Packing, pad, padded, pointer
from svdit.kernels.layer import Layer

WORD, RUN = 2**14 - 1, 64  # of lanes.h: the largest word of activations, and numbers that are summed in 32 bits


def pack_weight(layer: Layer, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The weight in panels, bytes (n,), and the sums of its integers (O,) int32."""
    (O, I), form, scales = layer.shape, layer.form("residual"), ref.layer_scales(layer)
    count = padded(O, kernels.panel) * padded(I, DEPTH_STEP) * form.bits // 8
    packed = torch.empty(count, dtype=torch.uint8, device="cpu")
    if count * 8 != O * I * form.bits:  # not all of it is written
        packed.fill_(0x88 if form.bits == 4 else 0)
    sums = torch.empty(O, dtype=torch.int32, device="cpu")
    call = Packing(outputs=O, depth=I, bits=form.bits, group=form.group)
    codes = layer.tensors["residual_codes"].contiguous()
    call.stored = pointer(codes, torch.int8 if form.bits == 8 else torch.uint8, (O, -(-I * form.bits // 8)))
    groups = scales.groups.contiguous()
    if form.scale == "int8":
        call.multiples = pointer(groups, torch.int8, (O, form.groups(I)))
    call.weight, call.sums = packed.data_ptr(), sums.data_ptr()
    kernels.call("pack_weight", call)
    return packed, sums


def pack_l1(l1: Tensor, shape: tuple[int, int], kernels: Kernels) -> tuple[Tensor, Tensor | None]:
    """L1 (O, R) to panels (n,), rounded to bf16; or as words, with their steps (padded O,)."""
    l1, steps = _factor(l1, shape, kernels)
    if kernels.parts == 2:  # once for each part of x̂ L2ᵀ
        l1 = F.pad(l1, (0, -shape[1] % kernels.low_step)).repeat(1, 2)
    packed = _panels(l1, kernels.panel, 2, kernels)
    return packed, None if steps is None else pad(steps, padded(shape[0], kernels.panel))


def pack_l2(l2: Tensor, shape: tuple[int, int], kernels: Kernels) -> tuple[Tensor, Tensor | None]:
    """L2 (R, I) likewise, with steps (padded R,); the last panel may be half as wide."""
    l2, steps = _factor(l2, shape, kernels)
    R, width = padded(shape[0], kernels.low_step), kernels.low_panel
    whole = R // width * width
    parts = (l2[:whole], width), (l2[whole:], kernels.low_step)
    packed = torch.cat([_panels(part, columns, DEPTH_STEP, kernels) for part, columns in parts])
    return packed, None if steps is None else pad(steps, R)


def _factor(factor: Tensor, shape: tuple[int, int], kernels: Kernels) -> tuple[Tensor, Tensor | None]:
    """A factor in the type of the branch, and the steps of words."""
    factor, steps = words(factor) if kernels.branch_dtype == torch.int16 else (factor.bfloat16(), None)
    factor = factor.contiguous()
    pointer(factor, factor.dtype, shape)
    return factor, steps


def _panels(factor: Tensor, width: int, step: int, kernels: Kernels) -> Tensor:
    """A factor (O, R) to panels (n,) of `width` outputs, R padded to a multiple of `step`."""
    (O, R), depth = factor.shape, padded(factor.shape[1], step)
    packed = torch.zeros(padded(O, width) * depth, dtype=factor.dtype, device="cpu")
    kernels.call("pack_factor", factor.data_ptr(), O, R, depth, width, packed.data_ptr())
    return packed


def words(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A factor (O, R) as int16 and a step of each row (O,): `RUN` numbers of a row, times words of activations, sum to
    less than 2³¹ whatever their signs."""
    O, R = factor.shape
    size = F.pad(factor.float().abs(), (0, -R % RUN)).view(O, -1, RUN)
    most, sums = size.amax((1, 2)), size.sum(2).amax(1)
    limit = 2**31 // WORD - RUN // 2 - 1  # less what rounding adds
    steps = torch.maximum(most / (2**15 - 1), sums / limit)
    steps[steps == 0] = 1
    return (factor / steps.unsqueeze(1)).round().short(), steps
