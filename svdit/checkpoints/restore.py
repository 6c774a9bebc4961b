"""A file's tensors into a float model: everything is checked before the model is changed.

The header names the quantized layers with their specs, and tensors that are stored once but have several names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdit.checkpoints.io import Header
from svdit.errors import UserError
from svdit.fields import from_json
from svdit.model.caching import CachePlan
from svdit.model.config import DiTConfig
from svdit.quant.linear import LinearSpec, SVDLinear, swap

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, UserError, ValueError)


def specs_from_header(header: Header, path: Path) -> dict[str, LinearSpec]:
    """Specs of the quantized layers in a header, by name. Raises UserError, naming the file, for unusable values."""
    specs: dict[str, LinearSpec] = {}
    for name, spec in header.get("layers", {}).items():
        what = f"a quantized layer that is not supported, {name}"
        with naming(path, what, "quantize the model again, or upgrade svdit"):
            specs[name] = LinearSpec.from_dict(unfolded(spec, "out_scaled") if isinstance(spec, dict) else spec)
    return specs


def cache_plan(header: Header, config: DiTConfig, path: Path) -> CachePlan | None:
    """The plan of `svdit cache` in a header; None without. Raises UserError, naming the file, for unusable values."""
    if "caching" not in header:
        return None
    with naming(path, "an unusable cache plan", "run `svdit cache` on it again"):
        plan = from_json(CachePlan, header["caching"])
        plan.check(config)
        return plan


def unfolded(values: Any, flag: str) -> dict[str, Any]:
    """Fields without the flag of earlier versions, which could fold smoothing into other layers.

    Raises UserError where it was folded.
    """
    if values.get(flag):
        raise UserError("it was written by an earlier version, which folded smoothing into other layers")
    return {key: value for key, value in values.items() if key != flag}


@contextmanager
def naming(path: Path, problem: str, advice: str) -> Iterator[None]:
    """Turn any error that values of a file cause into a UserError that names the file."""
    try:
        yield
    except ERRORS as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise UserError(f"{path} has {problem} ({reason.replace('; ', ', ')}); {advice}") from None


def distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (…) of a model by their first name, and the first name of every other name.

    Raises UserError for entries of the state dict that are no tensors or have no data.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise UserError(f"{key} has no data to save; save the model before accelerating it, with tensors only")
        if first.setdefault(id(tensor), key) == key:
            tensors[key] = tensor
        else:
            shared[key] = first[id(tensor)]
    return tensors, shared


def restore_(model: nn.Module, tensors: dict[str, Tensor], header: Header, path: Path) -> None:
    """Load tensors (…) into a float model, whose linears become the quantized layers of the header.

    Raises UserError, with the model unchanged, where the tensors, the header and the model do not fit.
    """
    specs, shared = specs_from_header(header, path), header.get("shared", {})
    with naming(path, "layers that cannot be built", "pass an unchanged file and its float model"):
        tensors = {**tensors, **{name: tensors[first] for name, first in shared.items()}}
        layers = quantized(model, specs, tensors, shared)
    inside = tuple(f"{name}." for name in layers)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(inside)}
    check_fit({key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}, rest, path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, first in shared.items():
        if first in rest and first in parameters:  # one parameter under two names stays one
            if not isinstance(rest[first], nn.Parameter):
                rest[first] = nn.Parameter(rest[first], parameters[first].requires_grad)
            rest[name] = rest[first]
    device = next((tensor.device for tensor in model.state_dict().values() if not tensor.is_meta), None)
    dtype = next((tensor.dtype for tensor in rest.values() if tensor.dtype in FLOATS), torch.float32)
    for layer in layers.values():
        layer.dtype = dtype  # of `weight`
    swap(model, layers)
    model.load_state_dict(rest, strict=False, assign=True)  # the layers have their tensors
    if device is not None:
        model.to(device)


def quantized(
    model: nn.Module, specs: Mapping[str, LinearSpec], tensors: Mapping[str, Tensor], shared: Mapping[str, str]
) -> dict[str, SVDLinear]:
    """The layers of these specs and tensors (…), by name; a shared one is the same under all its names.

    Raises UserError for a name that is no plain Linear of the model, and for tensors that are not those of the layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {key.rpartition(".")[0]: first.rpartition(".")[0] for key, first in shared.items()}
    aliases = {alias: first for alias, first in first_names.items() if first in specs}
    parts = by_layer(tensors)
    layers = {name: layer(name, plain_linear(modules, name), spec, parts.get(name, {})) for name, spec in specs.items()}
    for alias, first in aliases.items():
        if {key: id(x) for key, x in parts[alias].items()} != {key: id(x) for key, x in parts[first].items()}:
            raise UserError(f"{alias} and {first} share only some of their tensors")
        plain_linear(modules, alias)
        layers[alias] = layers[first]
    owners: dict[nn.Module, SVDLinear] = {}
    for name, svd in layers.items():
        if owners.setdefault(modules[name], svd) is not svd:
            raise UserError(f"{name} is shared with another layer of the model, but not in the file")
    return layers


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors (…) by the name of their layer and the rest of theirs."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.rpartition(".")
        parts.setdefault(name, {})[rest] = tensor
    return parts


def layer(name: str, linear: nn.Linear, spec: LinearSpec, own: Mapping[str, Tensor]) -> SVDLinear:
    """The quantized layer in place of `linear`, of these tensors (…). Raises UserError where they do not fit."""
    bias: Tensor | None = linear.bias
    if ("bias" in own) != (bias is not None or spec.shifted):
        raise UserError(f"{name} has {'a' if 'bias' in own else 'no'} bias, unlike the model")
    try:
        return SVDLinear.from_tensors(spec, linear.out_features, linear.in_features, own)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def plain_linear(modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    """The Linear called `name`. Raises UserError where there is none, or another kind of layer."""
    module = modules.get(name)
    if name == "" or type(module) is not nn.Linear:
        raise UserError(f"{name!r} of the model is a {type(module).__name__}, not a Linear, as in the file")
    return module


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare names, shapes (…) and types of a file's tensors with the model's. Raises UserError where they differ."""
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted]
    wrong = [
        f"{key} is {tuple(tensors[key].shape)} {tensors[key].dtype} and not {tuple(want.shape)} {want.dtype}"
        for key, want in wanted.items()
        if key in tensors and not alike(tensors[key], want)
    ]
    reports = [("lacks", missing), ("has unknown", extra), ("has another shape or type of", wrong)]
    problems = [f"{what} {len(keys)} tensors (first: {keys[0]})" for what, keys in reports if keys]
    if problems:
        raise UserError(f"{path} does not fit its model: it {' and '.join(problems)}; pass an unchanged checkpoint")


def alike(tensor: Tensor, want: Tensor) -> bool:
    """Whether two tensors (…) have the same shape, and the same type or both floats of any type."""
    floats = tensor.dtype in FLOATS and want.dtype in FLOATS
    return tensor.shape == want.shape and (floats or tensor.dtype == want.dtype) and tensor.layout == torch.strided
