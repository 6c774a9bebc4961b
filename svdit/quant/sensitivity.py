"""How much the model's output changes when a layer's output does: ‖J‖²_F, by Hutchinson's estimate.

For v ~ N(0, I), E‖Jᵀv‖² = ‖J‖²_F, and one backward pass of v·output computes Jᵀv for every layer at once. White noise
of variance σ² on a layer's output then adds σ²‖J‖²_F to the squared error of the model's output, to first order.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.holdout import is_held_out
from svdit.quant.observe import ForwardLoop, evaluating, full_precision

CALLS, ROWS = 16, 2  # calls of the model that are replayed, and rows of the batch in each
Call = tuple[Any, ...]  # positional arguments


def recording(loop: ForwardLoop, calls: list[Call], seed: int = 0) -> ForwardLoop:
    """The loop, which also stores in `calls` the arguments of CALLS random calls, cut to ROWS rows.

    The batch is that of the first tensor with rows. Calls that are held out are not stored. The returned loop raises
    UserError if the model is never called, or without such a tensor by position.
    """

    def recorded(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        kept: list[tuple[float, Call]] = []

        def keep(module: nn.Module, inputs: Call) -> None:
            if is_held_out():
                return
            batches = [x for x in inputs if isinstance(x, Tensor) and x.ndim]
            if not batches:
                raise UserError("the forward loop passes the model no batch by position; pass its input by position")
            N = len(batches[0])
            rows = torch.randperm(N, generator=generator, device="cpu")[:ROWS]
            key = float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))
            with full_precision(batches[0].device):
                kept.append((key, tuple(_rows(x, rows, N) for x in inputs)))
            kept.sort(key=lambda entry: entry[0])
            del kept[CALLS:]

        with model.register_forward_pre_hook(keep):
            loop(model)
        if not kept:
            raise UserError("the forward loop never called the model; sensitivities need its inputs")
        calls[:] = [inputs for _, inputs in kept]

    return recorded


def _rows(x: Any, rows: Tensor, N: int) -> Any:
    """A copy of these rows of an argument of N rows; another argument as it is."""
    if not isinstance(x, Tensor):
        return x
    return x[rows].clone() if x.ndim and len(x) == N else x.clone()


@torch.inference_mode(False)
def sensitivities(model: nn.Module, names: Iterable[str], calls: list[Call]) -> tuple[dict[str, float], float]:
    """For each named layer ‖J‖²_F over its number of outputs per row, and the mean squared norm of the output.

    The output is the first tensor of what the model returns. The effects of a layer that runs several times in a call
    add up; that of a layer without influence is 0.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    total, energy = dict.fromkeys(outputs, 0.0), 0.0

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs[name].append(output if output.requires_grad else output.requires_grad_())
            return outputs[name][-1]

        return hook

    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for name in outputs:
            stack.enter_context(model.get_submodule(name).register_forward_hook(keep(name)))
        stack.enter_context(evaluating(model))
        for inputs in calls:
            for kept in outputs.values():
                kept.clear()
            with torch.enable_grad():
                y = _first(model(*inputs))
                v = torch.randn(y.shape, generator=generator, dtype=torch.float32, device="cpu").to(y)
                ran = [(name, output) for name, kept in outputs.items() for output in kept]
                gradients = torch.autograd.grad((v * y).sum(), [output for _, output in ran], allow_unused=True)
            for (name, _), gradient in zip(ran, gradients, strict=True):
                if gradient is not None:
                    total[name] += float(gradient.float().square().sum()) / gradient.shape[-1] / len(calls)
            energy += float(y.detach().float().square().sum()) / len(calls)
    return total, energy


def _first(output: Any) -> Tensor:
    """The first tensor of what a model returns: a tensor, a tuple, or a mapping, as of diffusers. Raises UserError."""
    while isinstance(output, Mapping | tuple | list) and output:
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, Tensor):
        raise UserError(f"the model returns a {type(output).__name__} and no tensor; a plan needs its output")
    return output
