"""The kernels of amx.c with AMX's instructions in plain C (tiles.h), and its selection; where there is AMX the tests of
all instruction sets run it too.
"""

import ctypes
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from kernels.test_cpu import (  # noqa: F401 — these run with the kernels below
    SCHEMES,
    check,
    make,
    test_everything_around_a_layer,
    test_extreme_rows,
    test_float_weights,
    test_sums_of_the_largest_codes_are_exact,
    test_threads_do_not_change_a_bit,
    test_weight_only,
)
from kernels.test_cpu_attention import test_attention  # noqa: F401 — this too
from kernels.test_low_rank import (  # noqa: F401 — and these
    test_a_branch_loses_little_to_rounding,
    test_rows_that_words_cannot_hold,
    test_the_largest_words_sum_exactly,
)
from layers import random_layer, with_spec

from svdit.errors import UserError
from svdit.kernels.cpu import build, choice, ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.cpu.features import cpuinfo, permits_tiles
from svdit.kernels.formats import Format


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ffi.Kernels:
    if "avx512bf16" not in ffi.isas():
        pytest.skip("no AVX512-BF16")
    path, every = tmp_path_factory.mktemp("amx") / "amx.so", build.files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "files", lambda: [name for name in every if Path(name).stem in ("amx", "source")])
        build.compile_library(path, ["-include", str(Path(__file__).with_name("tiles.h"))])
        patch.setattr(ffi, "library", lambda: ctypes.CDLL(str(path)))
        return ffi.Kernels("amx")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_any_shape(kernels: ffi.Kernels, scheme: str) -> None:
    """Rows in whole blocks and parts of one; columns and ranks that fill registers, and some left."""
    grouped = any(form.group for form in SCHEMES[scheme])
    for seed, (M, I) in enumerate(product((1, 15, 16, 17, 32, 33, 70), (48, 64, 200, 256))):
        layer = make(scheme, (3, 64, 130)[seed % 3], padded(I, grouped), (0, 7, 32, 33, 70)[seed % 5], seed)
        check(layer, torch.randn(M, layer.shape[1], generator=torch.Generator().manual_seed(seed)), kernels)


def padded(columns: int, grouped: bool) -> int:
    return ffi.padded(columns, 64) if grouped else columns


@pytest.mark.parametrize("act", [32, 64, 128, 256])
@pytest.mark.parametrize("weight", [32, 64, 128, 256])
def test_groups_of_activations_and_weights(kernels: ffi.Kernels, weight: int, act: int) -> None:
    layer = with_spec(random_layer(70, 768, 33, Format(4, weight, "bf16"), 1), act=Format(4, act, "bf16", "full"))
    check(layer, torch.randn(50, 768, generator=torch.Generator().manual_seed(1)), kernels)


@pytest.mark.parametrize(
    ("scheme", "rows", "outputs"),
    [
        ("W8A8", 50, 100),
        ("W4A8", 50, 600),
        ("W4A8 channel", 50, 100),
        ("W4A4", 50, 600),
        ("W8A8 of floating scales", 50, 100),
        pytest.param("W4A8", 4200, 40, id="rows in parts"),
    ],
)
def test_without_a_branch_outputs_equal_those_of_avx512(
    kernels: ffi.Kernels, scheme: str, rows: int, outputs: int
) -> None:
    layer, x = make(scheme, outputs, 320, 0, 1, 64), torch.randn(1, rows, 320)
    expected = cpu.IntegerLinear(layer, ffi.kernels("avx512bf16"))(x)
    assert torch.equal(cpu.IntegerLinear(layer, kernels)(x), expected)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4"])
def test_a_row_does_not_depend_on_the_others(kernels: ffi.Kernels, scheme: str) -> None:
    packed, x = cpu.IntegerLinear(make(scheme, 70, 192, 40, 1), kernels), torch.randn(1, 83, 192)
    parts = x.split((1, 3, 16, 17, 32, 14), 1)
    assert torch.equal(packed(x), torch.cat([packed(part) for part in parts], 1))


def test_every_thread_configures_and_releases_its_registers(kernels: ffi.Kernels) -> None:
    """A register that its thread has not configured ends the process (tiles.h)."""
    packed, before = cpu.IntegerLinear(random_layer(300, 128, 32, Format(8), 1), kernels), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        packed(torch.randn(1, 70, 128))
        ffi.peak(kernels, "int8", 1)
    finally:
        torch.set_num_threads(before)
    assert ctypes.c_int.in_dll(kernels.lib, "configured_threads").value == 0


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("part", [0, 2], ids=["codes", "low"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A4"])
def test_nothing_behind_the_last_row_is_read(kernels: ffi.Kernels, scheme: str, rows: int, part: int) -> None:
    packed, many = cpu.IntegerLinear(make(scheme, 70, 192, 40, 1), kernels), torch.randn(1, 64, 192)
    expected, whole = packed(many[:, :rows]), packed.quantize(many)
    first, last = (whole[part][row:].data_ptr() for row in (rows, 63))
    forbidden = (ctypes.c_int64 * 3).in_dll(kernels.lib, "forbidden")
    forbidden[:] = [first, last, 0]
    y = packed.multiply(tuple(tensor[:rows] for tensor in whole), 1)
    loads, forbidden[:] = forbidden[2], [0, 0, 0]
    assert torch.equal(y, expected) and loads == 0


@pytest.mark.parametrize("permitted", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_amx_is_measured_where_linux_permits_it_and_the_compiler_knew_it(
    monkeypatch: pytest.MonkeyPatch, permitted: bool, compiled: bool
) -> None:
    monkeypatch.setattr(ffi, "capabilities", lambda: dict.fromkeys(sum(ffi.ISAS.values(), ()), True))
    monkeypatch.setattr(ffi, "permits_tiles", lambda: permitted)
    supported = ffi.isas.__wrapped__()
    assert ("amx" in supported) == permitted
    tried: list[choice.Choice] = []
    monkeypatch.setattr(ffi, "built", lambda isa: compiled or isa != "amx")
    monkeypatch.setattr(ffi, "kernels", lambda isa: isa)
    monkeypatch.setattr(choice, "trial_layers", lambda kernels: kernels)
    monkeypatch.setattr(choice, "block_trial", lambda layers, pair: partial(tried.append, pair))
    monkeypatch.setattr(choice, "settled", lambda trials: [run() for run in trials.values()])
    choice.fastest(supported)
    measured = {pair.linears for pair in tried}
    assert measured >= {"avx512bf16", "avx2"}
    assert ("amx" in measured) == (permitted and compiled)


@pytest.mark.skipif(not cpuinfo(), reason="Linux lists extensions there")
def test_linux_permits_what_it_lists() -> None:
    assert permits_tiles() == ("amx_tile" in cpuinfo().split())


def test_a_compiler_without_amx_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "library", lambda: ctypes.CDLL(None))
    with pytest.raises(UserError, match="the CPU kernels were compiled without amx"):
        ffi.Kernels("amx")
