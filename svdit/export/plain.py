"""A DiT without quantized layers: each is multiplied out to the weight and bias that it stands for."""

import torch
from torch import Tensor

from svdit.model.dit import DiT
from svdit.quant.linear import SVDLinear, quantized_layers


@torch.no_grad()
def multiplied_out(model: DiT, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors (…) of the model in full precision, under the published names.

    They compute what the quantized model does, but for the rounding of activations.
    """
    layers = quantized_layers(model)
    inside = tuple(f"{name}." for name in layers)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        weight, bias = weight_and_bias(layer)
        tensors[f"{name}.weight"] = weight
        tensors |= {} if bias is None else {f"{name}.bias": bias}
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def weight_and_bias(layer: SVDLinear) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I) and bias (O,) of the linear that a layer stands for; the stored bias includes that of centring."""
    weight, bias = layer.effective_weight(), layer.bias
    if layer.in_shift is None or bias is None:
        return weight, bias
    return weight, (bias.double() - weight.double() @ layer.in_shift.double()).float()
