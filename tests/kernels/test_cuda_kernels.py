"""The Triton kernels against the definition: integers bit for bit, floats within the bound of their arithmetic.

Runs on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1, as test_cuda.py runs it), or on a GPU. The bounds
are those of test_cpu.py; on a GPU the low-rank branch is of bfloat16.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from layers import U_BF16, U, error_around, layer_of, random_layer, shapes, with_spec
from runtime.test_families import inputs, quantized

from svdit.kernels import fused, generic, ops
from svdit.kernels import reference as ref
from svdit.kernels.cuda import backend
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.kernels.layer import HeadNorms, Layer, Modulation, Rotation
from svdit.runtime.accelerate import accelerate, fallbacks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 (test_cuda.py sets it) or a GPU", allow_module_level=True)
tri = pytest.importorskip("svdit.kernels.cuda.linear", reason="triton is not installed")
attention = pytest.importorskip("svdit.kernels.cuda.attention")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
INT8, INT4 = Format(8), ACT_FORMATS["int4"]
SCHEMES = {
    "W8A8": ("int8", INT8), "W4A8": ("int4", INT8), "W4A8 channel": ("int4-channel", INT8),
    "W4A4": ("int4", INT4), "W8A4": ("int8", INT4),
}  # fmt: skip


def on_device(layer: Layer) -> Layer:
    return replace(layer, tensors={name: tensor.to(DEVICE) for name, tensor in layer.tensors.items()})


def make(scheme: str, O: int, I: int, R: int, seed: int, hadamard: int = 0) -> Layer:
    weight, act = SCHEMES[scheme]
    return on_device(with_spec(random_layer(O, I, R, WEIGHT_FORMATS[weight], seed, hadamard), act=act))


def sums(layer: Layer, codes: torch.Tensor) -> torch.Tensor:
    """What the integer product gives for codes (M, width), with every scale one: exact in fp32 below 2^24."""
    bare = tri.IntegerLinear(with_spec(layer, rank=0).without("l").without("bias"))
    bare.channel = torch.ones_like(bare.channel)
    steps = torch.ones((len(codes), bare.width // 64) if bare.group else len(codes), device=DEVICE)
    out = torch.full((1, len(codes), layer.shape[0]), torch.nan, device=DEVICE)
    bare.multiply(codes, steps, None, out, False, None)
    return out[0]


def check(layer: Layer, x: torch.Tensor) -> None:
    """Codes, scales and sums equal; every output within its bound of the float64 value, and not all of them exact."""
    act = layer.spec.act
    assert act is not None and not backend.unsupported(layer.spec, layer.shape, DEVICE)
    (M, I), packed, hat = x.shape, tri.IntegerLinear(layer), ref.transform(layer, x)
    codes, scales = ref.quantize(hat, act)
    got, steps, low = packed.quantize(x[None])
    assert torch.equal(got[:, :I], codes)
    assert not got[:, I:].any()
    assert torch.equal(steps.view(M, -1)[:, : scales.groups.shape[1]], scales.values())
    integers = generic.integers(layer).double()
    exact = codes.double() @ integers.T
    assert exact.abs().max() < 2**24
    assert torch.equal(sums(layer, got).double(), exact)
    steps_of = generic.row_steps(layer).double()
    decoded = (ref.grouped(codes.double(), act) * scales.values().double().unsqueeze(-1)).flatten(-2)
    main = decoded @ integers.T * steps_of
    size = decoded.abs() @ integers.abs().T * steps_of
    branch, branch_bound, rank = torch.zeros_like(main), torch.zeros_like(main), 0
    if low is not None:
        rank, l1, l2 = layer.spec.rank, ref.matrix(layer, "l1").double(), ref.matrix(layer, "l2").double()
        branch = hat.double() @ l2.T @ l1.T
        roundings = (I + rank + 4) * U + (2.1 * U_BF16 if low.dtype == torch.bfloat16 else 0)
        branch_bound = roundings * (hat.abs().double() @ l2.abs().T @ l1.abs().T)
    bias = torch.zeros(1, device=DEVICE) if layer.bias is None else layer.bias
    groups = scales.groups.shape[1]
    added = main.abs() if groups == 1 else (1 + groups) * size  # groups are added up in fp32
    bound = (5 + rank) * U * (added + bias.abs()) + branch_bound + U * branch.abs() + 1e-30
    error = (packed(x[None])[0].double() - (main + branch + bias)).abs()
    assert (error <= bound).all(), f"{float((error / bound).max())} of the bound"
    assert error.numel() < 50 or error.max() > 0


def rows(M: int, I: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(M, I, generator=torch.Generator().manual_seed(seed)) * size).to(DEVICE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_shape(scheme: str) -> None:
    for seed, (M, O, I, R) in enumerate(shapes(6, seed=15)):
        grouped = INT4 in SCHEMES[scheme] or SCHEMES[scheme][0] == "int4"
        columns = 64 * (1 + I // 64) if grouped else I
        hadamard = next((b for b in (64, 16, 4, 2) if columns % b == 0 and seed % 4), 0)
        check(make(scheme, O, columns, R, seed, hadamard), rows(M, columns, seed, 10.0 ** (seed % 5 - 2)))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU tiles are chosen by time")
@pytest.mark.parametrize("tile", range(5))
def test_every_tile(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Of the smallest more than eight rows of them, which are taken in groups."""
    monkeypatch.setattr(tri, "PRODUCT_TILE", tri.PRODUCT_TILES[tile].kwargs)
    M = tri.PRODUCT_TILE["BLOCK_M"] * (9 if tile == 4 else 1) + 3
    check(make("W8A8", 100 if tile == 4 else 270, 64, 5, 1, 64), rows(M, 64, 1))


