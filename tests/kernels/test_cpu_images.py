"""Convolutions, norms and products of images in C, against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from heads import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import U
from torch import Tensor

from svdit.kernels.cpu import ffi, images
from svdit.kernels.cpu.images import Affine, Workspace, convolve, group_norm, project

POINTS = [0, 1, -1, 2, -2, 0.5, -0.5]  # and infinity
SHAPES = [(1, 1, 1, 1), (7, 5, 3, 5), (6, 12, 17, 16), (13, 20, 33, 70), (31, 2, 64, 130)]  # H, W, I, O
pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


@pytest.fixture(scope="module", params=ffi.isas())
def kernels(request: pytest.FixtureRequest) -> ffi.Kernels:
    return ffi.Kernels(request.param)


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """A (8, 6), B (8, 8) and G (8, 3) of F(6, 3), by Toom and Cook from the points alone."""
    A, B, G = torch.zeros(8, 6), torch.zeros(8, 8), torch.zeros(8, 3)
    for i, point in enumerate(POINTS):
        row = np.poly([other for other in POINTS if other != point])[::-1].copy()  # the lowest power first
        A[i], B[i, :7] = point ** torch.arange(6.0), torch.from_numpy(row)
        G[i] = point ** torch.arange(3.0) / (B[i, :7] * point ** torch.arange(7.0)).sum()
    A[7, 5], B[7], G[7, 2] = 1, torch.from_numpy(np.poly(POINTS)[::-1].copy()), 1
    return A.double(), B.double(), G.double()


def magnitudes(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x (H, W, I) with every product and sum in it replaced by that of absolute values, (H, W, O).

    n roundings one after the other change the result by at most n · U times as much (Higham, section 3.1).
    """
    (H, W, _), (A, B, G) = x.shape, (m.abs() for m in matrices())
    padded = F.pad(x.double().abs().permute(2, 0, 1), (1, -W % 6 + 1, 1, -H % 6 + 1))
    tiles = padded.unfold(1, 8, 6).unfold(2, 8, 6)  # (I, h, w, 8, 8)
    products = torch.einsum("ihwyx,oiyx->ohwyx", B @ tiles @ B.T, G @ weight.double().abs() @ G.T)
    y = A.T @ products @ A  # (O, h, w, 6, 6)
    return y.permute(1, 3, 2, 4, 0).flatten(2, 3).flatten(0, 1)[:H, :W]


def direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of x (H, W, I) in float64, (H, W, O)."""
    y = F.conv2d(x.double().permute(2, 0, 1)[None], weight.double(), bias.double(), padding=1)
    return y[0].permute(1, 2, 0)


def check(
    kernels: ffi.Kernels, shape: tuple[int, int, int, int], *, norm: bool, enlarge: bool, residual: bool, seed: int = 0
) -> None:
    """Every output is within its bound: 2 · 6 roundings to transform the input, also the weight, 2 · 7 of the products,
    one for each input channel and two at the end. Sixteen of SiLU, relative to its input's largest part."""
    h, w, I, O = shape
    x, weight, bias = normal(h, w, I, seed=seed), normal(O, I, 3, 3, seed=seed + 1), normal(O, seed=seed + 2)
    affine = Affine(normal(I, seed=seed + 3), normal(I, seed=seed + 4)) if norm else None
    d, rounded = x.double(), torch.zeros(h, w, I).double()
    if affine is not None:
        d = F.silu(d * affine.scale + affine.shift)
        rounded = 16 * U * ((x * affine.scale).abs() + affine.shift.abs() + d.abs())
    if enlarge:
        d, rounded = (y.repeat_interleave(2, 0).repeat_interleave(2, 1) for y in (d, rounded))
    H, W = d.shape[:2]
    before = normal(H, W, O, seed=seed + 5) if residual else torch.zeros(H, W, O)
    y = convolve(
        x, weight, bias, Workspace(kernels), torch.empty(H, W, O),
        norm=affine, enlarge=enlarge, residual=before if residual else None,
    )  # fmt: skip
    expected = (
        F.conv2d(d.permute(2, 0, 1)[None], weight.double(), bias.double(), padding=1)[0].permute(1, 2, 0) + before
    )
    bound = (I + 42) * U * (magnitudes(d, weight) + bias.abs() + before.abs()) + magnitudes(rounded, weight)
    error = (y - expected).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert error.max() > 0


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_convolutions(kernels: ffi.Kernels, norm: bool, enlarge: bool, residual: bool) -> None:
    for shape in SHAPES:
        check(kernels, shape, norm=norm, enlarge=enlarge, residual=residual)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(*(st.integers(1, most) for most in (20, 20, 40, 80))),
    st.tuples(*[st.booleans()] * 3),
    st.integers(0, 999),
)
def test_convolutions_of_any_shape(
    kernels: ffi.Kernels, shape: tuple[int, int, int, int], parts: tuple[bool, bool, bool], seed: int
) -> None:
    check(kernels, shape, norm=parts[0], enlarge=parts[1], residual=parts[2], seed=seed)


