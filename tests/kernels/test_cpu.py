"""The C kernels against the definition: integers bit for bit, floats within the bound of their arithmetic.

U is the unit roundoff. A product of integers is exact; turning it into a number rounds four times. A sum of n
products in any order is off by at most n·U times the sum of magnitudes.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layers import U, branch_bound, error_around, layer_of, random_layer, shapes, with_spec

from svdit.kernels import generic
from svdit.kernels import reference as ref
from svdit.kernels.cpu import build, ffi, packing
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.kernels.fused import gated
from svdit.kernels.layer import Layer, Modulation

INT8, SYMMETRIC = Format(8), Format(4, 64, "bf16")
SCHEMES = {
    "W8A8": (INT8, INT8),
    "W4A8": (WEIGHT_FORMATS["int4"], INT8),
    "W4A8 channel": (WEIGHT_FORMATS["int4-channel"], INT8),
    "W4A4": (WEIGHT_FORMATS["int4"], ACT_FORMATS["int4"]),
    "W4A4 channel": (WEIGHT_FORMATS["int4-channel"], ACT_FORMATS["int4"]),
    "W4A4 of groups of 32": (Format(4, 32, "bf16", "full"), replace(SYMMETRIC, group=32)),
    "W4A8 of floating scales": (WEIGHT_FORMATS["int4-bf16"], INT8),
    "W4A8 of groups of 16": (Format(4, 16, "bf16"), INT8),
    "W8A8 of floating scales": (Format(8, 64, "bf16", "full"), INT8),
    "W8A4": (INT8, ACT_FORMATS["int4"]),
    "published W4A4": (SYMMETRIC, SYMMETRIC),
    "published fc2": (SYMMETRIC, replace(SYMMETRIC, span="unsigned")),
}  # fmt: skip

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


@pytest.fixture(scope="module", params=ffi.isas())
def kernels(request: pytest.FixtureRequest) -> ffi.Kernels:
    return ffi.Kernels(request.param)


def make(scheme: str, O: int, I: int, R: int, seed: int, hadamard: int = 0) -> Layer:
    weight, act = SCHEMES[scheme]
    return with_spec(random_layer(O, I, R, weight, seed, hadamard), act=act)


def check(layer: Layer, x: torch.Tensor, kernels: ffi.Kernels, glu: bool = False) -> None:
    """Codes and steps equal; every output within its bound of the float64 value, and not all of them exact."""
    act = layer.spec.act
    assert act is not None and not cpu.unsupported(layer.spec, layer.shape, x.device)
    packed, I = cpu.IntegerLinear(layer, kernels), layer.shape[1]
    hat = ref.transform(layer, gated(x) if glu else x)
    codes, scales = ref.quantize(hat, act)
    got, steps, *_ = packed.quantize(x[None], glu=glu)
    assert torch.equal((got[:, :I].int() - packed.offset).to(codes.dtype), codes)
    assert (got[:, I:] == packed.offset).all()
    assert torch.equal(steps, scales.values())
    if packed.floats:  # groups are added up in fp32
        weight = in_float64(ref.layer_codes(layer), ref.layer_scales(layer), layer.form("residual"))
        rounded = in_float64(codes, scales, act)
        main, added = rounded @ weight.T, (1 + I // packed.group) * (rounded.abs() @ weight.abs().T)
    else:
        main = codes.double() @ generic.integers(layer).double().T * steps.double() * generic.row_steps(layer).double()
        added = main.abs()
    hat64 = hat.double()
    low, low_bound = torch.zeros_like(main), torch.zeros_like(main)
    if rank := layer.spec.rank:
        l1, l2 = ref.matrix(layer, "l1").double(), ref.matrix(layer, "l2").double()
        low = hat64 @ l2.T @ l1.T
        low_bound = branch_bound(kernels, hat64, l1, l2)
    bias = torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias
    y = packed(x[None], glu=glu)[0].double()
    bound = (5 + rank) * U * (added + bias.abs()) + low_bound + U * low.abs() + 1e-30  # the branch runs on top of it
    error = (y - (main + low + bias)).abs()
    assert (error <= bound).all(), f"{float((error / bound).max())} of the bound"
    assert error.max() > 0 or y.numel() < 50 or packed.floats  # few groups of bfloat16 scales are exact


def in_float64(codes: torch.Tensor, scales: ref.Scales, form: Format) -> torch.Tensor:
    """What codes (…, K) stand for, as it is without rounding."""
    steps = torch.ones(1) if scales.steps is None else scales.steps
    values = scales.groups.double() * steps.double()
    return (ref.grouped(codes.double(), form) * values.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_shape(kernels: ffi.Kernels, scheme: str) -> None:
    for seed, (M, O, I, R) in enumerate(shapes(40, seed=len(scheme))):
        columns = 64 * (1 + I // 64) if any(form.group for form in SCHEMES[scheme]) else I
        hadamard = next((b for b in (64, 16, 4, 2) if columns % b == 0 and seed % 4), 0)
        x = torch.randn(M, columns, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5 - 2)
        check(make(scheme, O, columns, R, seed, hadamard), x, kernels)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gated_activations_of_any_shape(kernels: ffi.Kernels, scheme: str) -> None:
    """silu(a) is exactly a above 20 and 0 below −110, so that codes are equal; then every a."""
    for seed, (M, O, I, R) in enumerate(shapes(15, seed=len(scheme) + 1)):
        columns = 64 * (1 + I // 64) if any(form.group for form in SCHEMES[scheme]) else I
        hadamard = next((b for b in (64, 16, 4, 2) if columns % b == 0 and seed % 4), 0)
        g = torch.Generator().manual_seed(seed)
        layer, x = make(scheme, O, columns, R, seed, hadamard), torch.randn(M, 2 * columns, generator=g)
        a = x[:, :columns]
        exact = torch.where(a > -0.5, a.abs() * 9 + 20, -110)
        check(layer, torch.cat([exact, x[:, columns:]], 1), kernels, glu=True)
        check_gated_numbers(layer, x * 3, kernels)


def check_gated_numbers(layer: Layer, x: torch.Tensor, kernels: ffi.Kernels) -> None:
    """What the codes stand for differs from x̂, clamped to the largest codes, by half a step and rounding."""
    act, packed, I = layer.spec.act, cpu.IntegerLinear(layer, kernels), layer.shape[1]
    assert act is not None
    hat = ref.transform(layer, gated(x)).double()
    codes, steps, *_ = packed.quantize(x[None], glu=True)
    steps = steps.double().repeat_interleave(I // steps.shape[1], 1)
    ends = torch.stack([steps * act.lo, steps * act.hi])
    error = (codes[:, :I].double() - packed.offset) * steps - hat.clamp(ends.amin(0), ends.amax(0))
    rounding = 400 * U * (hat.abs().amax() + gated(x).abs().amax())
    assert (error.abs() <= steps.abs() / 2 + rounding).all()


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64, 128, 256])
def test_every_hadamard_block(kernels: ffi.Kernels, block: int) -> None:
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(block))
    check(random_layer(70, 512, 8, INT8, 1, block), x, kernels)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-channel"])
def test_sums_of_the_largest_codes_are_exact(kernels: ffi.Kernels, name: str) -> None:
    form, g = WEIGHT_FORMATS[name], torch.Generator().manual_seed(1)
    weights = torch.randint(0, 2, (67, 256), generator=g, dtype=torch.int8)
    codes = weights * (form.hi - form.lo) + form.lo
    signs = 1 - 2 * (torch.arange(67) % 2) * (form.span == "full")
    groups = torch.full((67, form.groups(256)), 15.0 if form.group else 1.0) * signs[:, None]
    scales = ref.Scales(groups.to(ref.SCALE_DTYPES[form.scale]), torch.ones(67, 1) if form.group else None)
    layer = layer_of(codes, scales, form, INT8)
    x = torch.randint(0, 2, (13, 256), generator=g) * 254.0 - 127
    x[0], x[1] = 127, -127
    integers = generic.integers(layer)
    expected = x.long() @ (integers.long() * generic.row_steps(layer).long()[:, None]).T
    assert expected.abs().max() < 2**24  # so that float32 holds the sums exactly
    assert torch.equal(cpu.IntegerLinear(layer, kernels)(x[None])[0].long(), expected)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-channel"])
def test_packing_adds_up_what_is_there(kernels: ffi.Kernels, name: str) -> None:
    """And not what a row is padded with."""
    for seed, I in enumerate((1, 7, 13, 64, 200)):
        layer = random_layer(67, 64 * I if name == "int4" else I, 0, WEIGHT_FORMATS[name], seed)
        assert torch.equal(packing.pack_weight(layer, kernels)[1], generic.integers(layer).sum(1, dtype=torch.int32))


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4", "published W4A4"])
def test_extreme_rows(kernels: ffi.Kernels, scheme: str) -> None:
    layer = make(scheme, 40, 128, 0, 3)  # no transform
    x = torch.zeros(8, 128)
    x[1], x[2] = 1e-40, 2e-45  # subnormal: 2e-45 / 127 is zero
    x[3, 5], x[4] = 3e37, torch.finfo(torch.float32).tiny
    x[5, 7], x[6, 9] = torch.nan, torch.inf
    x[7] = torch.linspace(-1, 1, 128)
    finite = x[[0, 1, 2, 3, 4, 7]]
    check(layer, finite, kernels)
    y = cpu.IntegerLinear(layer, kernels)(x[None])[0]
    assert layer.bias is not None
    assert torch.equal(y[0], layer.bias)
    assert y[5].isnan().all() and y[6].isnan().all()
    assert y[[0, 1, 2, 3, 4, 7]].isfinite().all()


def test_ties_round_to_even_and_the_first_of_the_largest_gives_the_sign(kernels: ffi.Kernels) -> None:
    x = torch.zeros(2, 64)
    x[0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    x[1, 3], x[1, 9], x[1, 20] = -8.0, 8.0, 0.5
    eight = cpu.IntegerLinear(make("W8A8", 4, 64, 0, 3), kernels)
    assert (eight.quantize(x[None])[0][0, :8].int() - eight.offset).tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    four = cpu.IntegerLinear(make("W4A4", 4, 64, 0, 3), kernels)
    for sign, codes in ((1, [-8, 7, 0]), (-1, [-8, 7, 0])):
        got, steps, *_ = four.quantize(sign * x[None])
        assert (got[1, [3, 9, 20]].int() - four.offset).tolist() == codes and steps[1, 0] == sign
    x[1, 3] = -8 * (1 + 2**-8)  # in the middle between two bfloat16 scales
    assert four.quantize(x[None])[1][1, 0] == 1


def test_everything_around_a_layer(kernels: ffi.Kernels) -> None:
    for N, T, I, O, scheme in (
        (2, 7, 96, 100, "W8A8"), (1, 1, 5, 3, "W8A8"), (3, 4, 17, 64, "W8A8"), (2, 9, 128, 70, "W4A4"),
    ):  # fmt: skip
        layer = make(scheme, O, I, 4, 1)
        for gelu, rms in ((False, False), (True, False), (False, True)):
            error = error_around(layer, cpu.IntegerLinear(layer, kernels), N, T, gelu, torch.device("cpu"), rms)
            bound = 0.05 if scheme == "W4A4" else 5e-3
            assert error < bound and (error > 0 or T == 1)


def test_bfloat16_between_layers(kernels: ffi.Kernels) -> None:
    """It is read as the floats it stands for, and written as float32 output rounded."""
    for seed, (M, O, I, R) in enumerate(shapes(20, seed=9)):
        layer = make("W8A8", O, I, R, seed)
        x = torch.randn(1, M, I, generator=torch.Generator().manual_seed(seed)).bfloat16()
        packed, inner = cpu.IntegerLinear(layer, kernels), cpu.IntegerLinear(layer, kernels, kernels.low_dtype)
        halves = torch.randn(1, M, 2 * I, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for part, glu in ((x, False), (halves, True)):
            for half, whole in zip(
                packed.quantize(part, None, glu), packed.quantize(part.float(), None, glu), strict=True
            ):
                assert torch.equal(half, whole)
        for gelu in (False, True):
            y = packed(x, gelu=gelu)
            assert torch.equal(packed(x.float(), gelu=gelu), y)
            assert torch.equal(inner(x, gelu=gelu), y.to(kernels.low_dtype))


def test_norms_and_gelu_are_precise(kernels: ffi.Kernels) -> None:
    """Looked at through a weight that hands single codes on."""
    identity = layer_of(torch.eye(64, dtype=torch.int8), ref.Scales(torch.ones(64, 1)), INT8, INT8)
    x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(2)) * 40 + 1000
    ones = torch.ones(1, 64)
    got = cpu.IntegerLinear(identity, kernels)(x, modulation=Modulation(0 * ones, 0 * ones))
    expected = F.layer_norm(x.double(), (64,), eps=1e-6)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((got - expected).abs() <= step * 0.5 + 2e-5).all()
    x = torch.cat([x[:, :40] / 1e3, torch.full((1, 1, 64), 1e-3)], 1)
    got = cpu.IntegerLinear(identity, kernels)(x, modulation=Modulation(0 * ones, 0 * ones, rms=True))
    expected = F.rms_norm(x.double(), (64,), eps=1e-6)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((got - expected).abs() <= step * 0.5 + 1e-6).all()
    y = torch.linspace(-12, 12, 64)
    wide = torch.cat([y, torch.tensor([127.0 * 12 / 12])])[None, None]
    layer = layer_of(torch.eye(64, 65, dtype=torch.int8), ref.Scales(torch.ones(64, 1)), INT8, INT8)
    rounded = wide[0, :, :64].round().double()
    got = cpu.IntegerLinear(layer, kernels)(wide, gelu=True)[0]
    assert (got - F.gelu(rounded, approximate="tanh")).abs().max() < 2e-6


def test_weight_only(kernels: ffi.Kernels) -> None:
    """Each row as it is alone, too."""
    for seed, (M, O, I, _) in enumerate(shapes(30, seed=5)):
        named = (WEIGHT_FORMATS[name] for name in ("int4-channel", "int4-bf16", "int4"))
        form = (INT8, *named, Format(4, 32, "bf16"))[seed % 5]
        columns = 64 * (1 + I // 64) if form.bits == 4 else I
        layer = with_spec(random_layer(O, columns, 0, form, seed), act=None, scaled=False, shifted=seed % 3 == 1)
        assert not cpu.unsupported(layer.spec, layer.shape, layer.device)
        x = torch.randn(M, columns, generator=torch.Generator().manual_seed(seed))
        weight = ref.matrix(layer).double()
        bias = torch.zeros(O) if layer.bias is None else layer.bias
        shift = torch.zeros(columns) if layer.in_shift is None else layer.in_shift
        call = cpu.weight_only(layer, kernels)
        got = call(x[None])[0]
        assert torch.equal(got, torch.cat([call(row[None])[0] for row in x.split(1)]))
        # x W and shift W are rounded one by one, and the sum of the latter and the bias twice.
        bound = (columns + 2) * U * ((x.abs() + shift.abs()).double() @ weight.abs().T) + U * bias.abs()
        bound += U * (bias - shift.double() @ weight.T).abs()
        assert ((got - ((x - shift.double()) @ weight.T + bias)).abs() <= bound).all()


def test_float_weights(kernels: ffi.Kernels) -> None:
    """More rows than a thread takes at once too; each row as it is alone."""
    for seed, (M, O, I, _) in enumerate([*shapes(20, seed=6), (150, 37, 70, 0)]):
        g = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(M, I, generator=g), torch.randn(O, I, generator=g)
        bias = torch.randn(O, generator=g) if seed % 2 else None
        got = cpu.weigh(x, weight, bias, kernels)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias)
        bound = (I + 2) * U * (x.abs().double() @ weight.abs().double().T) + U * expected.abs()
        assert ((got - expected).abs() <= bound).all()
        assert torch.equal(got, torch.cat([cpu.weigh(row, weight, bias, kernels) for row in x.split(1)]))
    assert cpu.weigh(x[:0], weight, None, kernels).shape == (0, O)
    assert cpu.weigh(x, weight[:0], None, kernels).shape == (len(x), 0)


def test_weight_only_supports_groups_of_whole_chunks() -> None:
    """Other layers are decoded once to floats (see test_ops)."""
    for group, supported in ((16, False), (32, True), (48, False), (64, True)):
        layer = random_layer(4, 192, 0, Format(4, group, "bf16"), 0)
        spec = with_spec(layer, act=None).spec
        assert (cpu.unsupported(spec, layer.shape, layer.device) == "") == supported


def test_threads_do_not_change_a_bit(kernels: ffi.Kernels) -> None:
    layer = random_layer(300, 256, 16, WEIGHT_FORMATS["int4"], 1, 64)
    packed, x = cpu.IntegerLinear(layer, kernels), torch.randn(1, 37, 256)
    one, before = packed(x), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(packed(x), one)
    finally:
        torch.set_num_threads(before)


def test_pointers_are_checked() -> None:
    x = torch.zeros(4, 6)
    assert ffi.pointer(None, torch.float32, (1,)) is None
    assert ffi.pointer(x, torch.float32, (4, 6)) == x.data_ptr()
    for bad, dtype, shape in (
        (x.t(), torch.float32, (6, 4)), (x, torch.float64, (4, 6)), (x, torch.float32, (4, 5)),
        (x.to("meta"), torch.float32, (4, 6)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            ffi.pointer(bad, dtype, shape)
    for part in (x.t()[:4], x.double()[:, :4], x[:, ::2]):
        with pytest.raises(ValueError, match="expected"):
            ffi.row_pointer(part, 4, part.shape[1], 6)


def test_one_openmp_runtime() -> None:
    """In a process of its own: scikit-learn, which other tests import, brings another."""
    code = "import torch; from svdit.kernels.cpu import build; build.library(); print(*build.openmp_runtimes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("CC", "no-such-compiler", "no-such-compiler cannot be run"),
    ("CC", "false", "did not compile"),
    ("PATH", "", "there is no C compiler"),
    ("SVDIT_KERNELS", "/nowhere.so", "/nowhere.so cannot be loaded"),
])  # fmt: skip
def test_without_a_library_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_installed", lambda: None)
    monkeypatch.delenv("SVDIT_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if variable == "PATH":
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv(variable, value)
    with pytest.raises(build.MissingKernelsError, match=message):
        build._find()
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library()._name
    monkeypatch.setattr(build, "source_hash", lambda: "0" * 16)
    assert build._load(path) is None
    monkeypatch.setenv("SVDIT_KERNELS", path)
    with pytest.raises(build.MissingKernelsError, match="was not made from these sources"):
        build._find()
