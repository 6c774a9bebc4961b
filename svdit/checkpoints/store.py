"""Checkpoints to models and back: `load_model(path)`, `save_model(model, path)`, `read_header(path)`.

The header of svdit's own files contains the configuration, the specs of quantized layers, and the provenance. For
published files the configuration is inferred from the shapes. A model is built on the meta device and then assigned
the file's tensors. Missing or extra tensors, other shapes, and integers in place of floats are errors.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from svdit.checkpoints import foreign, io
from svdit.checkpoints.convert import from_diffusers, is_diffusers
from svdit.checkpoints.folders import DIT, class_of, in_folder
from svdit.checkpoints.infer import config_from_shapes
from svdit.errors import UserError
from svdit.filetype import check_regular
from svdit.model.dit import DiT, DiTConfig
from svdit.model.zoo import CONFIGS, config_for
from svdit.quant.linear import Format, LinearSpec, layer_specs, quantized_layers, rebuild_

EMBEDDED = Path(__file__).parents[1] / "pretrained"
PUBLISHED_NAME = foreign.ANCHORS[0]
FOLDED = ("absorbed", "out_scaled")  # earlier versions could fold smoothing into other layers; false means not folded


def save_model(model: DiT, path: str | Path, *, name: str = "", provenance: dict[str, Any] | None = None) -> None:
    """Write a .safetensors or .pt file with a header; `provenance` is JSON-able: where the weights come from."""
    header = {"name": name, "config": asdict(model.config), "layers": layer_specs(model)}
    if model.class_names:
        header["classes"] = list(model.class_names)
    io.write(path, model.state_dict(), {**header, "provenance": provenance or {}})


def load_model(
    path: str | Path, *, name: str | None = None, device: str | torch.device = "cpu", **overrides: Any
) -> DiT:
    """A DiT in eval mode from a file, or an embedded model by its name ("digits").

    Supports svdit's own files, published state dicts, checkpoints of the published training script (the EMA weights)
    and diffusers' DiT folders. `name` (of `svdit.model.zoo`) and `overrides` (fields of DiTConfig) are checked against
    the file and change nothing, except that no shape shows `num_heads`, and whether the last of the labels is the null
    class: with `num_classes` equal to their number it is not.
    Raises UserError where they differ from the file, and for files that are damaged or do not fit their model.
    """
    path = locate(path)
    tensors, header = io.read(path)
    claims = {**CONFIGS.get(name or "", {}), **overrides}
    specs = {}
    if header is None:
        tensors, config = published(tensors, claims, path)
    else:
        config, specs = config_from_header(header, path), specs_from_header(header, path)
    check_claims(config, name, claims, path)
    model = empty(config, specs, path)
    check_fit(model.state_dict(), tensors, path)
    check_finite(tensors, path)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.class_names = class_names(header or {}, config, path)
    return model.to(device).eval()


def read_header(path: str | Path) -> io.Header | None:
    """The header of one of svdit's own files, None for other formats. Reads no tensors."""
    return io.read_header(locate(path))


def embedded_models() -> dict[str, Path]:
    """Paths of the models in this package, by name."""
    return {file.stem: file for file in sorted(EMBEDDED.glob("*.safetensors"))}


def locate(path: str | Path) -> Path:
    """The checkpoint file, or index of shards, for an embedded model's name, a file, or a folder, in this order.

    Raises UserError if it does not exist, or if a folder has none or several, saying what it holds.
    """
    embedded = embedded_models()
    if str(path) in embedded:
        return embedded[str(path)]
    path = Path(path)
    if path.is_dir():
        return in_folder(path)
    check_regular(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; pass a file or one of: {', '.join(embedded) or 'none'}")
    return path


def published(tensors: Mapping[str, Tensor], claims: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], DiTConfig]:
    """Tensors (…) of other projects' files in fp32 under the published names, and the configuration they imply.

    Raises UserError where they are not a DiT's or leave the configuration open.
    """
    kind = class_of(path.with_name("config.json"))
    if kind not in ("", DIT) and not (PUBLISHED_NAME in tensors or is_diffusers(tensors)):
        raise UserError(f"{path} contains a {kind}, not a DiT; pass a published DiT or a {DIT} of diffusers")
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    if is_diffusers(tensors):
        claims = {**claims, **diffusers_claims(path.with_name("config.json"))}
        if "input_size" not in claims:
            raise UserError(
                f"{path} has no config.json beside it, which contains its input size; copy it there, or in Python "
                "pass input_size"
            )
        tensors = from_diffusers(tensors, claims["input_size"])
    return tensors, config_from_shapes(tensors, path, claims.get("num_heads"), claims.get("num_classes"))


def diffusers_claims(path: Path) -> dict[str, Any]:
    """Options that only diffusers' config.json has; empty without the file. Raises UserError for bad values."""
    if not path.is_file():
        return {}
    with naming(path, "no usable sample_size and num_attention_heads", "download it again"):
        content = foreign.json_object(path)
        options = {"input_size": content["sample_size"], "num_heads": content["num_attention_heads"]}
        return known(DiTConfig, options)


