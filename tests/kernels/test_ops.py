"""The choice of a backend, and that every backend computes the same."""

from dataclasses import replace

import pytest
import torch
from conftest import relative
from layers import layer_of, with_spec

from svdit.errors import UserError
from svdit.kernels import generic, ops
from svdit.kernels import reference as ref
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.cpu.build import MissingKernelsError
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.kernels.layer import Layer, Modulation, Residual
from svdit.quant.budget import WEIGHTS

USABLE = [name for name in ops.BACKENDS if name != "reference" and not ops.reasons()[name]]


def layer(weight: str, act: str | None, rank: int = 4) -> Layer:
    g = torch.Generator().manual_seed(0)
    codes, scales = ref.quantize(torch.randn(48, 128, generator=g) / 11, WEIGHT_FORMATS[weight])
    l1, l2 = (torch.randn(shape, generator=g).bfloat16() / 11 for shape in ((48, rank), (rank, 128)))
    names = ("bias", "in_shift", "in_scale")
    rest = (torch.randn(48, generator=g), torch.randn(128, generator=g), torch.rand(128, generator=g) + 0.5)
    factors = {"l1": l1, "l2": l2} if rank else {}
    form, acts = WEIGHT_FORMATS[weight], None if act is None else ACT_FORMATS[act]
    return layer_of(codes, scales, form, acts, 64, **dict(zip(names, rest, strict=True)), **factors)


@pytest.mark.parametrize("act", [None, *ACT_FORMATS])
@pytest.mark.parametrize("weight", WEIGHT_FORMATS)
@pytest.mark.parametrize("backend", USABLE)
def test_every_format_on_every_backend(backend: str, weight: str, act: str | None) -> None:
    g = torch.Generator().manual_seed(1)
    x, stream = torch.randn(2, 5, 128, generator=g), torch.randn(2, 5, 48, generator=g)
    stored = layer(weight, act)
    packed, hat = ops.pack(stored, backend), ref.transform(stored, x).double()
    rounded = ref.fake_quantize(hat.float(), stored.spec.act).double() if stored.spec.act else hat
    weights, l1, l2 = (ref.matrix(stored, name).double() for name in ("residual", "l1", "l2"))
    assert stored.bias is not None
    expected = rounded @ weights.T + hat @ l2.T @ l1.T + stored.bias
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
    tensors = ref.encoded("residual", *ref.quantize(ref.matrix(stored), form), form)
    rest = with_spec(stored.without("residual"), weight=form)
    stored = replace(rest, tensors={**rest.tensors, **tensors})
    packed = ops.pack(stored, backend)
    assert relative(packed(x), generic.dequantized(stored)(x)) < 1e-3
    assert backend != "cpu" or ops.unsupported(stored.spec, stored.shape, backend) == ""


def test_the_integer_product_of_torch() -> None:
    """With codes so small that nothing saturates, on any processor."""
    stored = layer("int4-channel", "int8")
    small = ref.pack(ref.layer_codes(stored).clamp(-1, 1), stored.form("residual"))
    rest = with_spec(stored, hadamard=0).without("in_")
    stored = replace(rest, tensors={**rest.tensors, "residual_codes": small})
    packed = generic.torch_int8(stored)
    assert packed is not None
    assert generic.torch_int8(layer("int8", None)) is None and generic.torch_int8(layer("fp8", "int8")) is None
    x = torch.zeros(2, 5, 128)
    x[:, torch.arange(5), torch.arange(5)] = torch.randn(2, 5)
    x[..., 100] = 0.3
    assert relative(packed(x), generic.dequantized(stored)(x)) < 1e-6


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
    with pytest.raises(UserError, match="no backend 'abacus'; choose one of auto, cpu"):
        ops.choose()


def test_what_cannot_be_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generic, "capabilities", lambda: {"avx2": True})
    with pytest.raises(
        UserError, match="torch-int8 cannot be used here: torch's integer product is known to be exact with VNNI only"
    ):
        ops.choose("cpu", "torch-int8")
    monkeypatch.setattr(generic, "capabilities", lambda: {"avx512_vnni": True})
    assert ops.choose("cpu", "torch-int8") == "torch-int8"
    with pytest.raises(UserError, match="on the CPU, not on meta"):
        ops.choose("meta", "cpu")

    def missing() -> None:
        raise MissingKernelsError("no compiler")

    monkeypatch.setattr(ffi, "library", missing)
    assert ops.choose() == "torch-int8"
    with pytest.raises(UserError, match="cpu cannot be used here: no compiler"):
        ops.choose("cpu", "cpu")


def test_description_names_the_instruction_set() -> None:
    assert ops.describe("dequant") == "dequant"
    if "cpu" in USABLE:
        assert ops.describe("cpu") == f"cpu ({choice.kernels().isa})"


@pytest.mark.parametrize(
    ("weight", "act", "reason"),
    [
        ("fp8", "int8", "read signed integer weights, not FP8"),
        ("int8", "fp8", "not FP8 E4M3"),
        ("fp8", None, "read signed integer weights, not FP8"),
        ("int4-zero", "int8", "no zero points"),
        *((weight, act, "") for weight in ("int4", "int4-bf16", "int8") for act in ("int8", "int4", None)),
    ],
)
def test_reasons_of_the_cpu_backend(weight: str, act: str | None, reason: str) -> None:
    stored = layer(weight, act)
    found = ops.unsupported(stored.spec, stored.shape, "cpu")
    assert (reason in found) if reason else found == ""


def test_unsigned_activations_of_eight_bits_are_not_supported() -> None:
    spec = with_spec(layer("int8", "int8"), act=Format(8, span="unsigned")).spec
    assert "not INT8" in ops.unsupported(spec, (48, 128), "cpu")


def test_only_integers_with_one_scale_per_row_are_integers() -> None:
    assert generic.has_integers(layer("int4", "int8").spec) and generic.has_integers(layer("int8", "int8").spec)
    assert not generic.has_integers(layer("fp8", "int8").spec)
    assert not generic.has_integers(layer("int4-bf16", "int8").spec)
