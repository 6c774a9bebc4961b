"""Which formats exist, their rounding, and that every backend computes layers of any of them as the definition does."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import U, layer_of

from svdit.errors import UserError
from svdit.kernels import generic, ops
from svdit.kernels import reference as ref
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.formats import ELEMENT_MAX, Format

FIELDS: dict[str, tuple[Any, ...]] = {
    "bits": tuple(range(2, 9)),
    "group": (0, 16, 32, 64, 128),
    "scale": ("fp32", "bf16", "int8", "e4m3", "e8m0"),
    "span": ("symmetric", "full", "unsigned", "affine"),
    "element": ("int", "e2m1", "e4m3"),
}
COMBINATIONS = [dict(zip(FIELDS, values, strict=True)) for values in product(*FIELDS.values())]
ACTS = (None, Format(8), Format(4, 64, "bf16", "full"), Format(4, 32, "bf16"), Format(8, 64))


def representable(bits: int, group: int, scale: str, span: str, element: str) -> bool:
    """Stated anew: float elements have one width and no spans; int8 multiples up to 15 times a code fit 8 bits."""
    if scale in ("int8", "e4m3") and group == 0:
        return False
    if element != "int":
        return span == "symmetric" and bits == (4 if element == "e2m1" else 8)
    largest = {"symmetric": 2 ** (bits - 1) - 1, "unsigned": 2**bits - 1}.get(span, 2 ** (bits - 1))
    return not (scale == "e8m0" or (scale == "e4m3" and span == "full") or (scale == "int8" and 15 * largest > 127))


FORMATS = [Format(**fields) for fields in COMBINATIONS if representable(**fields)]
forms, seeds = st.sampled_from(FORMATS), st.integers(0, 2**31)


def test_exactly_the_representable_formats_exist() -> None:
    for fields in COMBINATIONS:
        if not representable(**fields):
            with pytest.raises(UserError, match=r"; (choose|pass|use) .*[^.]$"):
                Format(**fields)
    assert 200 < len(FORMATS) < len(COMBINATIONS) / 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 6, "group": 64, "scale": "int8", "span": "full"}, "overflow eight bits; use scale bf16"),
        ({"scale": "fp16"}, "scale is 'fp16'; choose one of fp32, bf16"),
        ({"span": "ful"}, "span is 'ful'; choose one of symmetric, full"),
        ({"element": "e5m2"}, "element is 'e5m2'; choose one of int, e2m1"),
        ({"scale": ["fp32"]}, r"scale is \['fp32'\]; choose"),
        ({"scale": "e8m0"}, "e8m0 scales are for e2m1 and e4m3 elements"),
        ({"bits": 4, "scale": "int8"}, "scale int8 has two levels.*pass a group size"),
        ({"bits": 8, "element": "e2m1"}, "e2m1 elements have 4 bits, not 8"),
        ({"bits": 4, "element": "e4m3"}, "e4m3 elements have 8 bits, not 4"),
        ({"element": "e4m3", "span": "full"}, "span full is for integers"),
        ({"bits": 1}, "1 bits cannot be stored"),
        ({"bits": 9}, "9 bits cannot be stored"),
        ({"group": -64}, "groups of -64 are impossible"),
        ({"bits": 4.5}, "bits is 4.5, a float; pass a value of type int"),
        ({"bits": "4"}, "bits is .4., a str; pass"),
        ({"group": 64.0}, "group is 64.0, a float; pass"),
        ({"bits": True}, "bits is True, a bool; pass"),
    ],
)
def test_what_cannot_be_represented_is_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Format(**fields)


def numbers(form: Format, rows: int, seed: int) -> torch.Tensor:
    """(rows, 128), of any size; not negative where the format is unsigned."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 128, generator=g) * 10.0 ** (seed % 5 - 2)
    return x.abs() if form.span == "unsigned" else x


@given(form=forms, seed=seeds)
@settings(max_examples=200)
def test_round_trip(form: Format, seed: int) -> None:
    """Codes survive packing; a number is off by half a step, and by what its group's range loses at the ends.

    The range: the largest code (or element) times the rounding of the scale. Full spans end one code earlier above;
    zero points are rounded, which moves the range by half a step.
    """
    x = numbers(form, 3, seed)
    codes, scales = ref.quantize(x, form)
    packed = ref.pack(codes, form)
    assert packed.shape == (3, 16 * form.bits)
    unpacked = ref.unpack(packed.contiguous(), form, 128)
    assert unpacked.dtype == codes.dtype and torch.equal(unpacked.float(), codes.float())
    ideal, values = ref.ideal_scales(x, form), scales.values()
    step, lost = values.abs(), (ideal - values).abs()
    extent = ELEMENT_MAX.get(form.element) or form.hi - min(form.lo, 0)
    half = {"e2m1": 1.0, "e4m3": 16.0, "int": 0.5}[form.element]  # half the largest gap between elements
    half += {"full": 0.5, "affine": 0.5}.get(form.span, 0.0)
    bound = (half * step + extent * lost).repeat_interleave(128 // step.shape[1], 1)
    error = (ref.dequantize(unpacked, scales, form) - x).abs()
    assert (error <= bound * (1 + 1e-5) + 2 * extent * U * step.max()).all()
    assert error.max() > 0


def weight_layer(form: Format, act: Format | None, seed: int) -> Any:
    codes, scales = ref.quantize(numbers(form, 40, seed) / 8, form)
    return layer_of(codes, scales, form, act)


@pytest.mark.parametrize("name", ["torch-int8", "dequant", *(f"cpu {isa}" for isa in ffi.isas())])
@given(form=forms, act=st.sampled_from(ACTS), seed=seeds)
@settings(max_examples=60)
def test_every_backend_computes_the_definition(name: str, form: Format, act: Format | None, seed: int) -> None:
    """Within the bound of two sums of K = 128 products in any order: 2 (K + 8) U times the sum of magnitudes.

    A weight with zero points is two terms, each of which counts. `unsupported` has a reason exactly where `pack`
    refuses.
    """
    backend, _, isa = name.partition(" ")
    if ops.reasons()[backend]:
        pytest.skip(ops.reasons()[backend])
    layer, x = weight_layer(form, act, seed), numbers(Format(), 6, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "kernels", lambda: ffi.kernels(isa))
        reason = ops.unsupported(layer.spec, layer.shape, backend)
        packed = ops.BACKENDS[backend].pack(generic.with_whole_codes(layer), False)
        y = ops.pack(layer, backend)(x[None])[0]
    assert (packed is None) == bool(reason), reason
    rounded = ref.fake_quantize(x, act) if act else x
    scales = ref.layer_scales(layer)
    magnitudes = ref.decode(ref.layer_codes(layer), scales.values(), form).abs()
    if (offsets := scales.offsets()) is not None:
        magnitudes = magnitudes + offsets.abs().repeat_interleave(128 // offsets.shape[1], 1)
    expected = ref.linear(layer, x).double()
    bound = 2 * (128 + 8) * U * (rounded.abs().double() @ magnitudes.double().T)
    assert ((y.double() - expected).abs() <= bound).all()
    assert expected.abs().max() > 100 * bound.max()  # a wrong product would not pass