@pytest.mark.parametrize("block", [2, 8, 32, 128, 256])
def test_every_hadamard_block(block: int) -> None:
    check(make("W8A8", 40, 512, 8, 1, block), rows(9, 512, block))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-channel"])
def test_weights_are_unpacked_exactly(name: str) -> None:
    layer = on_device(random_layer(70, 192, 0, WEIGHT_FORMATS[name], 3))
    width = tri.IntegerLinear(layer).width
    one_each = torch.eye(192, width, dtype=torch.int8, device=DEVICE)
    assert torch.equal(sums(layer, one_each), generic.integers(layer).T.float())


@pytest.mark.parametrize("name", ["int8", "int4", "int4-channel"])
def test_sums_of_the_largest_codes_are_exact(name: str) -> None:
    form, g = WEIGHT_FORMATS[name], torch.Generator().manual_seed(1)
    weights = torch.randint(0, 2, (67, 256), generator=g, dtype=torch.int8) * (form.hi - form.lo) + form.lo
    groups = torch.full((67, form.groups(256)), 15.0 if form.group else 1.0) * (1 - 2 * (torch.arange(67) % 2))[:, None]
    scales = ref.Scales(groups.to(ref.SCALE_DTYPES[form.scale]), torch.ones(67, 1) if form.group else None)
    layer = on_device(layer_of(weights, scales, form, INT8))
    codes = torch.randint(0, 2, (13, 256), generator=g) * 254 - 127
    codes[0], codes[1] = 127, -127
    expected = codes @ generic.integers(layer).cpu().long().T
    assert 2**15 < expected.abs().max() < 2**24  # so that float32 holds the sums exactly
    assert torch.equal(sums(layer, codes.to(DEVICE, torch.int8)).cpu().long(), expected)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4"])
def test_extreme_rows(scheme: str) -> None:
    layer = make(scheme, 40, 128, 0, 3)  # no transform
    x = torch.zeros(8, 128, device=DEVICE)
    x[1], x[2] = 1e-40, 2e-45  # subnormal: 2e-45 / 127 is zero
    x[3, 5], x[4] = 3e38 if scheme == "W8A8" else 3e34, torch.finfo(torch.float32).tiny
    x[5, 7], x[6, 9] = torch.nan, torch.inf
    x[7] = torch.linspace(-1, 1, 128)
    finite = [0, 1, 2, 3, 4, 7]
    check(layer, x[[0, 3, 4, 7]])
    packed = tri.IntegerLinear(layer)
    codes, steps, *_ = packed.quantize(x[None])
    expected, scales = ref.quantize(x[finite], SCHEMES[scheme][1])
    assert torch.equal(codes[finite], expected)
    assert torch.equal(steps.view(8, -1)[finite], scales.values())
    y = packed(x[None])[0]
    assert layer.bias is not None and torch.equal(y[0], layer.bias)
    assert y[5].isnan().all() and y[6].isnan().all()
    assert y[finite].isfinite().all()


