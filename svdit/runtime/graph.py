"""A step recorded as a CUDA graph for every shape of its inputs, and replayed: hundreds of launches become one.

The first call of a shape runs as it is (kernels are compiled and tiled then), the second records. Where a step cannot
be recorded it runs as before, and a warning says why, once. Outputs are copies: they stay what they are.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHAPES = 4  # that are recorded; each keeps its input and output, and the largest one's activations

Step = Callable[..., Tensor]
Recorder = Callable[[Step, list[Tensor]], tuple[Callable[[], None], Tensor]]


class CudaRecorder:
    """Records graphs that share one pool of memory."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, step: Step, inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph, pool=self.pool):
            output = step(*inputs)
        return graph.replay, output


class Replayed:
    """A step, tensors to a tensor; `record` returns what repeats it on the same inputs, and its output."""

    def __init__(self, step: Step, record: Recorder | None = None) -> None:
        self.step, self.record = step, record or CudaRecorder()
        self.possible = True
        self.seen: set[object] = set()
        self.graphs: dict[object, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key in self.graphs:
            return self._replay(key, inputs)
        room = self.possible and len(self.graphs) < SHAPES
        if key in self.seen and room and self._recorded(key, inputs):
            return self._replay(key, inputs)
        self.seen.add(key)
        return self.step(*inputs)

    def _recorded(self, key: object, inputs: tuple[Tensor, ...]) -> bool:
        own = [x.clone() for x in inputs]
        try:
            self.graphs[key] = (own, *self.record(self.step, own))
        except RuntimeError as error:
            warnings.warn(f"steps run without a CUDA graph, slower: {error}", stacklevel=3)
            self.possible = False
        return self.possible

    def _replay(self, key: object, inputs: tuple[Tensor, ...]) -> Tensor:
        own, replay, output = self.graphs[key]
        for to, x in zip(own, inputs, strict=True):
            to.copy_(x)
        replay()
        return output.clone()
