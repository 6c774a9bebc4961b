"""What is recorded when; the graph itself needs a GPU (tests/kernels/test_triton.py)."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svdit.runtime import graph
from svdit.runtime.graph import Replayed, Step


class Recorder:
    """As CUDA graphs do: what is repeated reads its own inputs and writes over its own output."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, step: Step, inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        output = torch.full_like(step(*inputs), torch.nan)

        def replay() -> None:
            self.replayed += 1
            output.copy_(step(*inputs))

        return replay, output


def double(x: Tensor, t: Tensor) -> Tensor:
    return 2 * x + t


def test_the_second_call_of_a_shape_is_recorded_and_outputs_stay() -> None:
    record = Recorder()
    step, t = Replayed(double, record), torch.tensor(1.0)
    outputs = [step(torch.full((n,), float(i)), t + i) for i, n in enumerate((3, 3, 3, 2, 3, 2))]
    for i, y in enumerate(outputs):
        assert torch.equal(y, torch.full((len(y),), 3.0 * i + 1))
    assert (record.recorded, record.replayed) == (2, 4)


def test_another_type_is_another_graph() -> None:
    record = Recorder()
    step = Replayed(double, record)
    for dtype in (torch.float32, torch.float64):
        for _ in range(2):
            assert step(torch.ones(2, dtype=dtype), torch.ones(())).dtype == dtype
    assert record.recorded == 2


def test_only_so_many_shapes_are_kept() -> None:
    record = Recorder()
    step = Replayed(double, record)
    for n in range(1, 3 + graph.SHAPES):
        for _ in range(3):
            assert step(torch.ones(n), torch.ones(())).tolist() == [3.0] * n
    assert record.recorded == graph.SHAPES


def test_without_graphs_it_runs_and_says_so_once() -> None:
    def refuse(step: Step, inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    step = Replayed(double, refuse)
    step(torch.ones(2), torch.ones(()))
    with pytest.warns(UserWarning, match="without a CUDA graph, slower: operation not permitted"):
        assert step(torch.ones(2), torch.ones(())).tolist() == [3.0, 3.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (2, 5, 5):
            assert step(torch.ones(n), torch.ones(())).tolist() == [3.0] * n
