"""The Triton backend without a GPU: the interpreter, kernels compiled for sm_90, the choice; and what needs one."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from layers import random_layer, with_spec

from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels import reference as ref
from svdit.kernels.cuda import backend, fp8
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.kernels.layer import HeadNorms, Layer, Modulation, Residual, Rotation
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.runtime.dit import FastDiT

INT8 = Format(8)
needs_triton = pytest.mark.skipif(backend.triton_version() < backend.MINIMUM, reason="needs Triton 3.6")


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("test_cuda_kernels.py"))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


class FakeDriver:
    """An H200 that compiles and does not run."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiled:
    """In place of a kernel: compiles a launch, for some tiles of a tuned kernel, instead of running it."""

    def __init__(self, kernel: Any, some: slice = slice(None)) -> None:
        self.kernel, self.some, self.made = kernel, some, list[Any]()

    def __getitem__(self, grid: object) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **how: Any) -> None:
        tiles: list[dict[str, Any]] = [{}]
        if hasattr(self.kernel, "configs"):
            prune = self.kernel.early_config_prune or (lambda configs, *_, **__: configs)
            tiles = [tile.all_kwargs() for tile in prune(self.kernel.configs, {}, **how)]
        kernel = getattr(self.kernel, "fn", self.kernel) if len(tiles) > 1 else self.kernel
        for tile in tiles[self.some]:
            self.made.append(kernel.run(*arguments, grid=(1,), warmup=True, **how, **tile))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Launches compile for Hopper, nothing is cached."""
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", FakeDriver())  # since Triton 3.5


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch, hopper: None) -> Any:
    """(layer, tiles of rows, tiles of the product, …) to what its launches compile to on Hopper."""
    from svdit.kernels.cuda import linear as tri

    def compile_for(layer: Layer, row_tiles: slice, tiles: slice, inner: bool = False, **around: Any) -> list[Any]:
        kernels = [Compiled(tri.ROWS, row_tiles), Compiled(tri.PRODUCT, tiles), Compiled(tri.weigh)]
        with monkeypatch.context() as patch:
            for name, kernel in zip(("ROWS", "PRODUCT", "weigh"), kernels, strict=True):
                patch.setattr(tri, name, kernel)
            packed = backend.pack(layer, inner)
            x = torch.zeros(1, 16, layer.shape[1] * (2 if around.get("glu") else 1))
            packed(x.bfloat16() if around.get("glu") else x, **around)
        return [made for kernel in kernels for made in kernel.made]

    return compile_for


def resources(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack, where spilled registers go."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", told)[-1]
    return int(registers), int(stack)


def hopper_layer(weight: str, act: str | None = "int8") -> Layer:
    layer = random_layer(256, 256, 64, WEIGHT_FORMATS[weight], 1, 64)
    return with_spec(layer, act=None if act is None else ACT_FORMATS[act])


AROUND: dict[str, dict[str, Any]] = {
    "residual": {"residual": Residual(torch.zeros(1, 16, 256), torch.zeros(1, 256))},
    "gelu": {"gelu": True, "inner": True, "modulation": Modulation(torch.zeros(1, 256), torch.zeros(1, 256))},
    "rms": {"inner": True, "modulation": Modulation(torch.zeros(1, 256), torch.zeros(1, 256), True)},
    "glu": {"glu": True, "residual": Residual(torch.zeros(1, 16, 256), torch.zeros(1, 256))},
}
ALL, NONE, FIRST, LAST = slice(None), slice(0, 0), slice(0, 1), slice(-1, None)


@needs_triton
@pytest.mark.parametrize(("weight", "act", "around", "row_tiles", "tiles"), [
    ("int8", "int8", "gelu", LAST, FIRST), ("int4", "int4", "residual", LAST, FIRST),  # the largest tiles
    ("int8", "int8", "rms", LAST, NONE), ("int8", "int8", "glu", LAST, NONE),
    pytest.param("int8", "int8", "residual", NONE, ALL, marks=pytest.mark.slow),
    pytest.param("int8", "int8", "gelu", ALL, ALL, marks=pytest.mark.slow),
    pytest.param("int4", "int8", "residual", NONE, ALL, marks=pytest.mark.slow),
    pytest.param("int4", "int8", "gelu", NONE, ALL, marks=pytest.mark.slow),
    pytest.param("int4", "int4", "residual", ALL, ALL, marks=pytest.mark.slow),
    pytest.param("int8", "int8", "rms", ALL, NONE, marks=pytest.mark.slow),
    pytest.param("int8", "int8", "glu", ALL, NONE, marks=pytest.mark.slow),
    pytest.param("int4", "int4", "glu", ALL, NONE, marks=pytest.mark.slow),
])  # fmt: skip
def test_nothing_is_spilled_on_hopper(
    sm_90: Any, tmp_path: Path, weight: str, act: str, around: str, row_tiles: slice, tiles: slice
) -> None:
    for kernel in sm_90(hopper_layer(weight, act), row_tiles, tiles, **AROUND[around]):
        registers, stack = resources(kernel, tmp_path)
        assert 32 < registers <= 255 and stack == 0, f"{kernel.name}: {registers} registers, {stack} bytes of stack"
        assert kernel.metadata.shared <= 227 * 1024
        ptx = kernel.asm["ptx"]
        if "multiply" in kernel.name:
            assert re.search(r"wgmma.*s32\.s8\.s8", ptx), "the integer product is not on the tensor cores"
        else:  # or codes would not be the definition's: fused products, approximate quotients, subnormals lost
            assert "fma.rn" not in ptx and "div.rn.f32" in ptx and ".ftz" not in ptx


@needs_triton
@pytest.mark.parametrize(("weight", "act", "kernels"), [
    ("int4-channel", "int8", 2), ("int8", "int4", 2), ("int8", None, 1), ("int4", None, 1), ("int4-bf16", None, 1),
])  # fmt: skip
def test_every_scheme_compiles(sm_90: Any, tmp_path: Path, weight: str, act: str | None, kernels: int) -> None:
    made = sm_90(hopper_layer(weight, act), FIRST, LAST)
    assert len(made) == kernels
    assert all(resources(kernel, tmp_path)[1] == 0 for kernel in made)


@needs_triton
@pytest.mark.parametrize(("head", "tables"), [(72, 2), (80, 1), pytest.param(64, 0, marks=pytest.mark.slow)])
def test_queries_and_keys_are_prepared_without_spills(
    hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: int, tables: int
) -> None:
    """LightningDiT-XL's heads with REPA's norms, JiT-H's, and a rotation alone."""
    from svdit.kernels.cuda import attention

    compiled = Compiled(attention.prepare)
    monkeypatch.setattr(attention, "prepare", compiled)
    norms = HeadNorms(*torch.ones(tables, 2, head)) if tables else None
    rotation = Rotation(*torch.ones(2, 16, head))
    attention.prepared(torch.ones(2, 16, 3, 2, head, dtype=torch.bfloat16), norms, rotation)
    (kernel,) = compiled.made
    registers, stack = resources(kernel, tmp_path)
    assert 16 < registers <= 128 and stack == 0, f"{registers} registers, {stack} bytes of stack"
    ptx = kernel.asm["ptx"]
    assert "fma.rn" not in ptx and ".ftz" not in ptx and "rsqrt.approx" not in ptx
    assert re.search(r"ld.global.*v[24]", ptx) and re.search(r"st.global.*v[24]", ptx), "loads and stores are scalar"


