"""Checkpoints to models and back: `load_model(path)`, `save_model(model, path)`, `read_header(path)`.

The header of svdit's own files contains the configuration, the specs of quantized layers, and the provenance. For
files of other projects it is inferred from names and shapes. A model is built on the meta device and then assigned
the file's tensors. Missing or extra tensors, other shapes, and integers in place of floats are errors.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from svdit.checkpoints import foreign, io
from svdit.checkpoints.convert import from_diffusers, is_diffusers
from svdit.checkpoints.families import converted
from svdit.checkpoints.folders import DIT, class_of, in_folder
from svdit.checkpoints.infer import config_from_shapes
from svdit.checkpoints.padding import STEP, padded, padded_width
from svdit.checkpoints.quantizer import from_quantizer
from svdit.checkpoints.restore import cache_plan, distinct, naming, restore_, unfolded
from svdit.checkpoints.statistics import MULTIPLIER, beside, latent_statistics, of_batch_norm
from svdit.errors import UserError, check_names, nearest
from svdit.fields import from_json
from svdit.model.dit import DiT, DiTConfig
from svdit.model.zoo import CONFIGS, config_for
from svdit.quant.linear import SVDLinear, layer_specs, unwrapped
from svdit.shims import WithoutNormal
from svdit.storage.filetype import check_regular

EMBEDDED = Path(__file__).parents[1] / "pretrained"
Model = TypeVar("Model", bound=nn.Module)


def save_model(model: DiT, path: str | Path, *, name: str = "", provenance: dict[str, Any] | None = None) -> None:
    """Write a .safetensors or .pt file with a header; `provenance` is JSON-able: where the weights come from."""
    save(model, path, {"name": name, "config": asdict(model.config)}, provenance)


def save_quantized(model: nn.Module, path: str | Path, *, provenance: dict[str, Any] | None = None) -> None:
    """Write the tensors (…) of any module and the specs of its quantized layers, for `load_quantized`.

    Raises UserError for accelerated models, and for other suffixes than .safetensors and .pt.
    """
    model = unwrapped(model)
    config = {"config": asdict(model.config)} if isinstance(model, DiT) else {}
    save(model, path, {"name": type(model).__name__, **config}, provenance)


def save(model: nn.Module, path: str | Path, header: io.Header, provenance: dict[str, Any] | None) -> None:
    """Write a model with its layers' specs. A tensor under several names is stored once; `shared` has the others.

    Raises UserError for a model that is itself a quantized layer.
    """
    if isinstance(model, SVDLinear):
        raise UserError("the model is itself a quantized layer, which has no name; save nn.Sequential(layer)")
    tensors, shared = distinct(model)
    header = {**header, "layers": layer_specs(model), "provenance": provenance or {}}
    if isinstance(model, DiT) and model.class_names:
        header["classes"] = list(model.class_names)
    if isinstance(model, DiT) and model.cache_plan:
        header["caching"] = asdict(model.cache_plan)
    io.write(path, tensors, {**header, "shared": shared} if shared else header)


def load_model(
    path: str | Path,
    /,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    latent_stats: str | Path | None = None,
    mapped: bool = False,
    **overrides: Any,
) -> DiT:
    """A model in eval mode from a file, or an embedded model by its name ("digits"), in fp32 then.

    Supports svdit's own files, published state dicts, checkpoints of the published training scripts (the EMA weights)
    and diffusers' DiT folders. `name` (of `svdit.model.zoo`) and `overrides` (fields of DiTConfig) are checked against
    the file and change nothing, except what no tensor shows, such as `family` or `num_heads`, and whether the last of
    the labels is the null class: with `num_classes` equal to their number it is not. `latent_stats` is a statistics
    file of LightningDiT or REPA-E; by default one beside the checkpoint. `mapped` as in `io.verified`.
    Raises UserError where they differ from the file, and for files that are damaged or do not fit their model.
    """
    path = locate(path)
    with io.verified(path, mapped) as contents:
        contents = from_quantizer(contents, path)
        tensors, config = configured(contents, name, overrides, path, latent_stats)
        header = contents.header
        tensors = converted(tensors, config, path) if header is None else padded(tensors, config)
        model = empty(config, tensors, path)
        check_finite(tensors, path)
        header = header or {}
        restore_(model, tensors, header, path)
        model.class_names, model.cache_plan = class_names(header, config, path), cache_plan(header, config, path)
    if path.parent == EMBEDDED:  # where weights may be stored in half precision, to be small
        model.float()
    return model.to(device).eval()


def load_quantized(model: Model, path: str | Path) -> Model:
    """Load a file of `save_quantized` into a float model of the same architecture, in place, and return the model.

    Its linears are replaced by the file's quantized layers; all other tensors get the file's values and float types.
    Raises UserError, with the model unchanged, for damaged files and where a name, shape or type differs.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"load_quantized got a {type(model).__name__}; pass the model first, then the path")
    path = locate(path)
    with io.verified(path) as contents:
        tensors, header, _ = contents
    if header is None:
        raise UserError(f"{path} was not written by svdit; pass a file of save_quantized or save_model")
    if not isinstance(model, DiT):
        restore_(model, tensors, header, path)
        return model
    check_claims(config_from_header(header, path), asdict(model.config), path)
    names, plan = class_names(header, model.config, path), cache_plan(header, model.config, path)
    restore_(model, tensors, header, path)
    model.class_names, model.cache_plan = names, plan
    return model


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
        hint = nearest(str(path), embedded)
        raise UserError(f"there is no checkpoint {path}; pass a file or one of: {', '.join(embedded) or 'none'}{hint}")
    return path


