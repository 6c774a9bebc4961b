"""The kernels for Arm, compiled by a cross compiler and run by QEMU, in the tests of this processor's; and what
an Arm machine chooses from, with a fake one.
"""

import runpy
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from kernels import test_cpu
from kernels.guest import Guest
from kernels.test_cpu import (  # noqa: F401 — these run with the kernels below
    SCHEMES,
    check,
    make,
    test_any_shape,
    test_bfloat16_between_layers,
    test_every_hadamard_block,
    test_everything_around_a_layer,
    test_extreme_rows,
    test_float_weights,
    test_gated_activations_of_any_shape,
    test_norms_and_gelu_are_precise,
    test_packing_adds_up_what_is_there,
    test_sums_of_the_largest_codes_are_exact,
    test_ties_round_to_even_and_the_first_of_the_largest_gives_the_sign,
    test_weight_only,
)
from kernels.test_cpu_attention import (  # noqa: F401 — these too
    test_attention,
    test_attention_lets_no_bad_number_vanish,
    test_scores_far_below_zero,
    test_weights_of_attention_sum_to_one,
)
from kernels.test_low_rank import (  # noqa: F401 — and these
    test_a_branch_loses_little_to_rounding,
    test_rows_that_words_cannot_hold,
    test_the_largest_words_sum_exactly,
)
from layers import random_layer, shapes

from svdit.kernels.cpu import build, choice, ffi, sources
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.formats import WEIGHT_FORMATS, Format

CC, QEMU, SYSROOT = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
PROCESSORS = {  # the oldest that QEMU has with what each needs
    "neonbf16": "max",
    "neoni8mm": "max",
    "neondot": "neoverse-n1",
    "portable": "cortex-a53",
}
Machine = tuple[list[str], Path]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The command that runs guest.c on an Arm processor, but for its name, and the library."""
    if missing := [name for name in (CC, QEMU) if not shutil.which(name)]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    folder = tmp_path_factory.mktemp("arm")
    guest, library = folder / "guest", folder / "kernels.so"
    source = Path(__file__).with_name("guest.c")
    subprocess.run([CC, "-O1", "-Wall", "-Werror", str(source), "-ldl", "-o", str(guest)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", CC)
        build.compile_library(library)
    return [QEMU, "-L", SYSROOT, str(guest)], library


def started(machine: Machine, isa: str, threads: int) -> Guest:
    (emulator, *rest), library = machine
    return Guest([emulator, "-cpu", PROCESSORS[isa], "-E", f"OMP_NUM_THREADS={threads}", *rest], library)


@pytest.fixture(scope="module", params=[pytest.param(isa, marks=pytest.mark.slow) for isa in PROCESSORS])
def kernels(request: pytest.FixtureRequest, machine: Machine) -> Iterator[ffi.Kernels]:
    guest = started(machine, request.param, threads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ffi, "library", lambda: guest)
        own = ffi.Kernels(request.param)
    yield own
    guest.close()


@pytest.fixture(autouse=True)
def _prepared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest knows this test's tensors; shapes are fewer and have fewer rows, because each call is slow."""
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels").lib.remember(monkeypatch)
    monkeypatch.setattr(test_cpu, "shapes", few_shapes)


