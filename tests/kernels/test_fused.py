"""What is fused around a linear: the definition against torch's modules and complex numbers, backends against it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from heads import NORMS, attention_in_float64, attention_inputs, normal, queries_and_keys
from layers import USABLE, U, random_layer
from torch import nn

from svdit.kernels import fused, ops
from svdit.kernels.formats import Format
from svdit.kernels.layer import Modulation


def test_rms_norm_with_its_weight_folded_into_the_modulation() -> None:
    """nn.RMSNorm with weight, then x · (1 + scale) + shift."""
    x, weight, shift, scale = normal(2, 5, 85) * 3 + 1, normal(85, seed=1), normal(2, 85, seed=2), normal(2, 85, seed=3)
    norm = nn.RMSNorm(85, eps=1e-6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(weight)
        expected = norm(x.double()) * (1 + scale)[:, None] + shift[:, None]
    y = fused.modulated(x, Modulation(shift, (1 + scale) * weight - 1, rms=True))
    assert 0 < (y - expected).abs().max() < 20 * U * expected.abs().max()


def test_the_gated_activation() -> None:
    x = torch.cat([torch.linspace(-100, 100, 401), normal(401)])
    expected = F.silu(x[:401].double()) * x[401:]
    error = (fused.gated(x) - expected).abs()
    assert (error <= 8 * U * expected.abs() + 1e-36).all() and error.max() > 0
    assert torch.equal(fused.gated(x.bfloat16()), fused.gated(x.bfloat16().float()))


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["reference", *USABLE])
def test_norms_and_rotation_of_queries_and_keys(backend: str, norm: str, turn: bool) -> None:
    for N, T, heads, head in ((2, 17, 3, 80), (1, 1, 1, 2), (2, 35, 2, 18)):
        qkv, norms, rotation = attention_inputs(N, T, heads, head, norm, turn)
        y = ops.attention(qkv, heads, backend, norms=norms, rotation=rotation)
        assert 0 <= relative(y.double(), attention_in_float64(*queries_and_keys(qkv, heads, norms, rotation))) < 2e-6
        alone = [ops.attention(image, heads, backend, norms=norms, rotation=rotation) for image in qkv.split(1)]
        assert torch.equal(torch.cat(alone), y)


@pytest.mark.parametrize("backend", USABLE)
def test_every_backend_fuses_the_same(backend: str) -> None:
    layer = random_layer(48, 85, 4, Format(8), seed=1)
    packed, definition = ops.pack(layer, backend), ops.pack(layer, "reference")
    halves, x = normal(3, 7, 170), normal(3, 7, 85) + 1
    shift, scale = normal(3, 170, seed=1).chunk(2, dim=1)
    for y, expected in (
        (packed(halves, glu=True), definition(halves, glu=True)),
        (packed(halves.bfloat16(), glu=True), definition(halves.bfloat16(), glu=True)),
        *((run(x, modulation=Modulation(shift, scale, True)) for run in (packed, definition)),),
    ):
        assert relative(y, expected) < 0.02
