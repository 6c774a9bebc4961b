"""Hidden widths of SwiGLU that 64 does not divide, padded with zeros when a full-precision file is loaded.

So all formats apply to JiT-L (2730), JiT-H (3413) and the like. The model computes the same: silu(0) · 0 = 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdit.model.config import DiTConfig

STEP = 64  # of groups and Hadamard blocks


def padded_width(width: int) -> int:
    """The next multiple of STEP."""
    return -(-width // STEP) * STEP


def padded(tensors: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Tensors (…) under published names, with zeros up to the hidden width of the configuration."""
    w3 = tensors.get("blocks.0.mlp.w3.weight")
    width = config.mlp_width if w3 is None else w3.shape[-1]
    missing = config.mlp_width - width
    if not 0 < missing < STEP:  # more in a damaged file
        return dict(tensors)
    return {name: _padded(name, tensor, width, missing) for name, tensor in tensors.items()}


def _padded(name: str, tensor: Tensor, width: int, missing: int) -> Tensor:
    if name.endswith((".mlp.w12.weight", ".mlp.w12.bias")) and tensor.shape[:1] == (2 * width,):
        zeros = tensor.new_zeros(missing, *tensor.shape[1:])
        return torch.cat([part for half in tensor.chunk(2) for part in (half, zeros)])
    if name.endswith(".mlp.w3.weight") and tensor.shape[1:] == (width,):
        return torch.cat([tensor, tensor.new_zeros(len(tensor), missing)], dim=1)
    return tensor
