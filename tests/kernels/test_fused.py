"""What is fused around a linear: the definition against torch's modules and complex numbers, backends against it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from layers import USABLE, U, random_layer
from torch import Tensor, nn

from svdit.kernels import fused, ops
from svdit.kernels.formats import Format
from svdit.kernels.layer import HeadNorms, Modulation, Rotation

NORMS = {"none": (), "rms": ("weight",), "layer": ("weight", "bias")}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def attention_inputs(
    N: int, T: int, heads: int, head: int, norm: str, turn: bool
) -> tuple[Tensor, HeadNorms | None, Rotation | None]:
    weights = [normal(2, head, seed=i + 1) + 1 - i for i, _ in enumerate(NORMS[norm])]
    angles = (normal(T, head // 2, seed=3) * 3).repeat_interleave(2, 1)
    rotation = Rotation(angles.cos(), angles.sin()) if turn else None
    return normal(N, T, 3 * heads * head) * 2, HeadNorms(*weights) if weights else None, rotation


def expected_attention(qkv: Tensor, heads: int, norms: HeadNorms | None, rotation: Rotation | None) -> Tensor:
    """In float64, by torch's modules; a pair of neighbors is a complex number that is multiplied by e^{iθ}."""
    N, T, _ = qkv.shape
    q, k, v = qkv.double().view(N, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if norms is not None and norms.bias is None:
        q, k = (F.rms_norm(x, x.shape[-1:], w.double(), 1e-6) for x, w in zip((q, k), norms.weight, strict=True))
    elif norms is not None and norms.bias is not None:
        parameters = zip((q, k), norms.weight.double(), norms.bias.double(), strict=True)
        q, k = (F.layer_norm(x, x.shape[-1:], w, b, 1e-5) for x, w, b in parameters)
    if rotation is not None:
        turn = torch.complex(rotation.cos[:, ::2].double(), rotation.sin[:, ::2].double())
        pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        q, k = (torch.view_as_real(x * turn).flatten(-2) for x in pairs)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, -1)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["reference", *USABLE])
def test_norms_and_rotation_of_queries_and_keys(backend: str, norm: str, turn: bool) -> None:
    for N, T, heads, head in ((2, 17, 3, 80), (1, 1, 1, 2), (2, 35, 2, 18)):
        qkv, norms, rotation = attention_inputs(N, T, heads, head, norm, turn)
        y = ops.attention(qkv, heads, backend, norms=norms, rotation=rotation)
        assert 0 <= relative(y.double(), expected_attention(qkv, heads, norms, rotation)) < 2e-6
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