def test_ties_round_to_even_and_the_first_of_the_largest_gives_the_sign() -> None:
    x = torch.zeros(2, 64, device=DEVICE)
    x[0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    x[1, 3], x[1, 9], x[1, 20] = -8.0, 8.0, 0.5
    eight = tri.IntegerLinear(make("W8A8", 4, 64, 0, 3)).quantize(x[None])[0]
    assert eight[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    codes, steps, _ = tri.IntegerLinear(make("W8A4", 4, 64, 0, 3)).quantize(x[None])
    assert codes[1, [3, 9, 20]].tolist() == [-8, 7, 0] and steps[1, 0] == 1
    x[1, 3] = -8 * (1 + 2**-8)  # in the middle between two bfloat16 scales
    assert tri.IntegerLinear(make("W8A4", 4, 64, 0, 3)).quantize(x[None])[1][1, 0] == 1


def test_numbers_beside_the_middle_are_divided_as_the_definition_divides() -> None:
    steps = rows(40, 1, 7).abs() + 0.1
    x = torch.cat([127 * steps, (torch.arange(126, device=DEVICE) + 0.5) * steps], dim=1)
    codes, scales = ref.quantize(x, INT8)
    assert not torch.equal((x * scales.values().reciprocal()).round().to(torch.int8), codes)
    assert torch.equal(tri.IntegerLinear(make("W8A8", 4, 127, 0, 3)).quantize(x[None])[0][:, :127], codes)


def test_everything_around_a_layer() -> None:
    for N, T, I, O, scheme in (
        (2, 7, 96, 100, "W8A8"),
        (1, 1, 5, 3, "W8A8"),
        (3, 4, 64, 64, "W4A8"),
        (2, 3, 192, 20, "W4A4"),
    ):
        layer = make(scheme, O, I, 4, 1)
        for gelu in (False, True):
            error = error_around(layer, tri.IntegerLinear(layer), N, T, gelu, DEVICE)
            assert error < (0.05 if scheme == "W4A4" else 5e-3) and (error > 0 or T == 1)


def test_layer_norm_and_gelu_are_precise() -> None:
    """Looked at through a weight that hands single codes on."""
    identity = on_device(layer_of(torch.eye(64, dtype=torch.int8), ref.Scales(torch.ones(64, 1)), INT8, INT8))
    x, ones = rows(50, 64, 2)[None] * 40 + 1000, torch.ones(1, 64, device=DEVICE)
    got = tri.IntegerLinear(identity)(x, modulation=Modulation(0 * ones, 0 * ones))
    expected = F.layer_norm(x.double(), (64,), eps=1e-6)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((got - expected).abs() <= step * 0.5 + 2e-5).all()
    y = torch.linspace(-12, 12, 64, device=DEVICE)
    wide = torch.cat([y, torch.full((1,), 127.0, device=DEVICE)])[None, None]
    layer = on_device(layer_of(torch.eye(64, 65, dtype=torch.int8), ref.Scales(torch.ones(64, 1)), INT8, INT8))
    rounded = wide[0, :, :64].round().double()
    got = tri.IntegerLinear(layer)(wide, gelu=True)[0]
    assert (got - F.gelu(rounded, approximate="tanh")).abs().max() < 2e-6


BEFORE = {"rms": (True, False), "glu": (False, True), "glu, rms": (True, True)}  # norm, gated


def before_the_codes(
    scheme: str, before: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of x (2, T, I or 2I): codes and steps of the kernel, x̂ / step by the definition (2T, I), and its codes."""
    rms, glu = BEFORE[before]
    I = x.shape[-1] // (2 if glu else 1)
    layer = make(scheme, 3, I, 0, 1, 0 if I % 64 else 64)
    parts = rows(2, 2 * I, 3).chunk(2, dim=1)
    modulation = Modulation(*parts, True) if rms else None
    codes, steps, _ = tri.IntegerLinear(layer).quantize(x, modulation, glu)
    hat = fused.gated(x.cpu()) if glu else x.cpu()
    hat = hat if not rms else fused.modulated(hat, Modulation(parts[0].cpu(), parts[1].cpu(), True))
    hat = ref.transform(layer, hat.to(DEVICE)).flatten(0, 1)
    assert layer.spec.act is not None
    expected, scales = ref.quantize(hat, layer.spec.act)
    groups = scales.groups.shape[1]
    ratio = (hat.view(len(hat), groups, -1) / scales.values()[:, :, None]).flatten(1)
    steps = steps.view(len(hat), -1)[:, :groups]
    assert ((steps - scales.values()).abs() <= scales.values().abs() * (2**-7 if groups > 1 else 64 * U)).all()
    return codes[:, :I], steps, ratio, expected


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4"])
@pytest.mark.parametrize("before", BEFORE)
def test_norm_and_gate_before_the_codes_are_the_definitions(before: str, scheme: str) -> None:
    """Bit for bit where both are exact: a mean square of 4^k, and silu(a) = a from 18 on or zero below −104."""
    rms, glu = BEFORE[before]
    g = torch.Generator().manual_seed(0)
    pattern = torch.tensor([10, 5, 1, 1, 1, 0, 0, 0]) * 1024.0 if rms else torch.randn(8, generator=g)
    order = torch.rand(2, 5, 192, generator=g).argsort(-1)
    x = pattern.repeat(24)[order] * (torch.randint(0, 2, (2, 5, 192), generator=g) * 2 - 1)
    if glu:
        a = torch.full_like(x, 32.0) if rms else torch.randint(18, 90, x.shape, generator=g).float()
        a = a if rms else torch.where(torch.rand(x.shape, generator=g) < 0.2, -105.0, a)
        x = torch.cat([a, x], dim=-1)
    codes, _, ratio, expected = before_the_codes(scheme, before, x.to(DEVICE))
    assert torch.equal(codes, expected) and ratio.abs().max() >= 7


@pytest.mark.parametrize("before", BEFORE)
def test_norm_and_gate_of_any_row(before: str) -> None:
    """Codes move by one only where the number lies within a thousandth of the edge between two."""
    for seed, columns in enumerate((64, 85, 2, 320)):
        x = rows(6, columns * (1 + BEFORE[before][1]), seed, 10.0 ** (seed - 1)).view(2, 3, -1)
        codes, _, ratio, _ = before_the_codes("W8A8", before, x + seed)
        away = (codes - ratio).abs()
        assert 0.4 < away.max() <= 0.501
        edge = ((ratio - ratio.floor()) - 0.5).abs() < 1e-3
        assert torch.equal(codes[~edge], ratio.round().to(torch.int8)[~edge])


def test_a_gate_that_overflows_and_rows_without_numbers() -> None:
    """e^−a overflows below −88, where silu is zero; NaN and infinities become NaN as in the definition."""
    layer = on_device(layer_of(torch.eye(64, dtype=torch.int8), ref.Scales(torch.ones(64, 1)), INT8, INT8))
    x = torch.ones(1, 5, 128, device=DEVICE)
    x[0, 1, 3], x[0, 2, 3], x[0, 3, 3], x[0, 4, 70] = -1e30, torch.nan, -torch.inf, torch.inf
    y = tri.IntegerLinear(layer)(x, glu=True)[0]
    expected = torch.full((64,), float(F.silu(torch.tensor(1.0))), device=DEVICE)
    assert torch.allclose(y[0], expected, rtol=1e-6)
    assert y[1, 3] == 0 and torch.allclose(y[1, 4:], expected[4:], rtol=1e-6)
    assert y[2:].isnan().all()


NORMS = {"none": 0, "rms": 1, "layer": 2}  # tables


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_rotation_of_queries_and_keys(norm: str, turn: bool) -> None:
    for seed, (N, T, heads, head) in enumerate(((2, 5, 3, 72), (1, 1, 1, 2), (1, 7, 2, 80), (3, 2, 1, 16))):
        qkv = rows(N * T, 3 * heads * head, seed, 3).view(N, T, 3, heads, head) + 1
        qkv = qkv if INTERPRETED else qkv.bfloat16()
        tables = [rows(2, head, i) + 1 - i for i in range(NORMS[norm])]
        norms = HeadNorms(*tables) if tables else None
        angles = rows(T, head, 5) * 3
        rotation = Rotation(angles.cos(), angles.sin()) if turn else None
        got = attention.prepared(qkv, norms, rotation)
        expected = fused.prepared(qkv, norms, rotation)[:, :, :2]
        assert got.shape == (N, T, 2, heads, head) and got.is_contiguous() and got.dtype == qkv.dtype
        if norms is None:
            assert torch.equal(got, expected)
        unit = U if INTERPRETED else U_BF16
        assert relative(got, expected) < 8 * unit
        y = ops.attention(qkv.flatten(2), heads, "triton", norms=norms, rotation=rotation)
        assert relative(y, fused.attention(qkv.flatten(2), heads, norms, rotation)) < 64 * unit


def test_tables_are_checked_before_a_launch() -> None:
    qkv = rows(4, 3 * 2 * 8, 0).view(1, 4, 48)
    table = rows(3, 8, 1)  # of three tokens instead of four
    with pytest.raises(ValueError, match=r"got \(3, 8\) .*expected a contiguous \(4, 8\)"):
        ops.attention(qkv, 2, "triton", rotation=Rotation(table, table))
    with pytest.raises(ValueError, match=r"expected a contiguous \(2, 8\)"):
        ops.attention(qkv, 2, "triton", norms=HeadNorms(table))
    with pytest.raises(ValueError, match=r"expected a contiguous \(1, 4, 32\)"):
        tri.IntegerLinear(make("W8A8", 4, 16, 0, 1))(rows(4, 16, 0)[None], glu=True)


def test_weight_only() -> None:
    names = ("int8", "int4-channel", "int4-bf16", "int4")
    for seed, (M, O, I, _) in enumerate(shapes(12, seed=5)):
        form = WEIGHT_FORMATS[names[seed % 4]]
        columns = 64 * (1 + I // 64) if form.bits == 4 else I
        layer = with_spec(random_layer(O, columns, 0, form, seed), act=None, scaled=False, shifted=seed % 3 == 1)
        layer = on_device(layer)
        assert not backend.unsupported(layer.spec, layer.shape, DEVICE)
        x = rows(M, columns, seed)
        weight = ref.matrix(layer).double()
        bias = torch.zeros(O, device=DEVICE) if layer.bias is None else layer.bias
        shift = torch.zeros(columns, device=DEVICE) if layer.in_shift is None else layer.in_shift
        got = tri.weight_only(layer)(x[None])[0].double()
        split = 0 if INTERPRETED else U_BF16**2  # x as the sum of two bfloat16
        sums = (x.abs() + shift.abs()).double() @ weight.abs().T
        bound = ((columns + 4) * U + split) * sums + U * bias.abs() + 1e-30
        bound += U * (bias - shift.double() @ weight.T).abs()
        assert ((got - ((x - shift.double()) @ weight.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dit", "w4a4"),
        ("jit", "w8a8"),
        pytest.param("repa", "w8a8", marks=pytest.mark.slow),
        pytest.param("lightningdit without shift", "w4a8", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_whole_models_of_every_kind_of_block(name: str, config: str) -> None:
    """Every layer, the steps around them and the conditioning; see test_cuda.py for the digits on a GPU."""
    model = quantized(name, config)
    example = [part[1:3].to(DEVICE) for part in inputs(model)]
    model = model.to(DEVICE)
    expected = model(*example)
    fast = accelerate(model, "triton")
    assert not any(fallbacks(fast).values())
    eager = fast(*example)
    assert 0 < relative(eager, expected) < (0.02 if config == "w4a4" or not INTERPRETED else 2e-3)
    if name == "lightningdit without shift":
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)  # a graph break is an error
        assert relative(compiled(*example), eager) < (1e-5 if INTERPRETED else 0.02)
