"""A quantized model made ready to run: layers packed for a backend, the steps around them fused into theirs.

    model = accelerate(load_model("dit.safetensors"))

The result computes what the stored model computes. It cannot be saved or trained, and it takes the layers' memory
over: the model that it was made from is empty afterwards.
"""

from typing import TypeVar

from torch import nn

from svdit.kernels import ops
from svdit.model.dit import DiT
from svdit.quant.linear import quantized_layers, swap
from svdit.runtime.dit import FastDiT
from svdit.runtime.linear import FastLinear, Packer

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str | None = None, *, debug: bool = False) -> Model | FastDiT:
    """A DiT in few launches, or another model with its quantized layers swapped in place; float models unchanged.

    `backend` as in `ops.choose`. With `debug` a layer that is given numbers that are not finite is a UserError.
    """
    layers = quantized_layers(model)
    if not layers:
        return model
    device = next(iter(next(iter(layers.values())).state_dict().values())).device
    pack = Packer(ops.choose(device, backend), debug)
    if isinstance(model, DiT):
        return FastDiT(model, pack)
    for name, layer in layers.items():
        swap(model, name, FastLinear(pack(layer, name)))
    return model
