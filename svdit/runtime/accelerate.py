"""A quantized model for inference: layers packed for a backend, the steps around them fused.

    model = accelerate(load_model("dit.safetensors"))

The result computes what the quantized model computes. It cannot be saved, copied, moved or trained, and it owns the
layers' memory: the model it was made from is empty afterwards.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.model.dit import DiT
from svdit.quant.linear import quantized_layers, swap, unwrapped
from svdit.runtime.dit import FastDiT
from svdit.runtime.linear import FastLinear, check_move, packed

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str | None = None, *, debug: bool = False) -> Model | FastDiT:
    """A DiT with fused steps, or another model with its quantized layers replaced in place; float models unchanged.

    `backend` as in `ops.choose`. With `debug` a layer whose input contains NaN or Inf raises UserError.
    Raises UserError for a model that was accelerated and is empty, and for one that is to be accelerated otherwise.
    """
    model = unwrapped(model)
    layers = quantized_layers(model)
    if not layers:
        if (backend or debug) and any(isinstance(module, FastLinear) for module in model.modules()):
            raise UserError("the model is accelerated already; load it again for another backend, or for debug")
        if backend:
            ops.choose(next((p.device for p in model.parameters()), "cpu"), backend)
        return model
    device = next(iter(layers.values())).layer().device
    if device.type == "meta":
        raise UserError("the model was accelerated and is empty; use what accelerate returned, or load it again")
    backend = ops.choose(device, backend)
    if isinstance(model, DiT):
        return FastDiT(model, backend, debug)
    swap(model, {name: packed(layer, name, backend, debug) for name, layer in layers.items()})
    move = model._apply

    def checked(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        check_move(model, fn)  # of all layers, before any tensor is moved
        return move(fn, recurse)  # type: ignore[no-untyped-call]

    model._apply = checked  # type: ignore[method-assign]
    return model


def fallbacks(model: nn.Module) -> dict[str, str]:
    """For every quantized layer of an accelerated model why it runs in fp32; empty where the backend supports it."""
    layers = (module for module in model.modules() if isinstance(module, FastLinear))
    return {layer.name: layer.reason for layer in layers if layer.reason is not None}