@needs_triton
def test_the_smallest_sides_compile(sm_90: Any) -> None:
    """One is a constant to Triton."""
    around = Residual(torch.zeros(1, 16, 1), torch.zeros(1, 1))
    assert len(sm_90(random_layer(1, 1, 1, INT8, 1), FIRST, LAST, residual=around)) == 2
    weight_only = with_spec(random_layer(1, 1, 0, INT8, 1), act=None)
    assert len(sm_90(weight_only, FIRST, LAST)) == 1


@needs_triton
def test_tiles_that_cannot_hold_both_sums_are_left_out() -> None:
    from svdit.kernels.cuda.linear import PRODUCT

    whole, grouped = (PRODUCT.early_config_prune(PRODUCT.configs, {}, GROUPED=grouped) for grouped in (False, True))
    assert grouped == whole[1:] and len(whole) == 5


def test_nibbles_and_scales_as_the_kernels_read_them() -> None:
    tri = pytest.importorskip("svdit.kernels.cuda.linear")
    codes = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    folded = tri.folded(codes)
    assert folded.shape == (3, 128) and folded.dtype == torch.uint8
    assert torch.equal((folded[:, 64:] & 15).to(torch.int8) - 8, codes[:, 128:192])
    assert torch.equal((folded[:, :64] >> 4).to(torch.int8) - 8, codes[:, 64:128])
    scales = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    assert tri.spread(scales, 192, 256).tolist() == [[1, 4], [2, 5], [3, 6], [1, 1]]
    assert tri.spread(scales[:, :1], 100, 128).tolist() == [[1, 4], [1, 4]]


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@needs_triton
def test_it_is_chosen_on_ampere_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDIT_BACKEND", raising=False)
    for capability, chosen in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "dequant")):
        fake_gpu(monkeypatch, capability)
        assert ops.choose("cuda") == chosen
    with pytest.raises(UserError, match=r"it needs compute capability 8\.0, and cuda has 7\.5"):
        ops.choose("cuda", "triton")
    assert ops.choose("cuda:1", "reference") == "reference"


