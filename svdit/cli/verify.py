"""`svdit verify`: is a quantized checkpoint what its header says, made from this source?"""

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from svdit.cli.arguments import Parser, path
from svdit.cli.result import Result
from svdit.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from svdit.model.dit import DiT
    from svdit.quant.linear import SVDLinear

TOLERANCE = 1e-4  # relative, for errors recomputed on another CPU, which sums in another order


def parser() -> Parser:
    """The options of `svdit verify`."""
    parser = Parser("svdit verify", description="Check a quantized checkpoint against its source.")
    parser.add_argument("file", type=path, metavar="FILE", help="the quantized checkpoint")
    parser.add_argument("--against", type=path, required=True, metavar="SOURCE", help="the checkpoint it was made from")
    return parser


def run(args: argparse.Namespace) -> Result:
    """Recompute the errors of every layer. Raises UserError at the first that differs from the record."""
    from svdit.checkpoints.store import load_model, locate

    path, source = locate(args.file), locate(args.against)
    provenance = provenance_of(path, source)
    recorded = provenance["quantization"]["weight_errors"]
    biases = provenance.get("recovery", {}).get("bias_errors", {})
    model = load_model(path)
    errors = layer_errors(model, load_model(source, **unrecorded(model)))
    for name in sorted(set(errors) | set(recorded)):
        error, record = errors[name].weight if name in errors else None, recorded.get(name)
        if error is None or record is None or not abs(error - record) <= TOLERANCE * record:
            raise UserError(
                f"{name} of {path} has weight error {error}, but {record} is recorded; do not use this file"
            )
        bias = biases.get(name, 0.0)  # of a recovered layer
        if not abs(errors[name].bias - bias) <= TOLERANCE * max(1.0, bias):
            raise UserError(f"the bias of {name} does not follow from the source and in_shift; do not use this file")
    layers = [{"name": name, "weight_error": error.weight} for name, error in errors.items()]
    data = {"file": path, "source": source, "layers": layers, "matches": True}
    text = f"{path.name}: {len(errors)} quantized layers match the record, all else equals {source.name}"
    return Result(data, [text])


def provenance_of(path: "Path", source: "Path") -> dict[str, Any]:
    """What a quantized file records. Raises UserError where `svdit quantize` did not make it from the source."""
    from svdit.checkpoints.io import fingerprint
    from svdit.checkpoints.store import read_header

    provenance: dict[str, Any] = (read_header(path) or {}).get("provenance", {})
    if "weight_errors" not in provenance.get("quantization", {}):
        raise UserError(f"{path} is not quantized or records no weight errors; pass a file made by `svdit quantize`")
    digest, expected = fingerprint(source), provenance["source"]["sha256"]
    if digest != expected:
        raise UserError(f"{source} is not the source of {path}: its sha256 is {digest[:16]}…, not {expected[:16]}…")
    return provenance


def unrecorded(model: "DiT") -> dict[str, Any]:
    """What files of other tools do not record of a model, as options of `load_model`."""
    from svdit.checkpoints.infer import UNSEEN

    return {key: getattr(model.config, key) for key in ("num_classes", "family", *UNSEEN)}


def expected_bias(layer: "SVDLinear", linear: "nn.Linear") -> "Tensor":
    """The bias (O,) after quantization: b + W·shift."""
    weight = linear.weight.detach().float()
    bias = weight.new_zeros(layer.out_features) if linear.bias is None else linear.bias.detach().float()
    return bias if layer.in_shift is None else bias + weight @ layer.in_shift


class Errors(NamedTuple):
    """‖W − W'‖ / ‖W‖ of a layer, and the same of its bias."""

    weight: float
    bias: float


def layer_errors(model: "DiT", source: "DiT") -> dict[str, Errors]:
    """The errors of every quantized layer. Raises UserError if anything else differs from the source."""
    import torch

    from svdit.quant.linear import quantized_layers
    from svdit.quant.quantize import linear_of
    from svdit.quant.solve import relative_error

    layers, originals = quantized_layers(model), source.state_dict()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in layers and not torch.equal(tensor, originals[key]):
            raise UserError(f"{key} is not quantized, but differs from the source; do not use this file")
    errors = {}
    for name, layer in layers.items():
        linear = linear_of(source, name)
        weight = relative_error(layer.effective_weight().detach(), linear.weight.detach().float())
        bias = 0.0 if layer.bias is None else relative_error(layer.bias.detach(), expected_bias(layer, linear))
        errors[name] = Errors(weight, bias)
    return errors