def configured(
    contents: io.Contents,
    name: str | None,
    overrides: Mapping[str, Any],
    path: Path,
    latent_stats: str | Path | None = None,
) -> tuple[dict[str, Tensor], DiTConfig]:
    """A file's tensors (…) under published names, and the configuration, as `load_model` describes.

    Raises UserError where the configuration stays open, or options contradict it.
    """
    named = named_fields(name)
    if contents.header is None:
        tensors, config = published(contents, {**named, **overrides}, path)
    else:
        tensors, config = contents.tensors, config_from_header(contents.header, path)
        if config.mlp == "swiglu" and config.mlp_width % STEP and not contents.header.get("layers"):
            config = replace(config, mlp_hidden=padded_width(config.mlp_width))
    config = with_statistics(config, contents, path, latent_stats)
    check_claims(config, named, path, f", so it is not {name}")
    check_claims(config, overrides, path)
    return tensors, config


def named_fields(name: str | None) -> dict[str, Any]:
    """The fields of a named model that its files must have; input size, path and prediction may be others.

    Raises UserError for an unknown name.
    """
    if name is None:
        return {}
    config_for(name)
    free = ("input_size", "path", "prediction")
    return {"family": "dit", **{key: value for key, value in CONFIGS[name].items() if key not in free}}


def published(contents: io.Contents, claims: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], DiTConfig]:
    """Tensors (…) of other projects' files under the published names, and the configuration they imply.

    Raises UserError where they are not a model's of a known family, or leave the configuration open.
    """
    tensors, recorded, description = contents.tensors, contents.recorded, path.with_name("config.json")
    is_ours = any(name in tensors for name in foreign.PUBLISHED)
    kind = class_of(description)
    if kind not in ("", DIT) and not (is_ours or is_diffusers(tensors)):
        raise UserError(f"{path} contains a {kind}, not a DiT; pass a published DiT or a {DIT} of diffusers")
    if is_diffusers(tensors):
        if claims.get("family", "dit") != "dit":
            raise UserError(f"{path} is a DiT of diffusers, not of the family {claims['family']}; omit it")
        claims = {"family": "dit", **claims, **diffusers_claims(description)}
        if "input_size" not in claims:
            raise UserError(
                f"{path} has no config.json beside it, which contains its input size; copy it there, or in Python "
                "pass input_size"
            )
        floats = {key: tensor.float() for key, tensor in tensors.items()}
        tensors = from_diffusers(floats, claims["input_size"])
    return tensors, config_from_shapes(tensors, path, claims, recorded)


