"""Checkpoints to models and back: `load_model(path)`, `save_model(model, path)`, `read_header(path)`.

Our own files describe themselves (configuration, quantized layers, provenance); the published ones are recognised by
their shapes. A model is built without memory (meta device) and takes the file's tensors over, strictly: a name, a
shape or a kind of number that does not fit is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdit.checkpoints import io
from svdit.checkpoints.convert import from_diffusers, is_diffusers
from svdit.checkpoints.infer import config_from_shapes
from svdit.errors import UserError
from svdit.model.dit import DiT, DiTConfig
from svdit.model.zoo import CONFIGS, config_for
from svdit.quant.linear import layer_specs, rebuild_

DIFFUSERS = "diffusion_pytorch_model"
EMBEDDED = Path(__file__).parents[1] / "pretrained"


def save_model(model: DiT, path: str | Path, *, name: str = "", provenance: dict[str, Any] | None = None) -> None:
    """Write a self-describing .safetensors or .pt; `provenance` is any JSON: where the weights come from."""
    header = {"name": name, "config": asdict(model.config), "layers": layer_specs(model)}
    io.write(path, model.state_dict(), {**header, "provenance": provenance or {}})


def load_model(
    path: str | Path, *, name: str | None = None, device: str | torch.device = "cpu", **overrides: Any
) -> DiT:
    """A DiT in eval mode from a file, or an embedded model by its name ("digits").

    Reads our own files, bare published state dicts, the published training script's checkpoints (its `ema` wins) and
    diffusers' DiT folders.
    `name` (of `svdit.model.zoo`) and `overrides` (fields of DiTConfig) are checked against the file, never imposed;
    only `num_heads`, which no shape shows, can be needed. Raises UserError where they differ or the file is unsound.
    """
    path = locate(path)
    tensors, header = io.read(path)
    claims = {**CONFIGS.get(name or "", {}), **overrides}
    if header is None:
        tensors, config = published(tensors, claims, path)
    else:
        config = config_from_header(header, path)
    check_claims(config, name, claims, path)
    model = empty(config, header or {}, path)
    check_fit(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device).eval()


def read_header(path: str | Path) -> io.Header | None:
    """What one of our own files says about itself; None for the published formats. Reads no tensors."""
    return io.read_header(locate(path))


def embedded_models() -> dict[str, Path]:
    """The models inside this package, by name."""
    return {file.stem: file for file in sorted(EMBEDDED.glob("*.safetensors"))}


def locate(path: str | Path) -> Path:
    """The file meant by `path`, also in diffusers' folder; embedded names win over files (write ./name for those)."""
    embedded = embedded_models()
    if str(path) in embedded:
        return embedded[str(path)]
    path = Path(path)
    if path.is_dir():
        names = [f"{part}{DIFFUSERS}{suffix}" for part in ("", "transformer/") for suffix in (".safetensors", ".bin")]
        if not (found := [path / name for name in names if (path / name).is_file()]):
            raise UserError(f"the folder {path} has no {DIFFUSERS}.safetensors or .bin; give a checkpoint file")
        return found[0]
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give a file or one of: {', '.join(embedded) or 'none'}")
    return path


def published(tensors: Mapping[str, Tensor], claims: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], DiTConfig]:
    """A state dict of others, in float32 and under the published names, and the configuration its shapes imply."""
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    if is_diffusers(tensors):
        claims = {**claims, **diffusers_claims(path.with_name("config.json"))}
        if "input_size" not in claims:
            raise UserError(f"{path} has no config.json beside it to tell the size of its inputs; give input_size")
        tensors = from_diffusers(tensors, claims["input_size"])
    return tensors, config_from_shapes(tensors, path, claims.get("num_heads"))


def diffusers_claims(path: Path) -> dict[str, Any]:
    """What diffusers' config.json says that no shape shows; nothing where there is none."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    return {"input_size": content["sample_size"], "num_heads": content["num_attention_heads"]}


def config_from_header(header: io.Header, path: Path) -> DiTConfig:
    try:
        return DiTConfig(**header["config"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has a header without a usable configuration ({error}); save the model again") from None


def empty(config: DiTConfig, header: io.Header, path: Path) -> DiT:
    """The model without memory, its quantized layers in place."""
    with torch.device("meta"):
        model = DiT(config)
        try:
            rebuild_(model, header.get("layers", {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} describes a quantized layer this cannot build ({error}); upgrade svdit") from None
    return model


def check_claims(config: DiTConfig, name: str | None, claims: Mapping[str, Any], path: Path) -> None:
    """What the caller says about the model must be so in the file."""
    if name is not None:
        config_for(name)
    if unknown := set(claims) - {field.name for field in fields(DiTConfig)}:
        raise TypeError(f"DiT has no option {', '.join(sorted(unknown))}")
    found = asdict(config)
    wrong = [f"{key} {found[key]} and not {value}" for key, value in claims.items() if found[key] != value]
    if wrong:
        asked = f", so it is no {name}" if name else ""
        raise UserError(f"{path} has {', '.join(wrong)}{asked}; ask for what the file holds")


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """The file's tensors must be the model's: all of them, no more, same shapes, floats for floats."""
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted]
    wrong = [
        f"{key} is {tuple(tensors[key].shape)} {tensors[key].dtype} and not {tuple(want.shape)} {want.dtype}"
        for key, want in wanted.items()
        if key in tensors
        and (tensors[key].shape != want.shape or tensors[key].is_floating_point() != want.is_floating_point())
    ]
    reports = [("lacks", missing), ("has no place for", extra), ("has another shape or type of", wrong)]
    problems = [f"{what} {len(keys)} of its tensors (first: {keys[0]})" for what, keys in reports if keys]
    if problems:
        raise UserError(f"{path} does not fit its model: it {' and '.join(problems)}; give an unchanged checkpoint")
