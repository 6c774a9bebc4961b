"""The documented Python interface, kept stable."""

from torch import nn

from svdit.model.zoo import DiT_models
from svdit.quant.linear import SVDLinear, linears, swap

__all__ = ["DiT_models", "SVDLinear", "apply_svd_to_dit"]


def apply_svd_to_dit(model: nn.Module, rank_ratio: float) -> nn.Module:
    """Replace every nn.Linear of `model`, in place, by its truncated SVD; returns the model.

    The rank is round(rank_ratio · min(in, out)). Above a ratio of max(in, out)/(in + out), 0.5 for square layers, the
    two factors have more elements than the weight; `quantize_parameters(num_bits)` of each layer makes them smaller.
    """
    for name, linear in list(linears(model)):
        swap(model, {name: SVDLinear.from_linear(linear, rank_ratio)})
    return model
