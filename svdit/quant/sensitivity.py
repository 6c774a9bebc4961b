"""How much the model's output changes when a layer's output does: ‖J‖²_F, by Hutchinson's estimate.

For v ~ N(0, I), E‖Jᵀv‖² = ‖J‖²_F, and one backward pass of v·output computes Jᵀv for every layer at once. White noise
of variance σ² on a layer's output then adds σ²‖J‖²_F to the squared error of the model's output, to first order.
"""

from collections.abc import Callable, Iterable
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

    Calls that are held out are not stored. The returned loop raises UserError if the model is never called, or with
    keyword arguments only.
    """

    def recorded(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        kept: list[tuple[float, Call]] = []

        def keep(module: nn.Module, inputs: Call) -> None:
            if is_held_out():
                return
            if not inputs:
                raise UserError("the forward loop passes the model keyword arguments only; pass its input by position")
            rows = torch.randperm(len(inputs[0]), generator=generator, device="cpu")[:ROWS]
            key = float(torch.rand((), generator=generator, device="cpu"))
            with full_precision(inputs[0].device):
                kept.append((key, tuple(x[rows].clone() if isinstance(x, Tensor) else x for x in inputs)))
            kept.sort(key=lambda entry: entry[0])
            del kept[CALLS:]

        with model.register_forward_pre_hook(keep):
            loop(model)
        if not kept:
            raise UserError("the forward loop never called the model; sensitivities need its inputs")
        calls[:] = [inputs for _, inputs in kept]

    return recorded


@torch.inference_mode(False)
def sensitivities(model: nn.Module, names: Iterable[str], calls: list[Call]) -> tuple[dict[str, float], float]:
    """For each named layer ‖J‖²_F over its number of outputs per row, and the mean squared norm of the output."""
    names = list(names)
    outputs: dict[str, Tensor] = {}
    total, energy = dict.fromkeys(names, 0.0), 0.0

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return outputs[name]

        return hook

    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(keep(name)))
        stack.enter_context(evaluating(model))
        for inputs in calls:
            with torch.enable_grad():
                y = model(*inputs)
                v = torch.randn(y.shape, generator=generator, device="cpu").to(y)
                gradients = torch.autograd.grad((v * y).sum(), [outputs[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += float(gradient.square().sum()) / gradient.shape[-1] / len(calls)
            energy += float(y.detach().square().sum()) / len(calls)
    return total, energy
