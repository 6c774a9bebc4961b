"""FP8 by torch._scaled_mm: E4M3 codes and one fp32 scale a row on both sides, as the `fp8` preset stores them.

The product's sums leave it as bfloat16, which is all that its row-wise form gives on a GPU. Transforms and the
low-rank branch are torch's operations: nothing is fused.
"""

from dataclasses import replace

import torch
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.kernels.layer import Composed, Layer

FP8 = Format(8, element="e4m3")


class Float8Linear(Composed):
    """y = (codes · weightᵀ) · scales + low-rank branch + bias."""

    def __init__(self, layer: Layer) -> None:
        self.weight = layer.codes().contiguous()  # (O, I); its transpose has the layout that _scaled_mm wants
        self.scales = layer.scales.values().t().contiguous()  # (1, O)
        self.layer = replace(layer, stored=self.weight[:0], scales=ref.Scales(self.scales[:, :0]))

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Whether _scaled_mm computes such a layer on its device: Hopper on, sides divisible by 16."""
        device = layer.stored.device
        able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
        return able and layer.weight == layer.act == FP8 and not any(side % 16 for side in layer.shape)

    def core(self, x: Tensor) -> Tensor:
        hat = self.layer.transform(x.flatten(0, -2))
        codes, scales = ref.quantize(hat, FP8)
        y = torch._scaled_mm(codes, self.weight.t(), scales.values(), self.scales, out_dtype=torch.bfloat16).float()
        y = y if self.layer.bias is None else y + self.layer.bias
        return self.layer.completed(y, hat).view(*x.shape[:-1], -1)
