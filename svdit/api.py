"""The functions of `import svdit`: load, quantize_, sample, psnr, evaluate, save. docs/api.md has them all.

    model = svdit.load("digits")
    svdit.quantize_(model, "w8a8")
    images = svdit.sample(model, [0, 1, 2], steps=50)
    svdit.save(model, "digits-w8a8.safetensors")

Names and file names are strings, checked before any work. What each function does in detail is decided below, in the
packages it calls.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from svdit.checkpoints.store import load_model, load_quantized, save_model, save_quantized
from svdit.diffusion.samplers import Callback, silent
from svdit.distributed import named_device
from svdit.errors import UserError, check_names
from svdit.evaluation.evaluate import evaluate as compare_sets
from svdit.evaluation.features import FeatureNetwork
from svdit.evaluation.inception import named_extractor
from svdit.evaluation.options import Options
from svdit.evaluation.report import Report
from svdit.images import grid, to_uint8, write_png
from svdit.integrations.rules import rules_for
from svdit.model.autoencoder import Autoencoder, autoencoder_for
from svdit.model.dit import DiT
from svdit.model.zoo import CONFIGS, config_for
from svdit.printing import note
from svdit.quant import quantize
from svdit.quant.budget import Plan, plan_
from svdit.quant.config import QuantConfig, Recipe, Rule, dit_config, recipe_for, skipping
from svdit.quant.linear import unwrapped
from svdit.quant.observe import ForwardLoop
from svdit.quant.report import QuantReport
from svdit.runtime.decoder import with_kernels
from svdit.sampling.batch import default_sampling, generate_decoded, not_followed
from svdit.sampling.calibration import calibration_loop, calibration_size
from svdit.sampling.config import SamplingConfig
from svdit.sampling.fidelity import check_pixels
from svdit.sampling.fidelity import psnr as psnr_of
from svdit.sampling.labels import Labels

Model = TypeVar("Model", bound=nn.Module)
Method = str | Recipe | Mapping[str, str | Recipe | None] | QuantConfig
QUANTIZE = ("work_dir", "run_id", "statistics", "progress")  # options of `quant.quantize.quantize_`
MIN_SIDE = 128  # pixels to which smaller images are enlarged in a grid


@overload
def load(path: str | Path, module: None = None, *, device: str | torch.device = "cpu", **options: Any) -> DiT: ...
@overload
def load(path: str | Path, module: Model, *, device: str | torch.device = "cpu", **options: Any) -> Model: ...
def load(
    path: str | Path, module: nn.Module | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> nn.Module:
    """A DiT from a file, a folder, or one of the models in this package: "digits", "digits-sit", "digits-jit".

    Files of svdit, of the published scripts of DiT, SiT, REPA, LightningDiT and JiT, and of diffusers' DiT; quantized
    or not. `options` are those of `load_model`: `name`, `latent_stats` and fields of the configuration, such as
    `family="sit"` where no tensor shows it.
    With a `module`, a file that `save` wrote of a quantized module is loaded into one of the same architecture in full
    precision, in place, on its own device; there are no options then.
    Raises UserError for a file that is missing or damaged or does not fit, and for options that contradict it.
    """
    if module is None:
        return load_model(path, device=named_device(device), **options)
    if options:
        raise UserError(f"{', '.join(options)} are options of a DiT, but the file is loaded into a module; omit them")
    load_quantized(unwrapped(module), path)
    return module


def save(model: nn.Module, path: str | Path, *, name: str = "", provenance: dict[str, Any] | None = None) -> None:
    """Write a DiT, which `load` builds again, or any module, for `load(path, module)`; .safetensors or .pt.

    `name` of a DiT: that of its configuration, "DiT-XL/2" for example, if it has one. `provenance`: where the weights
    come from, any JSON.
    Raises UserError for accelerated models, which can only run, and for other suffixes.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"save got a {type(model).__name__}; pass the model first, then the path")
    model = unwrapped(model)
    if not isinstance(model, DiT):
        return save_quantized(model, path, provenance=provenance)
    name = name or next((known for known in CONFIGS if config_for(known) == model.config), "")
    return save_model(model, path, name=name, provenance=provenance)


