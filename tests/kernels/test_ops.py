"""The choice of a backend, and that every backend computes the same."""

from dataclasses import replace

import pytest
import torch
from conftest import relative

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels import reference as ref
from svdit.kernels.cpu import ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.cpu.build import MissingKernelsError
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.kernels.layer import Dequantized, Layer, Modulation, Residual, TorchInt8
from svdit.quant.budget import WEIGHTS

USABLE = [name for name in ops.BACKENDS if name != "reference" and not ops.reasons()[name]]


def layer(weight: str, act: str | None, rank: int = 4) -> Layer:
    g = torch.Generator().manual_seed(0)
    codes, scales = ref.quantize(torch.randn(48, 128, generator=g) / 11, WEIGHT_FORMATS[weight])
    low = [torch.randn(shape, generator=g).bfloat16() / 11 for shape in ((48, rank), (rank, 128))]
    rest = (torch.randn(48, generator=g), torch.randn(128, generator=g), torch.rand(128, generator=g) + 0.5)
    form, acts = WEIGHT_FORMATS[weight], None if act is None else ACT_FORMATS[act]
    return Layer(ref.pack(codes, form), 128, scales, form, acts, *rest, 64, *(low if rank else (None, None)))


@pytest.mark.parametrize("act", [None, *ACT_FORMATS])
@pytest.mark.parametrize("weight", WEIGHT_FORMATS)
@pytest.mark.parametrize("backend", USABLE)
def test_every_format_on_every_backend(backend: str, weight: str, act: str | None) -> None:
    g = torch.Generator().manual_seed(1)
    x, stream = torch.randn(2, 5, 128, generator=g), torch.randn(2, 5, 48, generator=g)
    stored = layer(weight, act)
    packed, hat = ops.pack(stored, backend), stored.transform(x).double()
    rounded = ref.fake_quantize(hat.float(), stored.act).double() if stored.act else hat
    weights = ref.dequantize(stored.codes(), stored.scales, stored.weight).double()
    assert stored.l1 is not None and stored.l2 is not None and stored.bias is not None
    expected = rounded @ weights.T + hat @ stored.l2.double().T @ stored.l1.double().T + stored.bias
    assert 0 < relative(packed(x).double(), expected) < 1e-3
    with_residual = packed(x, residual=Residual(stream.clone(), torch.full((2, 48), 2.0)))
    assert relative(with_residual.double(), stream + 2 * expected) < 1e-3
    modulation = Modulation(torch.ones(2, 128), torch.ones(2, 128))
    assert relative(packed(x, modulation=modulation, gelu=True).double(), expected) > 0.01


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("form", WEIGHTS, ids=str)
@pytest.mark.parametrize("backend", USABLE)
def test_every_width_of_planned_codes(backend: str, form: Format, act: str | None) -> None:
    stored, x = layer("int8", act), torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    codes, scales = ref.quantize(ref.dequantize(stored.codes(), stored.scales, stored.weight), form)
    stored = replace(stored, stored=ref.pack(codes, form), scales=scales, weight=form)
    packed = ops.pack(stored, backend)
    assert relative(packed(x), Dequantized(stored)(x)) < 1e-3
    assert backend != "cpu" or not isinstance(packed, Dequantized)


def test_the_integer_product_of_torch() -> None:
    """With codes so small that nothing saturates, on any processor."""
    stored = layer("int4-channel", "int8")
    small = ref.pack(stored.codes().clamp(-1, 1), stored.weight)
    stored = replace(stored, stored=small, in_shift=None, in_scale=None, hadamard=0)
    assert TorchInt8.takes(stored)
    assert not TorchInt8.takes(layer("int8", None)) and not TorchInt8.takes(layer("fp8", "int8"))
    x = torch.zeros(2, 5, 128)
    x[:, torch.arange(5), torch.arange(5)] = torch.randn(2, 5)
    x[..., 100] = 0.3
    assert relative(TorchInt8(stored)(x), Dequantized(stored)(x)) < 1e-6


def test_attention_is_the_same_on_every_backend() -> None:
    qkv = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(0))
    expected = ops.attention(qkv, 4, "reference")
    for backend in USABLE:
        assert relative(ops.attention(qkv, 4, backend), expected) < 1e-6


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDIT_BACKEND", raising=False)
    assert ops.choose() == ops.choose("cpu", "auto") == USABLE[0]
    assert ops.choose("meta") == "dequant"
    assert ops.choose("cpu", "reference") == "reference"
    monkeypatch.setenv("SVDIT_BACKEND", "dequant")
    assert ops.choose() == "dequant"
    assert ops.choose("cpu", "reference") == "reference"
    monkeypatch.setenv("SVDIT_BACKEND", "abacus")
    with pytest.raises(UserError, match="no backend 'abacus'; choose auto, cpu"):
        ops.choose()


def test_what_cannot_be_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(UserError, match="torch-int8 cannot be used here: without VNNI"):
        ops.choose("cpu", "torch-int8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert ops.choose("cpu", "torch-int8") == "torch-int8"
    with pytest.raises(UserError, match="on the CPU, not on meta"):
        ops.choose("meta", "cpu")

    def missing() -> None:
        raise MissingKernelsError("no compiler")

    monkeypatch.setattr(ffi, "kernels", missing)
    assert ops.choose() == "torch-int8"
    with pytest.raises(UserError, match="cpu cannot be used here: no compiler"):
        ops.choose("cpu", "cpu")


def test_description_names_the_instruction_set() -> None:
    assert ops.describe("dequant") == "dequant"
    if "cpu" in USABLE:
        assert ops.describe("cpu") == f"cpu ({ffi.kernels().isa})"


def test_layers_without_integers_are_not_taken() -> None:
    assert not layer("fp8", "int8").has_integers
    assert not layer("int4-bf16", "int8").has_integers
    assert not cpu.IntegerLinear.takes(layer("fp8", "int8"))
    assert not cpu.IntegerLinear.takes(layer("int8", "fp8"))
    assert cpu.IntegerLinear.takes(layer("int4", "int4")) and cpu.IntegerLinear.takes(layer("int4-bf16", "int4"))
    assert not cpu.WeightOnlyLinear.takes(layer("fp8", None))
    assert cpu.IntegerLinear.takes(layer("int4", "int8", rank=0))
    assert not cpu.IntegerLinear.takes(replace(layer("int8", "int8"), act=Format(8, span="unsigned")))
