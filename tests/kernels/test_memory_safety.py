"""Tensors that do not fit raise before a C kernel reads them, also under `python -O`; and allocations that fail raise.

Run as a program, this file prints the calls that did not raise.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from layers import random_layer, with_spec

from svdit.errors import UserError
from svdit.kernels.cpu import choice, ffi, packing
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.kernels.layer import HeadNorms, Layer, Modulation, Residual, Rotation

PACKAGE = Path(cpu.__file__).parents[2]
O, I, R = 48, 64, 8
MISFITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "another device": lambda x: x.to("meta"),
    "a column fewer": lambda x: x[..., :-1].contiguous(),
    "a column more": lambda x: torch.cat([x, x[..., :1]], -1),
    "an image fewer": lambda x: x[:-1],
}
STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


def weights_alone(layer: Layer) -> Layer:
    return with_spec(layer, act=None, scaled=False, shifted=False).without("in_")


def calls(kernels: ffi.Kernels) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every call of a C kernel with one tensor that does not fit."""
    layer = random_layer(O, I, R, WEIGHT_FORMATS["int4"], 1, 64)
    packed, only = cpu.IntegerLinear(layer, kernels), cpu.weight_only(weights_alone(layer), kernels)
    x, rows, gate = torch.ones(2, 5, I), torch.ones(2, I), torch.ones(2, O)
    stream, qkv = torch.ones(2, 5, O), torch.ones(2, 5, 3 * I).to(kernels.low_dtype)
    quantized = packed.quantize(x)
    weights, angles = torch.ones(2, 2, I // 2), torch.ones(2, 5, I // 2)
    for name, change in {**MISFITS, **STRIDED}.items():
        images = name == "an image fewer"  # of x and qkv any number is right
        if not images:
            yield f"quantize, x {name}", lambda f=change: packed.quantize(f(x))
        if not images and name not in STRIDED:  # the call itself makes x contiguous
            yield f"call, x {name}", lambda f=change: packed(f(x))
        if not images and name not in ("float16", "float64", "every other column", "transposed"):
            yield f"weight-only, x {name}", lambda f=change: only(f(x))
        if not images and "column " not in name:
            yield f"attention, qkv {name}", lambda f=change: cpu.attention(f(qkv), 2, kernels)
            yield f"quantize, gated x {name}", lambda f=change: packed.quantize(f(torch.cat([x, x], -1)), None, True)
        for part in range(2):
            norms = HeadNorms(*(change(t) if i == part else t for i, t in enumerate(weights)))
            tables = Rotation(*(change(t) if i == part else t for i, t in enumerate(angles)))
            yield f"norms {part} {name}", lambda norms=norms: cpu.attention(qkv, 2, kernels, norms)
            yield f"tables {part} {name}", lambda r=tables: cpu.attention(qkv, 2, kernels, None, r)
        yield f"shift {name}", lambda f=change: packed(x, modulation=Modulation(f(rows), rows))
        yield f"scale {name}", lambda f=change: packed(x, modulation=Modulation(rows, f(rows)))
        yield f"gate {name}", lambda f=change: packed(x, residual=Residual(stream.clone(), f(gate)))
        yield f"stream {name}", lambda f=change: packed(x, residual=Residual(f(stream), gate))
        for place, tensor in enumerate(quantized):
            parts = [*quantized]
            parts[place] = change(tensor)
            if not (tensor.shape[1] == 1 and name == "transposed"):  # one column is contiguous in any order
                yield f"multiply, part {place} {name}", lambda p=tuple(parts): packed.multiply(p, 2)
        stored = layer.tensors["residual_codes"]
        changed = {**layer.tensors, "residual_codes": change(stored)}
        if name not in STRIDED:  # packing makes codes contiguous
            yield f"codes {name}", lambda t=changed: packing.pack_weight(replace(layer, tensors=t), kernels)
            if "float" not in name:
                yield f"factor {name}", lambda f=change: packing.pack_l1(f(layer.tensors["l1"]), (O, R), kernels)
    yield "rows that are no whole images", lambda: packed.multiply(tuple(part[:9] for part in quantized), 2)
    yield "heads that do not divide", lambda: cpu.attention(qkv, 5, kernels)
    yield "pairs that do not divide", lambda: cpu.attention(qkv, I, kernels, None, Rotation(*torch.ones(2, 5, 1)))
    yield "no heads", lambda: cpu.attention(qkv, 0, kernels)
    for form in (Format(3, span="full"), Format(4, 4, "int8"), Format(8, span="unsigned")):
        odd = random_layer(O, I, 0, form, 0)
        yield f"{form} {form.span} packed", lambda odd=odd: cpu.IntegerLinear(odd, kernels)
        yield f"{form} {form.span} alone", lambda odd=odd: cpu.weight_only(weights_alone(odd), kernels)
    yield (
        "Hadamard blocks that do not divide",
        lambda: cpu.IntegerLinear(random_layer(O, 100, 0, Format(8), 0, 64), kernels),
    )


def accepted(kernels: ffi.Kernels) -> tuple[int, list[str]]:
    """How many calls there are, and those that did not raise."""
    names = []
    made = list(calls(kernels))
    for name, call in made:
        try:
            call()
        except (ValueError, TypeError, RuntimeError, UserError, NotImplementedError):
            continue
        names.append(name)
    return len(made), names


@pytest.mark.parametrize("isa", ffi.isas())
def test_tensors_that_do_not_fit_raise(isa: str) -> None:
    count, names = accepted(ffi.kernels(isa))
    assert count > 80 and names == []


def run(*command: str, **environment: str) -> str:
    """The output of Python in a process of its own."""
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **paths, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_they_raise_without_assertions_too() -> None:
    assert re.fullmatch(r"\d+ calls, accepted: \[\]\n", run("-O", __file__))


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_change_a_buffer(default: torch.dtype) -> None:
    """Buffers of the default type would be half as long as what the kernels write."""
    kernels, x = choice.kernels(), torch.randn(2, 5, I)
    layer = random_layer(O, I, R, WEIGHT_FORMATS["int4"], 1, 64)
    qkv = torch.randn(2, 5, 3 * I).to(kernels.low_dtype)
    packed = cpu.IntegerLinear(layer, kernels)
    expected = [packed(x), packed.quantize(x)[1], cpu.attention(qkv, 2, kernels)]
    only = cpu.weight_only(weights_alone(layer), kernels)
    expected.append(only(x))
    torch.set_default_dtype(default)
    try:
        results = [packed(x), packed.quantize(x)[1], cpu.attention(qkv, 2, kernels), only(x)]
    finally:
        torch.set_default_dtype(torch.float32)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == torch.float32 and torch.equal(result, wanted)


def test_no_images_are_no_error() -> None:
    packed = cpu.IntegerLinear(random_layer(O, I, R, Format(8), 1, 64), choice.kernels())
    assert packed(torch.ones(0, 5, I)).numel() == packed(torch.ones(2, 0, I)).numel() == 0


def test_no_assertion_guards_a_kernel() -> None:
    """`python -O` removes assertions."""
    for folder in ("kernels", "runtime"):
        for path in (PACKAGE / folder).rglob("*.py"):
            lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
            assert lines == [], path


OUT_OF_MEMORY = """
import resource, sys
import torch
from layers import random_layer, with_spec
from svdit.kernels.cpu import ffi, linear as cpu
from svdit.kernels.formats import WEIGHT_FORMATS, Format

K = cpu.LONGEST = 2**21
kernels = ffi.kernels(sys.argv[1])
layer = random_layer(1, K, 0, Format(8), 0)
packed = cpu.IntegerLinear(random_layer(1, K, 0, WEIGHT_FORMATS["int4-channel"], 0), kernels)
only = cpu.weight_only(with_spec(layer, act=None), kernels)
x, qkv = torch.ones(1, 1, K), torch.zeros(1, K, 3).to(kernels.low_dtype)
quantized, many = packed.quantize(x), torch.ones(1, 8, K)
packed.multiply(quantized, 1)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 2**23, resource.RLIM_INFINITY))
def attend_later():
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 2**25, resource.RLIM_INFINITY))  # the output fits
    with ffi.together():
        cpu.attention(qkv, 1, kernels)
for call in (lambda: packed.quantize(x), lambda: packed.multiply(quantized, 1), lambda: only(many), attend_later):
    try:
        call()
    except MemoryError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is that of Linux")
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[pytest.mark.slow] * (isa != ffi.isas()[0])) for isa in ffi.isas()]
)
def test_a_failed_allocation_is_a_memory_error(isa: str) -> None:
    """With two threads, either of which may fail: the process may grow by 8 MB, or 32, and every buffer needs more.

    Buffers of 64 KB and more come from the system and return to it, so that none is left from an
    earlier call. Only one arena, because others reserve 64 MB beforehand.
    """
    output = run("-c", OUT_OF_MEMORY, isa, OMP_NUM_THREADS="2", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    kernels = ("quantize_rows", "multiply", "weigh", "attend")
    assert output.splitlines() == [f"the CPU kernel {kernel} cannot allocate its buffers" for kernel in kernels]


def test_every_allocation_in_c_is_checked() -> None:
    """Of each file as many checks `!buffer` or `start ?` follow as there are allocations, `zeros` among them."""
    counts = {}
    for path in (Path(cpu.__file__).parent / "csrc").glob("*.[ch]"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        if made := re.findall(r"\b(?:malloc|calloc|aligned_alloc|realloc|zeros)\((?!int64_t)", text):
            counts[path.name] = len(made)
            names = "hat|half|buffer|x|keys|values|row|queries|scores|out"
            checked = re.findall(rf"!(?:own\.)?(?:{names})\b|\bstart \?", text)
            assert len(checked) == len(made), path.name
    assert counts == {"rows.h": 2, "panels.h": 1, "attention.h": 7, "weights.h": 2, "pixels.h": 1}


if __name__ == "__main__":
    number, left = accepted(choice.kernels())
    print(f"{number} calls, accepted: {left}")