def test_typical_errors_are_small(kernels: ffi.Kernels) -> None:
    """The bound holds for the worst case; random errors are of the size that NNPACK's have."""
    x, weight = normal(24, 24, 128), normal(64, 128, 3, 3)
    y = convolve(x, weight, None, Workspace(kernels), torch.empty(24, 24, 64))
    expected = direct(x, weight, torch.zeros(64))
    assert 1e-7 < float((y - expected).norm() / expected.norm()) < 1e-5


def test_neither_threads_nor_memory_change_a_bit(kernels: ffi.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, before = normal(37, 40, 20), normal(150, 20, 3, 3), normal(150), normal(37, 40, 150)
    found = list[Tensor]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for scratch in (24 << 20, 0):  # of one block, and of several
                monkeypatch.setattr(images, "SCRATCH", scratch)
                norm, space = group_norm(x, 4, x[0, 0], x[1, 1], kernels), Workspace(kernels)
                convolved = convolve(x, weight, bias, space, before.clone(), norm=norm, residual=before)
                found.append(torch.cat([convolved, project(x, weight[:, :, 1, 1].contiguous(), bias, kernels)]))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(other, found[0]) for other in found)


def test_in_place(kernels: ffi.Kernels) -> None:
    x, weight, before = normal(9, 14, 8), normal(24, 8, 3, 3), normal(9, 14, 24)
    space, own = Workspace(kernels), before.clone()
    convolve(x, weight, None, space, own, residual=own)
    assert torch.equal(own, convolve(x, weight, None, space, torch.empty(9, 14, 24), residual=before))


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_group_norm(kernels: ffi.Kernels, mean: float) -> None:
    """Also where the mean is much larger than the deviation; pieces are of 32768 numbers."""
    for H, W, C, groups in ((1, 1, 4, 2), (5, 7, 12, 3), (40, 50, 64, 32), (33, 3, 130, 2), (3, 1000, 24, 1)):
        x, weight, bias = normal(H, W, C) + mean + normal(C, seed=1), normal(C, seed=2), normal(C, seed=3)
        scale, shift = group_norm(x, groups, weight, bias, kernels)
        y = x.double() * scale.double() + shift.double()
        inputs = x.double().permute(2, 0, 1)[None]
        expected = F.group_norm(inputs, groups, weight.double(), bias.double(), 1e-6)[0].permute(1, 2, 0)
        # one rounding of scale and shift each, and at most 2^15 in a piece's moments, whose errors are random
        assert (y - expected).abs().max() <= 64 * U * ((x.abs() * scale.abs()).max() + shift.abs().max())


def test_products_with_matrices(kernels: ffi.Kernels) -> None:
    for rows, I, O in ((1, 1, 1), (7, 5, 3), (96, 17, 16), (101, 64, 70), (1000, 33, 130)):
        x, weight, bias = normal(rows, I), normal(O, I, seed=1), normal(O, seed=2)
        for b in (bias, None):
            y = project(x, weight, b, kernels)
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            magnitude = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.abs())
            assert ((y - expected).abs() <= (I + 1) * U * magnitude).all()


def test_what_does_not_fit_is_refused(kernels: ffi.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, out, space = normal(6, 6, 4), normal(8, 4, 3, 3), torch.empty(6, 6, 8), Workspace(kernels)
    for wrong in (x.double(), x.transpose(0, 1), normal(6, 6, 5)):
        with pytest.raises(ValueError, match="expected"):
            convolve(wrong, weight, None, space, out)
    with pytest.raises(ValueError, match="expected"):
        convolve(x, weight, None, space, out, enlarge=True)
    with pytest.raises(ValueError, match="3 groups, expected a multiple"):
        group_norm(x, 3, x[0, 0], x[0, 0], kernels)
    with pytest.raises(ValueError, match="expected"):
        project(x, normal(3, 5), None, kernels)
