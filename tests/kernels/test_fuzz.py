"""Layers of every constructible format, at random shapes: the C backend computes them right, or says why it does not.

Each weight format meets a few random activation formats, factors and transforms by default, many with `-m slow`, as
under sanitizers (`make sanitize`).
"""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from layers import U_BF16, U

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels import reference as ref
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.formats import Element, Format, ScaleType, Span
from svdit.kernels.fused import gated
from svdit.kernels.layer import Layer, LinearSpec
from svdit.quant.linear import SVDLinear

GROUPS = (0, 1, 2, 3, 8, 16, 24, 32, 64, 128, 256)
pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


def constructible() -> list[Format]:
    """Every format that there is, with these groups."""
    formats = []
    for values in product(range(2, 9), GROUPS, get_args(ScaleType), get_args(Span), get_args(Element)):
        try:
            formats.append(Format(*values))
        except UserError:
            continue
    return formats


FORMATS = constructible()
COMMON = [
    *(None, Format(8), Format(8, scale="bf16"), Format(4, scale="bf16"), Format(4, 64, "bf16", "full")),
    *(Format(4, 32, "bf16"), Format(4, 16, "bf16", "unsigned")),
]
READ = [  # weights that the C kernels may read
    form for form in FORMATS
    if (form.element, form.group % 16) == ("int", 0) and form.span != "unsigned" and form.scale != "e4m3"
]  # fmt: skip
WHOLE = [form for form in FORMATS if form.group < 2]  # formats of factors, whose rank is anything


def random_layer(draw: random.Random, weight: Format | None) -> Layer:
    """A layer of this format with random everything else, from real numbers by the reference's own rounding."""
    act = draw.choice(COMMON if draw.random() < 0.8 else FORMATS) if weight else None
    groups = [form.group or 1 for form in (weight, act) if form]
    I = math.lcm(*groups) * draw.choice((1, 1, 2, 3)) if draw.random() < 0.7 else draw.randint(1, 300)
    blocks = [0, 0, *(2**k for k in range(1, 9) if I % 2**k == 0)]
    rank = draw.choice((0, 1, 3, 16, 17)) if weight else draw.choice((1, 4))
    factors = draw.choice((None, None, draw.choice(WHOLE)))
    spec = LinearSpec(
        rank, factors, draw.choice(("float32", "bfloat16")), weight, act, *draw.choices((True, False), k=2),
        hadamard=draw.choice(blocks),
    )  # fmt: skip
    O, g = draw.choice((1, 2, 15, 17, 40, 65)), torch.Generator().manual_seed(draw.randrange(2**31))
    module = SVDLinear(I, O, draw.random() < 0.5, spec=spec)
    if weight:
        W = torch.randn(O, I, generator=g) / I**0.5
        module.store_residual(*ref.quantize(W.abs() if weight.span == "unsigned" else W, weight))
    if rank:
        l1, l2 = torch.randn(O, rank, generator=g), torch.randn(rank, I, generator=g) / I**0.5
        module.store_factors(*((l1.abs(), l2.abs()) if factors and factors.span == "unsigned" else (l1, l2)))
    if spec.scaled:
        module.store({"in_scale": torch.rand(I, generator=g) + 0.1})
    if spec.shifted:
        module.store({"in_shift": torch.randn(I, generator=g)})
    return module.layer().detached()


def bound(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """For every output (M, O), how far sums in another order and factors rounded to bfloat16 may move it."""
    hat, K = ref.transform(layer, x), x.shape[1]
    total = torch.zeros(len(x), layer.shape[0], dtype=torch.float64)
    if form := layer.spec.weight:
        scales = ref.layer_scales(layer)
        magnitudes = ref.decode(ref.layer_codes(layer), scales.values(), form).abs()
        if (offsets := scales.offsets()) is not None:
            magnitudes = magnitudes + offsets.abs().repeat_interleave(K // offsets.shape[1], 1)
        rounded = ref.fake_quantize(hat, layer.spec.act) if layer.spec.act else hat
        total += 2 * (K + 8) * U * (rounded.abs().double() @ magnitudes.double().T)
    if layer.spec.rank:
        l1, l2 = ref.matrix(layer, "l1").double().abs(), ref.matrix(layer, "l2").double().abs()
        total += (2 * (K + layer.spec.rank + 8) * U + 5 * U_BF16) * (hat.abs().double() @ l2.T @ l1.T)
    return total + 4 * U * ref.linear(layer, x).abs().double() + 1e-30


def outcome(layer: Layer, draw: random.Random) -> str:
    """`computed` by the C kernels, or by the fallback because they do not support it; "" where that is wrong."""
    x = torch.randn(draw.choice((1, 3, 7)), layer.shape[1], generator=torch.Generator().manual_seed(1)) * 3
    read, glu = x, draw.random() < 0.3
    if glu:
        read = torch.cat([torch.where(x > -1, x.abs() + 20, -110), x], 1)  # silu(a) is exactly a, or 0
        x = gated(read)
    y = ops.pack(layer, "cpu")(read[None], glu=glu)[0]
    if not ((y.double() - ref.linear(layer, x)).abs() <= bound(layer, x)).all():
        return ""
    return "unsupported" if ops.unsupported(layer.spec, layer.shape, "cpu") else "computed"


def swapped(layer: Layer, draw: random.Random) -> str:
    """How the same tensors under another format end: `refused`, or computed as that format says."""
    try:
        form = layer.spec.weight or FORMATS[0]
        alike = [other for other in FORMATS if (other.bits, other.group) == (form.bits, form.group)]
        spec = replace(layer.spec, weight=draw.choice(alike), hadamard=draw.choice((0, 0, 64, 256, 2**20)))
        return outcome(replace(layer, spec=spec), draw)
    except UserError:
        return "refused"


@pytest.mark.parametrize(("columns", "act"), [(2**16, Format(8)), (2**18, Format(8)), (2**18, None)])
def test_rows_longer_than_int32_sums_are_declined(columns: int, act: Format | None) -> None:
    spec = LinearSpec(weight=Format(8), act=act)
    tensors = {
        "residual_codes": torch.full((1, columns), 127, dtype=torch.int8),
        "residual_scales": torch.ones(1, 1),
    }
    layer, x = Layer(spec, (1, columns), tensors), torch.full((1, 1, columns), 127.0)
    assert bool(ops.unsupported(spec, layer.shape, "cpu")) == (columns > 2**16)
    assert ops.pack(layer, "cpu")(x).item() == pytest.approx(127 * 127 * columns, rel=1e-4)


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 3), marks=pytest.mark.slow)], ids=["few", "many"])
def test_every_format_is_computed_or_declined(seeds: range, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "kernels", lambda: ffi.kernels(isa))
    counts: Counter[str] = Counter()
    for seed in seeds:
        draw = random.Random(f"{seed} {isa}")
        forms = [None, *FORMATS]
        for weight in draw.sample(forms, 50) + draw.sample(READ, 50) if seed == 0 else forms + READ:
            for _ in range(20):
                try:
                    layer = random_layer(draw, weight)
                    break
                except UserError:  # groups that do not divide
                    counts["not constructible"] += 1
            for result in (outcome(layer, draw), swapped(layer, draw)):
                assert result, (layer.spec, layer.shape)
                counts[result] += 1
    print(isa, dict(counts))
    assert min(counts[result] for result in ("computed", "unsupported", "refused")) > 5
