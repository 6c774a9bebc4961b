"""A step recorded as a CUDA graph per input shape and replayed: hundreds of launches become one.

The first call of a shape runs normally (kernels are compiled and tuned then), the second records. Where recording
fails, steps run normally and one warning says why. Outputs are cloned, so a later replay does not overwrite them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHAPES = 4  # recorded at most; each holds its input and output, and all share the activations of the largest

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
    """A step, tensors to a tensor; `record` returns a function that repeats it on the same inputs, and its output."""

    def __init__(self, step: Step, record: Recorder | None = None) -> None:
        self.step, self.record = step, record or CudaRecorder()
        self.possible = True
        self.seen: set[object] = set()
        self.graphs: dict[object, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key in self.graphs:
            return self._replay(key, inputs)
        allowed = self.possible and len(self.graphs) < SHAPES
        if key in self.seen and allowed and self._recorded(key, inputs):
            return self._replay(key, inputs)
        self.seen.add(key)
        return self.step(*inputs)

    def _recorded(self, key: object, inputs: tuple[Tensor, ...]) -> bool:
        with torch.inference_mode(False):  # inference tensors could not be written to outside of inference mode
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
