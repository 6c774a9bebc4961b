"""Smoothing and centring of a quantized DiT, folded into what comes before: exact, and nothing is left to do for them.

    qkv, fc1:  (x (1 + scale) + shift − μ)/λ = x scale' + shift',   scale' = (1 + scale)/λ,   shift' = (shift − μ)/λ
    proj:      (softmax v − μ)/λ = softmax ((v − μ)/λ),             for the rows of a softmax sum to one

So adaLN's rows, and the v rows of qkv, take up μ and λ in their bias and in a float32 row scale; what they store of
their weights stays as it is, whatever its format. The 1 goes into adaLN's bias too: as 1 + (scale' − 1) it would cost
5 % in bfloat16 at λ = 50, against 0.2 %. fc2 keeps its own, because GELU comes before it.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.quant.linear import SVDLinear, quantized_layers

PAIRS = ((0, 1), (3, 4))  # adaLN's (shift, scale) rows for qkv and for fc1, of six times D
V = 2  # qkv's rows for v, of three times D
Layer = Any  # an nn.Linear or an SVDLinear, with a bias


class Parts(NamedTuple):
    """The linears of a block that have to do with folding."""

    adaln: Layer
    qkv: Layer
    fc1: Layer
    proj: Layer


def parts(model: DiT) -> list[Parts]:
    blocks: Any = model.blocks
    return [Parts(b.adaLN_modulation[1], b.attn.qkv, b.mlp.fc1, b.attn.proj) for b in blocks]


def foldable(model: DiT) -> bool:
    """Whether there is any smoothing or centring to fold."""
    quantized = [layer for block in parts(model) for layer in block[1:] if isinstance(layer, SVDLinear)]
    return any(layer.spec.scaled or layer.spec.shifted for layer in quantized)


@torch.no_grad()
def fuse_(model: DiT) -> None:
    """Fold, in place; `model.config.absorbed` is true afterwards.

    Raises UserError for a model that is fused already, or that is not quantized.
    """
    if model.config.absorbed:
        raise UserError("smoothing and centring of this model are folded already; use it as it is")
    if not quantized_layers(model):
        raise UserError("this model is not quantized, so it has no smoothing or centring to fold; quantize it first")
    for adaln, qkv, fc1, proj in parts(model):
        offset, factor = neutral(adaln, 6)
        for (shift, scale), layer in zip(PAIRS, (qkv, fc1), strict=True):
            offset[shift], factor[[shift, scale]] = taken(layer)
            offset[scale] = -1
        fold_(adaln, offset, factor)
        if isinstance(qkv, SVDLinear):
            offset, factor = neutral(qkv, 3)
            offset[V], factor[V] = taken(proj)
            fold_(qkv, offset, factor)
    mark(model, True)


@torch.no_grad()
def unfuse_(model: DiT, source: DiT) -> None:
    """The inverse, in place and exact to rounding, with the help of the model that was quantized.

    λ is read off the row scales, μ off the biases; whatever is not of `fuse_`'s making stays different from `source`.
    """
    for (adaln, qkv, fc1, proj), original in zip(parts(model), parts(source), strict=True):
        offset, factor = neutral(adaln, 6)
        before, now = expected_bias(adaln, original.adaln).view(6, -1), adaln.bias.view(6, -1)
        for (shift, scale), layer in zip(PAIRS, (qkv, fc1), strict=True):
            factor[[shift, scale]] = folded_scale(adaln, original.adaln, scale)
            offset[scale] = -1
            offset[shift] = returned(layer, before[shift] - now[shift] / factor[shift], factor[shift])
        fold_(adaln, -offset * factor, 1 / factor)
        if isinstance(adaln, nn.Linear):
            adopt(adaln, original.adaln)
        bias = qkv.bias
        if isinstance(qkv, SVDLinear):
            offset, factor = neutral(qkv, 3)
            before, now = expected_bias(qkv, original.qkv).view(3, -1), bias.view(3, -1)
            factor[V] = row_scale(qkv).view(3, -1)[V]
            offset[V] = returned(proj, before[V] - now[V] / factor[V], factor[V])
            fold_(qkv, -offset * factor, 1 / factor)
    mark(model, False)


def mark(model: DiT, absorbed: bool) -> None:
    model.config = replace(model.config, absorbed=absorbed)
    blocks: Any = model.blocks
    for block in blocks:
        block.absorbed = absorbed


def neutral(layer: Layer, count: int) -> tuple[Tensor, Tensor]:
    """Offsets and factors, (count, D), that change nothing."""
    return torch.zeros_like(layer.bias).view(count, -1), torch.ones_like(layer.bias).view(count, -1)


def taken(layer: Layer) -> tuple[Tensor | float, Tensor | float]:
    """μ and 1/λ of a layer, which no longer applies them; 0 and 1 where it never did."""
    if not isinstance(layer, SVDLinear):
        return 0.0, 1.0
    shift, scale = layer.in_shift, layer.in_scale
    layer.in_shift = layer.in_scale = None
    layer.spec = replace(layer.spec, shifted=False, scaled=False)
    return 0.0 if shift is None else shift, 1.0 if scale is None else scale.reciprocal()


def returned(layer: Layer, shift: Tensor, inverse: Tensor) -> Tensor:
    """Let the layer apply μ and 1/λ again; the μ, which is 0 for a layer that is not quantized."""
    if not isinstance(layer, SVDLinear):
        return torch.zeros_like(shift)
    layer.in_shift, layer.in_scale = shift, inverse.reciprocal()
    layer.spec = replace(layer.spec, shifted=True, scaled=True)
    return shift


def fold_(layer: Layer, offset: Tensor, factor: Tensor) -> None:
    """Let the layer's output y become (y − offset) · factor."""
    offset, factor = offset.flatten(), factor.flatten()
    layer.bias = nn.Parameter((layer.bias - offset) * factor)
    if isinstance(layer, nn.Linear):
        layer.weight = nn.Parameter(layer.weight * factor[:, None])
    elif (factor != 1).any():
        layer.out_scale = row_scale(layer) * factor
        layer.spec = replace(layer.spec, out_scaled=True)


def row_scale(layer: SVDLinear) -> Tensor:
    """(O,), ones where there is none."""
    assert layer.bias is not None
    return torch.ones_like(layer.bias) if layer.out_scale is None else layer.out_scale


def folded_scale(adaln: Layer, linear: nn.Linear, scale: int) -> Tensor:
    """1/λ, (D,), of the rows called `scale`: their row scale, or what their weights (W, b + 1) were multiplied by."""
    if isinstance(adaln, SVDLinear):
        return row_scale(adaln).view(6, -1)[scale]
    now = torch.cat([adaln.weight, adaln.bias[:, None]], 1).chunk(6)[scale]
    before = torch.cat([linear.weight, linear.bias[:, None] + 1], 1).chunk(6)[scale]
    return (now * before).sum(1) / before.square().sum(1)


def adopt(layer: nn.Linear, other: nn.Linear) -> None:
    """Let the numbers of `layer` that only rounding tells from those of `other` be equal to them."""
    for mine, its in ((layer.weight, other.weight), (layer.bias, other.bias)):
        mine.copy_(torch.where(torch.isclose(mine, its, rtol=1e-5, atol=1e-6), its, mine))


def expected_bias(layer: Layer, linear: nn.Linear) -> Tensor:
    """What quantizing makes of the bias of `linear`: b + W μ."""
    shift = layer.in_shift if isinstance(layer, SVDLinear) else None
    return linear.bias.float() if shift is None else linear.weight.float() @ shift + linear.bias.float()
