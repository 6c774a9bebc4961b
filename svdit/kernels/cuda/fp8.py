"""FP8 by torch._scaled_mm: E4M3 codes and one fp32 scale per row on both sides, as the `fp8` preset stores them.

The product is rounded to bfloat16, the only output type of its row-wise form on a GPU. Transforms and the low-rank
branch are torch operations: nothing is fused.
"""

import torch
from torch import Tensor

from svdit.kernels import generic
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.kernels.fused import composed
from svdit.kernels.layer import Layer, Linear

FP8 = Format(8, element="e4m3")


def float8(layer: Layer) -> Linear:
    """An FP8 layer ready to run; see `backend.unsupported` for which layers qualify."""
    weight = ref.layer_codes(layer).contiguous()  # (O, I); its transpose has the layout that _scaled_mm requires
    channel = ref.layer_scales(layer).values().t().contiguous()  # (1, O)
    rest = generic.with_float_factors(layer).without("residual")

    def product(hat: Tensor) -> Tensor:
        codes, scales = ref.quantize(hat.flatten(0, -2), FP8)
        y = torch._scaled_mm(codes, weight.t(), scales.values(), channel, out_dtype=torch.bfloat16).float()
        return (y if rest.bias is None else y + rest.bias).view(*hat.shape[:-1], -1)

    return composed(lambda x: ref.linear(rest, x, product))
