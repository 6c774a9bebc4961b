"""The definition of the quantized operations: codes, scales, packing, rotation."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format

FORMATS = {**{f"weight {k}": v for k, v in WEIGHT_FORMATS.items()}, **{f"act {k}": v for k, v in ACT_FORMATS.items()}}
matrices = st.integers(0, 2**31).map(
    lambda seed: torch.randn(5, 128, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
)


@pytest.mark.parametrize("name", FORMATS)
@given(x=matrices)
@settings(max_examples=20)
def test_error_is_at_most_half_a_step_inside_the_range(name: str, x: torch.Tensor) -> None:
    form = FORMATS[name]
    codes, scales = ref.quantize(x, form)
    values = scales.values()
    y = ref.dequantize(codes, scales, form)
    step = values.abs().repeat_interleave(x.shape[1] // values.shape[1], dim=1)
    if form.element == "int":
        inside = (scales.shifted(x) / (values.sign().repeat_interleave(128 // values.shape[1], 1) * step)).round()
        inside = (inside >= form.lo) & (inside <= form.hi)
        assert ((x - y).abs() <= step * 0.5 * (1 + 1e-5))[inside].all()
    relative = (x - y).norm() / x.norm()
    assert 0 < relative < {8: 0.04, 4: 0.25}[form.bits]


@pytest.mark.parametrize("name", FORMATS)
@given(x=matrices)
@settings(max_examples=10)
def test_quantized_numbers_stay_what_they_are(name: str, x: torch.Tensor) -> None:
    form = FORMATS[name]
    codes, scales = ref.quantize(x, form)
    again = ref.encode(scales.shifted(ref.dequantize(codes, scales, form)), scales.values(), form)
    assert torch.equal(codes.float(), again.float())


@pytest.mark.parametrize("bits", range(2, 9))
@given(columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_packing_is_exact_and_tight(bits: int, columns: int, seed: int) -> None:
    form = Format(bits, span="full")
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(form.lo, form.hi + 1, (3, columns), generator=generator, dtype=torch.int8)
    packed = ref.pack(codes, form)
    assert packed.shape == (3, -(-columns * bits // 8))
    assert torch.equal(ref.unpack(packed, form, columns), codes)


def test_every_byte_unpacks_and_low_nibble_comes_first() -> None:
    form, every = Format(4, span="full"), torch.arange(256, dtype=torch.uint8)[None]
    codes = ref.unpack(every, form, 512)
    assert torch.equal(ref.pack(codes, form), every)
    assert codes[0, 2 * 0x3A : 2 * 0x3A + 2].tolist() == [0xA - 8, 0x3 - 8]


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zero(name: str) -> None:
    x = torch.zeros(2, 128)
    x[1, :64] = 1.0
    y = ref.fake_quantize(x, FORMATS[name])
    assert torch.equal(y == 0, x == 0)
    assert torch.isfinite(y).all()


def test_a_zero_point_follows_skewed_groups() -> None:
    x = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) - 0.2
    errors = [float((ref.fake_quantize(x, WEIGHT_FORMATS[name]) - x).norm()) for name in ("int4-zero", "int4-bf16")]
    assert 0.3 * errors[1] < errors[0] < 0.8 * errors[1]
    codes, scales = ref.quantize(x, WEIGHT_FORMATS["int4-zero"])
    assert codes.min() == -8 and codes.max() == 7
    assert scales.zeros is not None and scales.zeros.dtype == torch.int8


def test_full_span_puts_the_largest_on_the_lowest_code() -> None:
    x = torch.tensor([[0.5, -2.0, 1.0, 3.2], [0.5, -3.2, 1.0, 2.0]])
    codes, scales = ref.quantize(x, Format(4, span="full"))
    assert codes[0, 3] == codes[1, 1] == -8
    assert scales.groups.flatten().tolist() == pytest.approx([-0.4, 0.4])


def test_two_level_codes_expand_to_int8() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).exp()
    codes, scales = ref.quantize(x * torch.randn(64, 256).sign(), WEIGHT_FORMATS["int4"])
    expanded = codes.reshape(64, 4, 64).short() * scales.groups.short()[..., None]
    assert -128 <= int(expanded.min()) < int(expanded.max()) <= 127
    assert scales.groups.abs().max() == 15


def test_e2m1_equals_another_implementation() -> None:
    x = torch.cat([torch.linspace(-7, 7, 1401), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0])])
    form = WEIGHT_FORMATS["nvfp4"]
    codes = ref.encode(x[None, : len(x) // 16 * 16], torch.ones(1, len(x) // 16), form)
    ours = ref.decode(codes, torch.ones(1, len(x) // 16), form)[0]
    assert np.array_equal(ours.numpy(), x[: len(ours)].numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_mx_scales_are_powers_of_two_within_reach() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    values = ref.store_scales(ref.ideal_scales(x, WEIGHT_FORMATS["mxfp4"]), WEIGHT_FORMATS["mxfp4"]).values()
    assert torch.equal(values.log2(), values.log2().round())
    largest = ref.grouped(x, WEIGHT_FORMATS["mxfp4"]).abs().amax(-1) / values
    assert ((largest >= 4) & (largest < 8)).all()


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_hadamard_equals_scipy_and_rotation_undoes_itself(size: int) -> None:
    H = ref.hadamard_matrix(size, dtype=torch.float64)
    assert np.allclose(H.numpy(), hadamard(size) / size**0.5)
    x = torch.randn(3, 256, dtype=torch.float64)
    assert (ref.rotate(ref.rotate(x, size), size) - x).abs().max() < 1e-12
    assert ref.rotate(x, 0) is x


def test_int32_products_equal_int64_at_the_extremes() -> None:
    a = torch.full((2, 4608), 127, dtype=torch.int8)
    a[1] = -127
    exact = a.long() @ a.long().T
    assert torch.equal((a.int() @ a.int().T).long(), exact)
    assert exact.abs().max() == 127 * 127 * 4608


@pytest.mark.parametrize(
    "bad",
    [{"bits": 1}, {"bits": 9}, {"bits": 8, "element": "e2m1"}, {"group": -1}],
)
def test_impossible_formats_are_sentences(bad: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Format(**bad)


def test_groups_that_do_not_divide_are_a_sentence() -> None:
    with pytest.raises(UserError, match="rows of 100 cannot be cut into groups of 64"):
        ref.quantize(torch.ones(1, 100), WEIGHT_FORMATS["int4"])