def quantize_(
    model: nn.Module,
    config: Method = "w8a8",
    forward_loop: ForwardLoop | Iterable[Any] | None = None,
    *,
    skip: str | Sequence[str] = (),
    target_size: float | None = None,
    target_sqnr: float | None = None,
    max_memory: float = 8e9,
    **options: Any,
) -> QuantReport:
    """Replace the linear layers of `model` by quantized ones, in place. The report has every layer's size and error.

    `config`: a preset; a recipe, as `recipe_for("w4a8", rank=8)` returns it; or both by patterns of layer names,
    `{"head": None, "*.mlp.*": "w4a8", "*": "w8a8"}`, of which the first that matches applies; None keeps the layer. In
    a DiT, and in transformers of diffusers (docs/diffusers.md), a preset or recipe is for the blocks: adaLN is
    weight-only, the embedders and the last layer are kept. In other modules it is for every linear layer, so skip those
    that should stay.
    `forward_loop`: a function that runs the model on typical inputs, the same at every call, or a list of batches: a
    tensor, a tuple of arguments, or a dict of keyword arguments each. A DiT needs none: it is calibrated on its own
    sampling steps.
    `skip`: patterns of layers to keep. `target_size` in MB, or `target_sqnr` in dB of the model's output as predicted:
    choose bits and rank of each layer for it. `max_memory`: bytes of calibration statistics held at once. `options`:
    the others of `svdit.quant.quantize.quantize_`: `work_dir`, `run_id`, `statistics`, `progress`.
    Raises UserError for unknown names, patterns that match nothing, inputs that do not reach a layer, and targets out
    of reach.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"quantize_ got a {type(model).__name__}; pass a Module first")
    if belongs := next((name for name in options if name in {field.name for field in fields(Recipe)}), None):
        raise UserError(f'{belongs} is part of a recipe; pass recipe_for("w8a8", {belongs}=…), for example, as config')
    check_names("option", options, QUANTIZE)
    model = unwrapped(model)
    config, loop = _rules(model, config, skip), _loop(model, forward_loop)
    if target_size is not None or target_sqnr is not None:
        plan = _plan(model, config, loop, target_size, target_sqnr, max_memory)
        config, options["statistics"] = plan.config, plan.statistics
    report = quantize.quantize_(model, config, loop, max_memory=max_memory, **options)
    if isinstance(model, DiT) and model.cache_plan:
        note("the cache plan is omitted: it is for full precision; run `svdit cache` on the quantized model")
        model.cache_plan = None
    return report


def sample(
    model: DiT,
    labels: Labels,
    *,
    steps: int | str | None = None,
    sampler: str | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    vae: str | Autoencoder = "auto",
    callback: Callback = silent,
    **settings: Any,
) -> Tensor:
    """One image for each class, by number or name: float32 (N, C, H, W) in [-1, 1], with the model's 1 or 3 channels.

    Without options as the script of the model's family samples: DDPM in 250 steps with guidance 4 for a DiT, SDE for a
    SiT, Heun for a JiT. `settings`: the other fields of `SamplingConfig`. The noise of image i depends on (seed, i)
    alone, so two models with the same seed and labels can be compared by `psnr`. `callback(done, x)` is called after
    each sampling step with the images or latents x so far.
    Latents are decoded by `vae`: "auto" (Stable Diffusion's), "ema", "mse", a folder, a repository of Hugging Face, or
    what `load_autoencoder` returned. `generate` returns them as they are, and `generate_dataset` samples many images.
    Raises UserError for classes, samplers and settings that the model does not have.
    """
    if not isinstance(model, DiT):
        raise UserError(
            f"sample got a {type(model).__name__}; pass a DiT, as svdit.load returns it; model.compile() compiles it"
        )
    check_names("setting", settings, (field.name for field in fields(SamplingConfig)))
    named = {"steps": steps, "sampler": sampler, "cfg_scale": cfg_scale}
    chosen = {name: value for name, value in named.items() if value is not None}
    config = default_sampling(model.config, **settings, **chosen)
    config.schedule(model.config)  # raises before an autoencoder is loaded
    if reason := not_followed(model, config):
        note(reason)
    decoder = vae if isinstance(vae, Autoencoder) else autoencoder_for(model.config, vae, model.pos_embed.device)
    return generate_decoded(model, labels, config, with_kernels(decoder), seed=seed, callback=callback).clamp(-1, 1)


def save_image(images: Tensor, path: str | Path, *, columns: int = 4) -> None:
    """Write images (N, C, H, W) in [-1, 1] as one PNG with so many columns; small ones are enlarged.

    Raises UserError for tensors of other shapes, for pixels from 0 to 255, and for other suffixes.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise UserError(f"the images have the shape {tuple(images.shape)}; pass (N, C, H, W) with 1 or 3 channels")
    if Path(path).suffix.lower() != ".png" or columns < 1:
        raise UserError(f"cannot write {path} with {columns} columns; choose a name that ends in .png and 1 or more")
    check_pixels(images)
    scale = max(1, MIN_SIDE // images.shape[2])
    write_png(path, grid(to_uint8(images), min(columns, len(images)), scale=scale))


def psnr(images: Tensor, reference: Tensor) -> float:
    """PSNR in dB of images (N, C, H, W) in [-1, 1] to others from the same noise: the mean over images.

    At most 100 dB, of equal images. Pixels are not rounded to 8 bits, as they are in files that `evaluate` compares.
    Raises UserError for images of another shape, and for pixels from 0 to 255.
    """
    if images.shape != reference.shape or images.ndim != 4 or not len(images):
        raise UserError(
            f"the images have the shapes {tuple(images.shape)} and {tuple(reference.shape)}; pass equal ones, "
            "(N, C, H, W)"
        )
    check_pixels(images, reference)
    difference = images.clamp(-1, 1).double().cpu() - reference.clamp(-1, 1).double().cpu()
    return psnr_of(difference.square().flatten(1).mean(1)).psnr


def evaluate(
    real: str | Path | None,
    fake: str | Path,
    features: str | FeatureNetwork | None = "inception",
    options: Options | None = None,
    *,
    metrics: str | Sequence[str] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    **chosen: Any,
) -> Report:
    """Compare generated images with real ones, or their statistics: folders, .npz or .tar files.

    `features`: "inception", FID's network, whose `weights` are a file or found as docs/evaluation.md says; "random",
    the same with random weights: offline, comparable with its own numbers only; or another network. `metrics`: names,
    or "fid,kid"; by default all that the inputs allow. `chosen`: fields of `Options`, such as `paired`, the
    full-precision counterparts of `fake` for PSNR, SSIM and relative L2, or `num_images`.
    The report has `metrics["fid"].value` and `.se`, `text()`, and `save(folder)`.
    Raises UserError for unknown names and unusable inputs.
    """
    if metrics is not None:
        chosen["metrics"] = tuple(metrics.split(",") if isinstance(metrics, str) else metrics)
    elif real is None:
        chosen["metrics"] = ("paired",)
    if chosen.get("cache"):
        chosen["cache"] = Path(chosen["cache"]).expanduser()
    if device is not None:
        chosen["device"] = named_device(device)
    check_names("option", chosen, (field.name for field in fields(Options)))
    options = replace(options or Options(), **chosen)
    if isinstance(features, str):
        features = named_extractor(features, weights, options.cache) if options.network_metrics else None
    return compare_sets(real, fake, features, options)


def _rules(model: nn.Module, config: Method, skip: str | Sequence[str]) -> QuantConfig:
    """What to do with which layer."""
    kept = skipping((skip,) if isinstance(skip, str) else tuple(skip))
    if isinstance(config, QuantConfig):
        return QuantConfig((*kept, *config.rules))
    if isinstance(config, Mapping):
        recipes = {pattern: None if each is None else _recipe(each) for pattern, each in config.items()}
        return QuantConfig((*kept, *(Rule(pattern, recipe) for pattern, recipe in recipes.items())))
    if any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__):
        return QuantConfig((*kept, *rules_for(model, config).rules))
    if not isinstance(model, DiT):
        return QuantConfig((*kept, Rule("*", _recipe(config))))
    last_block = model.config.depth - 1 if model.config.prediction == "x0" else None
    return QuantConfig((*kept, *dit_config(_recipe(config), last_block=last_block).rules))


def _recipe(preset: str | Recipe) -> Recipe:
    return preset if isinstance(preset, Recipe) else recipe_for(preset)


def _loop(model: nn.Module, loop: ForwardLoop | Iterable[Any] | None) -> ForwardLoop | None:
    """The function that calibration runs."""
    if loop is None and isinstance(model, DiT):
        images, steps = calibration_size(model)
        return calibration_loop(images=images, steps=steps, cfg_scale=None if model.config.has_null_class else 1.0)
    if loop is None or callable(loop):
        return loop
    batches = [loop] if isinstance(loop, Tensor | Mapping) else loop
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator | str):
        raise UserError(f"forward_loop is a {type(loop).__name__}; pass a function of the model, or a list of batches")
    return lambda model: [_call(model, batch) for batch in batches]


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _plan(
    model: nn.Module,
    config: QuantConfig,
    loop: ForwardLoop | None,
    size: float | None,
    sqnr: float | None,
    max_memory: float,
) -> Plan:
    """The configuration for a target."""
    if size is not None and sqnr is not None:
        raise UserError(f"target_size is {size} and target_sqnr {sqnr}; pass one of them")
    if loop is None:
        raise UserError("a target needs calibration; pass a forward loop to quantize_")
    for rule in config.rules:
        weight = rule.recipe and rule.recipe.weight
        if weight and weight.element != "int":
            raise UserError(f"a target chooses bits of integers, but {rule.pattern} has {weight} weights; choose w4a8")
    target = None if size is None else round(size * 1e6)
    return plan_(model, config, loop, target_bytes=target, target_sqnr=sqnr, max_memory=max_memory)
