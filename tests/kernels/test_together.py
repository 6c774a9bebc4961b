"""Kernels that run as one call: the numbers of single calls, with memory that stays until then."""

import pytest
import torch
from layers import random_layer

from svdit.kernels.cpu import ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.formats import Format
from svdit.kernels.layer import HeadNorms, Modulation, Residual, Rotation

N, T, D, HEADS = 2, 7, 64, 2

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


def packed(kernels: ffi.Kernels, others: ffi.Kernels) -> tuple[cpu.IntegerLinear, cpu.IntegerLinear]:
    """qkv for attention by `others`, and proj."""
    qkv, proj = (random_layer(O, D, 8, Format(8), O) for O in (3 * D, D))
    return cpu.IntegerLinear(qkv, kernels, others.low_dtype), cpu.IntegerLinear(proj, kernels)


def chain(qkv: cpu.IntegerLinear, proj: cpu.IntegerLinear, others: ffi.Kernels) -> torch.Tensor:
    """A linear, attention and a linear, (N, T, D); every tensor in between is dropped at once."""
    g = torch.Generator().manual_seed(0)
    x, rows = torch.randn(N, T, D, generator=g), torch.randn(3, N, D, generator=g)
    y = qkv(x.clone(), modulation=Modulation(rows[0].clone(), rows[1].clone()))
    y = cpu.attention(y, HEADS, others)
    return proj(y, residual=Residual(x, rows[2].clone()))


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("other", [0, -1])
def test_they_compute_the_same(isa: str, other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, others = ffi.Kernels(isa), ffi.kernels(ffi.isas()[other])
    layers, counts, run = packed(kernels, others), list[int](), ffi.Kernels.run
    expected = chain(*layers, others)
    monkeypatch.setattr(ffi.Kernels, "run", lambda self, steps: counts.append(len(steps)) or run(self, steps))
    with ffi.together():
        y = chain(*layers, others)
        reused = [torch.full((size * N * D,), torch.nan) for size in (1, T, 2 * T, 3 * T) * 20]
        assert counts == [] and not torch.equal(y, expected)
    assert torch.equal(y, expected) and len(reused) == 80
    assert counts == [1, 1, 1]


def test_consecutive_calls_of_the_same_kernels_are_one() -> None:
    kernels, ran = ffi.Kernels(ffi.isas()[0]), list[str]()
    layers = packed(kernels, kernels)
    expected, functions = chain(*layers, kernels), kernels.functions
    kernels.functions = {name: lambda *a, name=name: ran.append(name) or functions[name](*a) for name in functions}
    with ffi.together():
        y = chain(*layers, kernels)
    assert torch.equal(y, expected) and ran == ["run"]


@pytest.mark.parametrize("isa", ffi.isas())
def test_inner_blocks_wait_for_the_outermost_one_and_share_memory(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, counts, places, run = ffi.Kernels(isa), list[int](), list[int](), ffi.Kernels.run
    layers, outputs = packed(kernels, kernels), list[torch.Tensor]()
    expected = chain(*layers, kernels)
    monkeypatch.setattr(ffi.Kernels, "run", lambda self, steps: counts.append(len(steps)) or run(self, steps))
    with ffi.together():
        for tokens in (1, 1, 2, 1, 2):
            with ffi.together():
                places.append(layers[0](torch.ones(N, tokens, D)).data_ptr())
                outputs.append(chain(*layers, kernels))
        assert counts == [] and places[0] == places[1] and len(set(places[2:])) == 1
    assert all(torch.equal(y, expected) for y in outputs)
    assert counts == [20]


def test_attention_keeps_what_it_reads() -> None:
    kernels, g = ffi.kernels(ffi.isas()[0]), torch.Generator().manual_seed(0)
    qkv = torch.randn(N, T, 3 * D, generator=g).to(kernels.low_dtype)
    norms, angles = torch.randn(2, D // HEADS, generator=g), torch.randn(T, D // HEADS, generator=g)

    def attend() -> torch.Tensor:
        tables = HeadNorms(norms.clone(), None), Rotation(angles.cos(), angles.sin())
        return cpu.attention(qkv.clone(), HEADS, kernels, *tables)

    expected = attend()
    with ffi.together():
        y = attend()
        reused = [torch.full_like(x, torch.nan) for x in (qkv, norms, angles) for _ in range(20)]
    assert torch.equal(y, expected) and len(reused) == 60


def test_an_error_runs_nothing_and_leaves_nothing_waiting() -> None:
    kernels = ffi.kernels(ffi.isas()[0])
    layers = packed(kernels, kernels)
    expected, outputs = chain(*layers, kernels), list[torch.Tensor]()

    def broken() -> None:
        with ffi.together():
            outputs.append(chain(*layers, kernels))
            cpu.attention(torch.ones(1, 1, 3), 2, kernels)

    with pytest.raises(ValueError, match="expected"):
        broken()
    assert not torch.equal(outputs[0], expected)
    assert torch.equal(chain(*layers, kernels), expected)