def test_where_it_cannot_be_had_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "triton_version", lambda: (3, 6))
    with pytest.raises(UserError, match="triton cannot be used here: it runs on CUDA devices, not on cpu; choose"):
        ops.choose("cpu", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.missing(torch.device("cuda")) == "there is no CUDA device that torch can use"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.missing(torch.device("cpu")) == ""
    monkeypatch.setattr(backend, "triton_version", lambda: ())
    with pytest.raises(UserError, match="triton cannot be used here: triton is not installed"):
        ops.choose("cpu", "triton")
    monkeypatch.setattr(backend, "triton_version", lambda: (3, 4))
    with pytest.raises(UserError, match=r"triton cannot be used here: it needs Triton 3\.6 or later"):
        ops.choose("cpu", "triton")


SUPPORTED = [
    *((weight, act) for weight in ("int8", "int4", "int4-channel") for act in ("int8", "int4")),
    *((weight, None) for weight in ("int8", "int4", "int4-channel", "int4-bf16")),
    ("fp8", "fp8"),
]
UNSUPPORTED = [
    ("nvfp4", "nvfp4", "not FP4 E2M1 g16"),
    ("fp8", "int8", "not FP8 E4M3 weights with INT8 activations"),
    ("int8", "fp8", "not INT8 weights with FP8 E4M3 activations"),
    ("fp8", None, "with float activations"),
    ("int4-bf16", "int8", "INT4 g64 weights with bf16 scales are not integers with one scale per row"),
]


@needs_triton
@pytest.mark.parametrize(("weight", "act"), SUPPORTED)
def test_supported_formats_are_packed(weight: str, act: str | None) -> None:
    layer = hopper_layer(weight, act)
    assert backend.unsupported(layer.spec, layer.shape, layer.device) == ""
    assert backend.pack(layer) is not None


@pytest.mark.parametrize(("weight", "act", "reason"), UNSUPPORTED)
def test_other_formats_have_a_reason(weight: str, act: str | None, reason: str) -> None:
    layer = hopper_layer(weight, act)
    assert reason in backend.unsupported(layer.spec, layer.shape, layer.device)
    assert backend.pack(layer) is None


def test_blocks_that_would_spill_and_odd_sides_have_a_reason() -> None:
    spec, cuda = hopper_layer("int8").spec, torch.device("cpu")
    assert "blocks of 512 are larger than 256" in backend.unsupported(replace(spec, hadamard=512), (256, 512), cuda)
    fp8_spec = hopper_layer("fp8", "fp8").spec
    assert backend.unsupported(fp8_spec, (256, 256), cuda) == ""
    for shape in ((256, 250), (250, 256)):
        assert "sides divisible by 16" in backend.unsupported(fp8_spec, shape, cuda)


def test_fp8_by_torch() -> None:
    """torch has the product on the CPU too."""
    layer = hopper_layer("fp8", "fp8")
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    packed = fp8.float8(layer)
    try:
        y = packed(x)
    except RuntimeError as error:
        if "_scaled_mm only support" not in str(error):
            raise
        pytest.skip("this torch multiplies FP8 on the CPU with one scale per tensor only")
    assert y.shape == (2, 5, 256) and y.dtype == torch.float32
    hat = ref.transform(layer, x)
    rounded = ref.fake_quantize(hat, fp8.FP8).double()
    weight, l1, l2 = (ref.matrix(layer, name).double() for name in ("residual", "l1", "l2"))
    main, branch = rounded @ weight.T, hat.double() @ l2.T @ l1.T
    assert layer.bias is not None
    error = (y - (main + branch + layer.bias)).abs()
    size = rounded.abs() @ weight.abs().T  # fp32 sums of 256 products; then bfloat16; then a branch in fp32
    assert (error <= 2.0**-8 * main.abs() + 2.0**-15 * size + 1e-4).all() and error.max() > 1e-4


def digits(preset: str) -> tuple[DiT, list[torch.Tensor]]:
    """The embedded model, quantized, and inputs of it."""
    model, g = load_model("digits"), torch.Generator().manual_seed(0)
    size, channels = model.config.input_size, model.config.in_channels
    x = torch.randn(6, channels, size, size, generator=g)
    t, y = torch.tensor([3, 500, 999, 3, 20, 700]), torch.tensor([0, 1, 2, 3, 10, 9])
    quantize_(model, dit_config(recipe_for(preset, smoothing=0, iterations=1)), lambda model: model(x, t, y))
    return model.cuda(), [x.cuda(), t.cuda(), y.cuda()]


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a8-channel", "w4a4", "w8a16", "w4a16", "fp8"])
def test_digits_on_a_gpu(preset: str) -> None:
    """bfloat16 between layers moves codes: the bound is the noise of that, see test_cuda_kernels.py for exactness."""
    model, inputs = digits(preset)
    with torch.no_grad():
        expected = model(*inputs)
    fast = accelerate(deepcopy(model), "triton")
    assert isinstance(fast, FastDiT)
    eager = fast(*inputs)
    assert 0 < relative(eager, expected) < 0.05
    recorded = fast(*inputs)
    assert isinstance(fast, FastDiT) and len(fast.step.graphs) == 1 and fast.step.possible
    assert torch.equal(recorded, eager)
    other = [inputs[0] + 1, *inputs[1:]]
    assert torch.equal(fast(*other), fast.compute(*other)) and torch.equal(recorded, eager)
