"""`svdit verify`: is a quantized checkpoint what its header says, made from this source?"""

import argparse
from typing import TYPE_CHECKING

from svdit.cli.arguments import Parser, path
from svdit.cli.result import Result
from svdit.errors import UserError

if TYPE_CHECKING:
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
    """Recompute the weight error of every layer. Raises UserError at the first that differs from the record."""
    from svdit.checkpoints.infer import UNSEEN
    from svdit.checkpoints.io import fingerprint
    from svdit.checkpoints.store import load_model, locate, read_header

    path, source = locate(args.file), locate(args.against)
    provenance = (read_header(path) or {}).get("provenance", {})
    recorded = provenance.get("quantization", {}).get("weight_errors")
    if recorded is None:
        raise UserError(f"{path} records no weight errors; pass a file made by `svdit quantize`")
    digest, expected = fingerprint(source), provenance["source"]["sha256"]
    if digest != expected:
        raise UserError(f"{source} is not the source of {path}: its sha256 is {digest[:16]}…, not {expected[:16]}…")
    model = load_model(path)
    unrecorded = {key: getattr(model.config, key) for key in ("num_classes", "family", *UNSEEN)}  # by other tools
    errors = weight_errors(model, load_model(source, **unrecorded))
    for name in sorted(set(errors) | set(recorded)):
        error, record = errors.get(name), recorded.get(name)
        if error is None or record is None or not abs(error - record) <= TOLERANCE * record:
            raise UserError(
                f"{name} of {path} has weight error {error}, but {record} is recorded; do not use this file"
            )
    layers = [{"name": name, "weight_error": error} for name, error in errors.items()]
    data = {"file": path, "source": source, "layers": layers, "matches": True}
    text = f"{path.name}: {len(errors)} quantized layers match the record, all else equals {source.name}"
    return Result(data, [text])


def close(x: "Tensor", y: "Tensor") -> bool:
    """Whether two tensors (O,) differ by rounding only."""
    return bool((x - y).norm() <= TOLERANCE * y.norm())


def expected_bias(layer: "SVDLinear", linear: "nn.Linear") -> "Tensor":
    """The bias (O,) after quantization: b + W·shift."""
    weight = linear.weight.detach().float()
    bias = weight.new_zeros(layer.out_features) if linear.bias is None else linear.bias.detach().float()
    return bias if layer.in_shift is None else bias + weight @ layer.in_shift


def weight_errors(model: "DiT", source: "DiT") -> dict[str, float]:
    """‖W − W'‖ / ‖W‖ of every quantized layer. Raises UserError if anything else differs from the source."""
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
        if layer.bias is not None and not close(layer.bias, expected_bias(layer, linear)):
            raise UserError(f"the bias of {name} does not follow from the source and in_shift; do not use this file")
        errors[name] = relative_error(layer.effective_weight().detach(), linear.weight.detach().float())
    return errors
