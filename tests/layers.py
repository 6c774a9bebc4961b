"""Random layers and shapes, for the tests of every backend."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from svdit.kernels import ops
from svdit.kernels import reference as ref
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.formats import Format
from svdit.kernels.generic import dequantized
from svdit.kernels.layer import Layer, Linear, LinearSpec, Modulation, Residual
from svdit.quant.config import QuantConfig, Rule, dit_config, rank_ratio_config, recipe_for

USABLE = [name for name, reason in ops.reasons().items() if not reason]
CONFIGS = {
    **{
        name: dit_config(recipe_for(name, smoothing=0, iterations=2))
        for name in ("w8a8", "w8a16", "svdquant", "fp8", "w4a4")
    },
    "svdquant-w4a4": dit_config(recipe_for("svdquant-w4a4", smoothing=7, iterations=2)),
    "w4a8": dit_config(recipe_for("w4a8", smoothing=0), adaln="int4"),
    "w4a8-channel, adaLN left": dit_config(recipe_for("w4a8-channel", smoothing=0), adaln="fp16"),
    "factors": rank_ratio_config(0.5, 8),
    "every linear": QuantConfig((Rule("*", recipe_for("w8a8", smoothing=0, low_rank="svd", rounding="nearest")),)),
}

U, U_BF16 = 2.0**-24, 2.0**-8  # unit roundoffs


def layer_of(
    codes: torch.Tensor, scales: ref.Scales, weight: Format, act: Format | None = None, hadamard: int = 0, **rest: Any
) -> Layer:
    """A layer of these codes (O, I) and scales; `rest` are tensors by name, None for missing ones."""
    tensors = ref.encoded("residual", codes, scales, weight)
    tensors |= {name: tensor for name, tensor in rest.items() if tensor is not None}
    rank = tensors["l1"].shape[1] if "l1" in tensors else 0
    spec = LinearSpec(rank, None, "bfloat16", weight, act, "in_scale" in tensors, "in_shift" in tensors, hadamard)
    return Layer(spec, (codes.shape[0], codes.shape[1]), tensors)


def with_spec(layer: Layer, **changes: Any) -> Layer:
    """The layer with some fields of its spec replaced, and without the tensors that the new one does not store."""
    spec = replace(layer.spec, **changes)
    tensors = {name: tensor for name, tensor in layer.tensors.items() if name in spec.tensors(*layer.shape)}
    return replace(layer, spec=spec, tensors=tensors)


def random_layer(O: int, I: int, R: int, weight: Format, seed: int, hadamard: int = 0) -> Layer:
    g = torch.Generator().manual_seed(seed)
    codes, scales = ref.quantize(torch.randn(O, I, generator=g) / I**0.5, weight)
    transformed = seed % 3 > 0
    return layer_of(
        codes,
        scales,
        weight,
        Format(8),
        hadamard,
        bias=torch.randn(O, generator=g) if seed % 2 else None,
        in_shift=torch.randn(I, generator=g) if transformed else None,
        in_scale=torch.rand(I, generator=g) + 0.1 if transformed else None,
        l1=torch.randn(O, R, generator=g).bfloat16() if R else None,
        l2=(torch.randn(R, I, generator=g) / I**0.5).bfloat16() if R else None,
    )


def branch_bound(kernels: ffi.Kernels, hat: torch.Tensor, l1: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    """How far x̂ L2ᵀ L1ᵀ by the C kernels may be from that of hat (M, I), l1 (O, R), l2 (R, I) in float64: (M, O).

    A word of activations is off by half a step, which is 2⁻¹⁴ of the row's largest number; one of a factor by
    `half_words`. A sum of two bf16 is off by U_BF16². Numbers round ten times, sums of n numbers in fp32 n times.
    """
    size = hat.abs() @ l2.abs().T
    if kernels.branch_dtype == torch.int16:
        low = hat @ l2.T
        half = hat.abs().amax(1, keepdim=True) / 2**14 * 0.5001
        low_error = half @ l2.abs().sum(1)[None] + (hat.abs() + half).sum(1, keepdim=True) @ half_words(l2)[None]
        low_error = low_error + (hat.shape[1] / 64 + 10) * U * size
        half = (low.abs() + low_error).amax(1, keepdim=True) / 2**14 * 0.5001
        error = (low_error + half) @ l1.abs().T
        error = error + (low.abs() + low_error + half).sum(1, keepdim=True) @ half_words(l1)[None]
        return error + (l1.shape[1] / 64 + 10) * U * (size @ l1.abs().T)
    roundings = 2.1 * U_BF16**2 if kernels.parts == 2 else 0
    return (roundings + (kernels.parts * sum(l2.shape) + 10) * U) * (size @ l1.abs().T)


def half_words(factor: torch.Tensor) -> torch.Tensor:
    """Half a step of the words of each row of (O, R), with which a number is at most 2¹⁵ and 64 sum to 2¹⁷: (O,)."""
    size = F.pad(factor.abs(), (0, -factor.shape[1] % 64)).unflatten(1, (-1, 64))
    return torch.maximum(size.amax((1, 2)) / (2**15 - 1), size.sum(2).amax(1) / (2**17 - 40)) * 0.5001


def model_bound(backend: str, bits: int = 8) -> float:
    """The relative error of a backend against the definition, allowed after a whole small model.

    Sums run in another order, so that a code on the edge between two moves. Where attention is rounded to bfloat16
    (2⁻⁹), or the branch to words (2⁻¹²), more do: their number grows with the rounding, and the error with its root,
    0.35 for words, of which half is allowed. A code of 4 bits that moves counts sixteen times as much as one of 8.
    """
    if backend == "cpu" and choice.attention_dtype() == torch.bfloat16:
        bound = 0.01
    elif backend == "cpu" and choice.kernels().branch_dtype == torch.int16:
        bound = 0.005
    else:
        return 2e-3
    return bound * (4 if bits == 4 else 1)


def shapes(count: int, seed: int) -> Iterator[tuple[int, int, int, int]]:
    """(M, O, I, R): half of them anything from 1 to 300, half around the sizes of tiles."""
    draw = random.Random(seed)
    edges = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]
    for _ in range(count):
        M, O, I, R = (draw.choice(edges) if draw.random() < 0.5 else draw.randint(1, 300) for _ in range(4))
        yield M, O, I, 0 if draw.random() < 0.3 else R


def error_around(
    layer: Layer, packed: Linear, N: int, T: int, gelu: bool, device: torch.device, rms: bool = False
) -> float:
    """Relative L2 error of a backend's linear with everything fused around it, against the definition.

    A code may move by one where the normalized number lies on the edge between two.
    """
    (O, I), g = layer.shape, torch.Generator().manual_seed(0)
    modulations, gates = torch.randn(N, 2 * I, generator=g), torch.randn(N, 2 * O, generator=g)
    modulation = Modulation(*modulations.to(device).chunk(2, dim=1), rms)  # not contiguous
    gate, x = gates.to(device)[:, O:], torch.randn(N, T, I, generator=g).to(device) + 3
    stream, outputs = torch.randn(N, T, O, generator=g).to(device), []
    for linear in (packed, dequantized(layer)):
        residual = Residual(stream.clone(), gate)
        outputs.append(linear(x, modulation=modulation, gelu=gelu, residual=residual))
        assert outputs[-1] is residual.x
    return float((outputs[0] - outputs[1]).norm() / (outputs[1] - stream).norm())
