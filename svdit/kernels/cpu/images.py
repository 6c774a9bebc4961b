"""Images as the C kernels see them, (H, W, C) fp32: 3×3 convolutions with what surrounds them, 1×1 convolutions, norms.

Every output has the same bits for every number of threads. Large buffers belong to a `Workspace` and are used again:
new memory is mapped and cleared by the system, which takes 0.4 ms per MB.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from svdit.kernels.cpu.ffi import Convolution, GroupNorm, Kernels, Projection, padded, pointer

SCRATCH = 24 << 20  # bytes of each thread that convolves; 12 to 40 MB are equally fast
PIECE = 1 << 15  # floats of a group norm's piece


class Affine(NamedTuple):
    """The scale and shift (C,) of each channel that a norm means for one image."""

    scale: Tensor
    shift: Tensor


class Workspace:
    """Kernels, and named buffers of `floats` or more each, of which only what is used takes memory."""

    def __init__(self, kernels: Kernels, floats: int = 0) -> None:
        self.kernels, self.threads, self.floats = kernels, torch.get_num_threads(), floats
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """The buffer `name` (…) fp32; what was in it may be lost."""
        size = prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(max(size, self.floats), dtype=torch.float32, device="cpu")
        return self.buffers[name][:size].view(shape)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, kernels: Kernels) -> Affine:
    """Group norm of x (H, W, C) with epsilon 1e-6."""
    H, W, C = x.shape
    if groups < 1 or C % groups:
        raise ValueError(f"got {C} channels and {groups} groups, expected a multiple of the groups")
    piece = max(1, PIECE // C)
    moments = torch.empty(-(-H * W // piece), 2, C, dtype=torch.float32, device="cpu")
    scale, shift = torch.empty(2, C, dtype=torch.float32, device="cpu")
    call = GroupNorm(pixels=H * W, channels=C, groups=groups, piece=piece, moments=moments.data_ptr())
    call.x, call.scale, call.shift = pointer(x, torch.float32, (H, W, C)), scale.data_ptr(), shift.data_ptr()
    call.weight, call.bias = (pointer(part, torch.float32, (C,)) for part in (weight, bias))
    kernels.call("group_norm", call)
    return Affine(scale, shift)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workspace: Workspace,
    out: Tensor,
    *,
    norm: Affine | None = None,
    enlarge: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`out` (H, W, O) = residual + the 3×3 convolution, padded by zeros, of x (H, W, I), as Winograd products.

    weight (O, I, 3, 3), bias (O,). With `norm` of silu(norm(x)); with `enlarge` of x (H/2, W/2, I) whose pixels are
    repeated to 2×2. `out` may be the residual itself.
    """
    if not out.numel():
        return out
    (h, w, I), O, weight = x.shape, len(weight), weight.contiguous()
    H, W = h << enlarge, w << enlarge
    floats = padded(max(SCRATCH // 4, 10_000 * padded(I, 16)), 16)  # the latter: weights of 64 outputs, and 6 tiles
    scratch = workspace.take("scratch", workspace.threads, floats)
    call = Convolution(height=H, width=W, inputs=I, outputs=O, enlarge=enlarge, threads=len(scratch), floats=floats)
    call.x, call.weight = pointer(x, torch.float32, (h, w, I)), pointer(weight, torch.float32, (O, I, 3, 3))
    call.bias, call.memory = pointer(bias, torch.float32, (O,)), scratch.data_ptr()
    call.residual, call.out = (pointer(image, torch.float32, (H, W, O)) for image in (residual, out))
    if norm is not None:
        call.scale, call.shift = (pointer(part, torch.float32, (I,)) for part in norm)
    workspace.kernels.call("convolve", call)
    return out


def project(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels, out: Tensor | None = None) -> Tensor:
    """x (…, I) times weight (O, I) transposed, plus bias (O,): (…, O), in `out` if it is there."""
    (O, I), rows = weight.shape, prod(x.shape[:-1])
    out = torch.empty(*x.shape[:-1], O, dtype=torch.float32, device="cpu") if out is None else out
    call = Projection(rows=rows, inputs=I, outputs=O, weight=pointer(weight, torch.float32, (O, I)))
    call.x, call.out = pointer(x, torch.float32, (*x.shape[:-1], I)), pointer(out, torch.float32, (*x.shape[:-1], O))
    call.bias = pointer(bias, torch.float32, (O,))
    kernels.call("project", call)
    return out