def config_from_header(header: io.Header, path: Path) -> DiTConfig:
    """The configuration in a header. Raises UserError, naming the file, for unusable values."""
    with naming(path, "a header without a usable configuration", "save or quantize the model again"):
        return DiTConfig(**known(DiTConfig, header["config"]))


def class_names(header: io.Header, config: DiTConfig, path: Path) -> tuple[str, ...]:
    """The names of all classes in a header; empty for models without. Raises UserError, naming the file, for others."""
    names = header.get("classes", [])
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise UserError(f"{path} has class names that are no text; save the model again")
    if len(names) not in (0, config.num_classes):
        raise UserError(f"{path} has {len(names)} class names and {config.num_classes} classes; save the model again")
    return tuple(names)


def specs_from_header(header: io.Header, path: Path) -> dict[str, LinearSpec]:
    """Specs of the quantized layers in a header, by name. Raises UserError, naming the file, for unusable values."""
    with naming(path, "a quantized layer that is not supported", "quantize the model again, or upgrade svdit"):
        return {name: LinearSpec(**known(LinearSpec, spec)) for name, spec in header.get("layers", {}).items()}


def empty(config: DiTConfig, specs: Mapping[str, LinearSpec], path: Path) -> DiT:
    """A model with these quantized layers on the meta device. Raises UserError for specs that do not fit it."""
    with naming(path, "a configuration or layers that cannot be built", "quantize the model again, or upgrade svdit"):
        with torch.device("meta"):
            model = DiT(config)
            rebuild_(model, {name: spec.to_dict() for name, spec in specs.items()})
        for name, layer in quantized_layers(model).items():
            if layer.in_features % max(layer.spec.hadamard, 1):
                raise UserError(f"{name} has {layer.in_features} inputs and Hadamard blocks of {layer.spec.hadamard}")
            if layer.spec.act:
                layer.spec.act.groups(layer.in_features)  # raises if groups do not divide a row
    return model


@contextmanager
def naming(path: Path, problem: str, advice: str) -> Iterator[None]:
    """Turn any error that values of a file cause into a UserError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, UserError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} has {problem} ({reason.replace('; ', ', ')}); {advice}") from None


def known(kind: type[DiTConfig | LinearSpec | Format], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass from JSON. Raises UserError for wrong types and for what earlier versions folded."""
    values = {
        key: Format(**known(Format, value)) if isinstance(value, dict) else value for key, value in values.items()
    }
    folded = [values.pop(key, False) for key in FOLDED]
    if any(folded):
        raise UserError("it was written by an earlier version, which folded smoothing into other layers")
    for field in fields(kind):
        types = {
            option if isinstance(option, type) else type(option) for option in get_args(field.type) or [field.type]
        }
        value = values.get(field.name, field.default)
        if type(value) not in types | ({int} if float in types else set()):
            raise UserError(f"{field.name} is {value!r}, a {type(value).__name__}")
    return values


def check_claims(config: DiTConfig, name: str | None, claims: Mapping[str, Any], path: Path) -> None:
    """Compare the caller's options with the file's configuration. Raises UserError where they differ."""
    if name is not None:
        config_for(name)
    if unknown := set(claims) - {field.name for field in fields(DiTConfig)}:
        raise TypeError(f"DiT has no option {', '.join(sorted(unknown))}")
    actual = asdict(config)
    wrong = [f"{key} {actual[key]} and not {value}" for key, value in claims.items() if actual[key] != value]
    if wrong:
        reason = f", so it is not {name}" if name else ""
        raise UserError(f"{path} has {', '.join(wrong)}{reason}; pass the options of the file")


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare the names, shapes (…) and kinds of number of a file's tensors with the model's.

    Raises UserError where they differ.
    """
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted]
    wrong = [
        f"{key} is {tuple(tensors[key].shape)} {tensors[key].dtype} and not {tuple(want.shape)} {want.dtype}"
        for key, want in wanted.items()
        if key in tensors
        and (tensors[key].shape != want.shape or tensors[key].is_floating_point() != want.is_floating_point())
    ]
    reports = [("lacks", missing), ("has unknown", extra), ("has another shape or type of", wrong)]
    problems = [f"{what} {len(keys)} tensors (first: {keys[0]})" for what, keys in reports if keys]
    if problems:
        raise UserError(f"{path} does not fit its model: it {' and '.join(problems)}; pass an unchanged checkpoint")


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError, naming the tensor (…), for NaN and Inf: a model with them generates black images."""
    for name, tensor in tensors.items():
        wrong = int((~tensor.float().isfinite()).sum()) if tensor.is_floating_point() else 0
        if wrong:
            raise UserError(
                f"{path} has {wrong} NaN or Inf among the {tensor.numel()} values of {name}, as after training that "
                "diverged; pass another checkpoint"
            )