def with_statistics(config: DiTConfig, contents: io.Contents, path: Path, latent_stats: str | Path | None) -> DiTConfig:
    """The configuration with the statistics of latents: those in the checkpoint, in the given file, or one beside it.

    Raises UserError for a given file with other statistics than the checkpoint's, or for other channels.
    """
    own, recorded, C = (config.latent_mean, config.latent_std), contents.recorded, config.in_channels
    if contents.header is None:
        own = of_batch_norm(contents.tensors, path) or (recorded.get("latent_mean", ()), recorded.get("latent_std", ()))
    multiplier = recorded.get("latent_multiplier", MULTIPLIER if "latent_norm" in recorded else 1.0)
    with naming(path, "latent statistics that it cannot be used with", "pass other --latent-stats"):
        if recorded.get("latent_norm", True) is False:  # LightningDiT's latents, not normalized
            own = (0.0,) * C, (1 / multiplier,) * C
        if latent_stats is not None:
            given = latent_statistics(latent_stats, multiplier)
            if own[1] and given != own:
                raise UserError(f"the checkpoint has others than {latent_stats}")
            own = given
        elif contents.header is None and not own[1] and config.family in ("repa", "lightningdit"):
            own = beside(path, C, multiplier) or own
        return replace(config, latent_mean=own[0], latent_std=own[1])


def diffusers_claims(path: Path) -> dict[str, Any]:
    """Options that only diffusers' config.json has; empty without the file. Raises UserError for bad values."""
    if not path.is_file():
        return {}
    with naming(path, "no usable sample_size and num_attention_heads", "download it again"):
        content = foreign.json_object(path)
        options = {"input_size": content["sample_size"], "num_heads": content["num_attention_heads"]}
        if any(type(value) is not int for value in options.values()):
            raise UserError(f"they are {options}")
        return options


def config_from_header(header: io.Header, path: Path) -> DiTConfig:
    """The configuration in a header. Raises UserError, naming the file, for unusable values."""
    if "config" not in header:
        problem = "a header without a usable configuration: it is not a DiT's"
        raise UserError(f"{path} has {problem}; pass the file of a DiT, or call svdit.load(path, module)")
    with naming(path, "a header without a usable configuration", "save or quantize the model again"):
        return from_json(DiTConfig, unfolded(header["config"], "absorbed"))


def class_names(header: io.Header, config: DiTConfig, path: Path) -> tuple[str, ...]:
    """The names of all classes in a header; empty for models without. Raises UserError, naming the file, for others."""
    names = header.get("classes", [])
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise UserError(f"{path} has class names that are no text; save the model again")
    if len(names) not in (0, config.num_classes):
        raise UserError(f"{path} has {len(names)} class names and {config.num_classes} classes; save the model again")
    return tuple(names)


def empty(config: DiTConfig, tensors: Mapping[str, Tensor], path: Path) -> DiT:
    """A float model on the meta device. Raises UserError for a configuration that cannot be built from tensors (…)."""
    blocks = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    with naming(path, "a configuration that cannot be built", "quantize the model again, or upgrade svdit"):
        if config.depth != blocks:  # before a billion blocks are built
            raise UserError(f"depth is {config.depth}, but there are {blocks} blocks")
        grid = (1, (config.input_size // config.patch_size) ** 2, config.hidden_size)
        if config.rope and tensors["pos_embed"].shape != grid:  # before a table of its size is built
            raise UserError(f"pos_embed is {tuple(tensors['pos_embed'].shape)} and not {grid}")
        context = len(tensors["in_context_posemb"][0]) if config.context_tokens else 0
        if config.context_tokens != context:
            raise UserError(f"context_tokens is {config.context_tokens}, but there are {context}")
        with torch.device("meta"), WithoutNormal():
            return DiT(config)


def check_claims(config: DiTConfig, claims: Mapping[str, Any], path: Path, conclusion: str = "") -> None:
    """Compare the caller's options with the file's configuration. Raises UserError where they differ."""
    check_names("option of a DiT", claims, (field.name for field in fields(DiTConfig)))
    actual = asdict(config)
    wrong = [f"{key} {actual[key]} and not {value}" for key, value in claims.items() if actual[key] != value]
    if wrong:
        raise UserError(f"{path} has {', '.join(wrong)}{conclusion}; pass the options of the file")


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError, naming the tensor (…), for NaN and Inf: a model with them generates black images."""
    for name, tensor in tensors.items():
        wrong = int((~tensor.float().isfinite()).sum()) if tensor.is_floating_point() else 0
        if wrong:
            raise UserError(
                f"{path} has {wrong} NaN or Inf among the {tensor.numel()} values of {name}, as after training that "
                "diverged; pass another checkpoint"
            )
