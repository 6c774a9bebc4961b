"""`svdit verify`: is a quantized checkpoint what its header says, made from this source?"""

import argparse
from typing import TYPE_CHECKING

from svdit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from svdit.model.dit import DiT
    from svdit.quant.linear import SVDLinear

TOLERANCE = 1e-4  # of a recorded error; another CPU adds in another order


def parser() -> argparse.ArgumentParser:
    """The flags of `svdit verify`."""
    parser = argparse.ArgumentParser("svdit verify", description="Check a quantized checkpoint against its source.")
    parser.add_argument("file", help="the quantized checkpoint")
    parser.add_argument("--against", required=True, metavar="SOURCE", help="the checkpoint it was made from")
    return parser


def run(args: argparse.Namespace) -> None:
    """Recompute every layer's weight error; fail at the first that is not as recorded."""
    from svdit.checkpoints.store import load_model, locate, read_header
    from svdit.files import sha256

    path, source = locate(args.file), locate(args.against)
    provenance = (read_header(path) or {}).get("provenance", {})
    recorded = provenance.get("quantization", {}).get("weight_errors")
    if recorded is None:
        raise UserError(f"{path} records no weight errors; give a file made by `svdit quantize`")
    digest, expected = sha256(source), provenance["source"]["sha256"]
    if digest != expected:
        raise UserError(f"{source} is not the source of {path}: its sha256 is {digest[:16]}…, not {expected[:16]}…")
    model, original = load_model(path), load_model(source)
    found = weight_errors(model, original)
    for name in sorted(set(found) | set(recorded)):
        one, two = found.get(name), recorded.get(name)
        if one is None or two is None or not abs(one - two) <= TOLERANCE * two:
            raise UserError(
                f"{name} of {path} has a weight error of {one}, but {two} is recorded; do not use this file"
            )
    print(f"{path.name}: {len(found)} quantized layers as recorded, all else equal to {source.name}")


def close(x: "Tensor", y: "Tensor") -> bool:
    """Whether they differ by rounding alone."""
    return bool((x - y).norm() <= TOLERANCE * y.norm())


def expected_bias(layer: "SVDLinear", linear: "nn.Linear") -> "Tensor":
    """The bias (O,) that quantization makes of the source's: b + W·shift."""
    import torch

    bias = torch.zeros(layer.out_features) if linear.bias is None else linear.bias.detach().float()
    return bias if layer.in_shift is None else bias + linear.weight.detach().float() @ layer.in_shift


def weight_errors(model: "DiT", source: "DiT") -> dict[str, float]:
    """‖W − W'‖ / ‖W‖ of every quantized layer; a UserError where anything else differs from the source."""
    import torch

    from svdit.quant.linear import quantized_layers
    from svdit.quant.quantize import linear_of

    layers, wanted = quantized_layers(model), source.state_dict()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in layers and not torch.equal(tensor, wanted[key]):
            raise UserError(f"{key} differs from the source's, though it was not quantized; do not use this file")
    errors = {}
    for name, layer in layers.items():
        linear = linear_of(source, name)
        if layer.bias is not None and not close(layer.bias, expected_bias(layer, linear)):
            raise UserError(
                f"the bias of {name} is not what its source and its centring make of it; do not use this file"
            )
        W = linear.weight.detach().float()
        errors[name] = float((layer.effective_weight().detach() - W).norm() / W.norm())
    return errors