def few_shapes(count: int, seed: int) -> Iterator[tuple[int, int, int, int]]:
    return ((min(M, 20), O, I, R) for M, O, I, R in shapes(count // 4, seed))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiles_and_what_is_left_of_them(kernels: ffi.Kernels, scheme: str) -> None:
    """Rows, outputs and ranks around the sizes of tiles: 6 rows, 16 outputs, ranks in steps of 8."""
    for seed, (M, O, R) in enumerate(((1, 1, 1), (5, 15, 7), (6, 16, 8), (7, 17, 9), (12, 48, 16), (13, 33, 33))):
        layer = make(scheme, O, (64, 192)[seed % 2], R, seed)
        check(layer, torch.randn(M, layer.shape[1], generator=torch.Generator().manual_seed(seed)), kernels)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-channel"])
def test_outputs_equal_those_of_this_processor(kernels: ffi.Kernels, name: str) -> None:
    """Without a branch and bias, where nothing is left to the compiler's choice of fused multiply-adds."""
    layer, x = random_layer(100, 320, 0, WEIGHT_FORMATS[name], 2, 64), torch.randn(1, 50, 320)
    assert layer.bias is None
    here, there = (cpu.IntegerLinear(layer, each) for each in (ffi.kernels("portable"), kernels))
    (codes, steps, *_), (others, same, *_) = here.quantize(x), there.quantize(x)
    assert torch.equal(codes.int() - here.offset, others.int() - there.offset) and torch.equal(steps, same)
    assert torch.equal(here(x), there(x))


def test_threads_do_not_change_a_bit(kernels: ffi.Kernels, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(300, 256, 16, WEIGHT_FORMATS["int4"], 1, 64), torch.randn(1, 37, 256)
    qkv = torch.randn(3, 19, 3 * 48).to(kernels.low_dtype)
    alone = started(machine, kernels.isa, threads=1)
    alone.remember(monkeypatch)
    monkeypatch.setattr(ffi, "library", lambda: alone)
    one = ffi.Kernels(kernels.isa)
    expected = cpu.IntegerLinear(layer, one)(x), cpu.attention(qkv, 2, one)
    alone.close()
    kernels.lib.remember(monkeypatch)
    assert torch.equal(cpu.IntegerLinear(layer, kernels)(x), expected[0])
    assert torch.equal(cpu.attention(qkv, 2, kernels), expected[1])


def test_several_calls_in_one(kernels: ffi.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cpu.IntegerLinear(random_layer(96, 64, 8, Format(8), 1), kernels, kernels.low_dtype)
    x = torch.randn(2, 7, 64)
    expected, ran, functions = cpu.attention(layer(x), 2, kernels), list[str](), kernels.functions
    counted = {name: lambda *a, name=name: ran.append(name) or functions[name](*a) for name in functions}
    monkeypatch.setattr(kernels, "functions", counted)
    with ffi.together():
        y = cpu.attention(layer(x), 2, kernels)
    assert torch.equal(y, expected) and ran == ["run"]


@pytest.mark.parametrize("kind", ffi.PEAKS)
def test_peaks_run(kernels: ffi.Kernels, kind: str) -> None:
    assert ffi.peak(kernels, kind, 100) > 0


HAS = {  # what torch lists of processors
    "Cortex-A72": ["neon"],
    "Neoverse N1": ["neon", "fp16_arith", "dot"],
    "Apple M1": ["neon", "fp16_arith", "dot"],
    "Neoverse V1": ["neon", "fp16_arith", "dot", "bf16", "i8mm", "sve"],
}


@pytest.mark.parametrize("name", HAS)
def test_every_instruction_set_of_an_arm_processor_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "capabilities", lambda: dict.fromkeys(HAS[name], True) | {"architecture": "arm64"})
    supported, tried = ffi.isas.__wrapped__(), list[choice.Choice]()
    expected = {"Cortex-A72": [], "Neoverse V1": ["neonbf16", "neoni8mm", "neondot"]}.get(name, ["neondot"])
    assert supported == [*expected, "portable"]
    monkeypatch.setattr(ffi, "built", lambda isa: True)
    monkeypatch.setattr(ffi, "kernels", lambda isa: isa)
    monkeypatch.setattr(choice, "trial_layers", lambda kernels: kernels)
    monkeypatch.setattr(choice, "block_trial", lambda layers, pair: partial(tried.append, pair))
    monkeypatch.setattr(choice, "settled", lambda trials: [run() for run in trials.values()])
    choice.fastest(supported)
    measured = expected or ["portable"]
    assert tried == [choice.Choice(*pair) for pair in product(measured, (*measured, choice.TORCH))]


def test_every_source_compiles_without_openmp() -> None:
    """As on macOS."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    flags = [flag for flag in sources.FLAGS if flag != "-fopenmp"]
    subprocess.run([compiler, *flags, "-Wno-unknown-pragmas", "-fsyntax-only", *build.files()], check=True)


@pytest.mark.parametrize(("system", "expected"), [("linux", True), ("darwin", False)])
def test_macos_has_no_openmp(system: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", system)
    defined = runpy.run_path(sources.__file__)
    assert ("-fopenmp" in defined["FLAGS"]) == expected
