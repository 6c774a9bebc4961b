"""What `svdit app` shows: images of one class in full precision and quantized, from the same noise."""

import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdit.checkpoints.store import load_model
from svdit.diffusion.samplers import Callback, silent
from svdit.errors import UserError
from svdit.images import Pixels, grid, to_uint8
from svdit.model.autoencoder import Autoencoder, autoencoder_for
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.linear import quantized_layers
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.runtime.decoder import with_kernels
from svdit.sampling.batch import SamplingConfig, default_sampling, generate_decoded
from svdit.sampling.calibration import calibration_loop, calibration_sampling, calibration_size
from svdit.sampling.fidelity import psnr

IMAGES, COLUMNS, SIDE = 4, 2, 128  # side: pixels to which smaller images are enlarged


class Drawn(NamedTuple):
    """Images (H, W, 3) of a model as one, the seconds they took, and the bytes of its weights in memory."""

    pixels: Pixels
    seconds: float
    nbytes: int


class Comparison(NamedTuple):
    """The images of both models, and the PSNR in dB of the second's to the first's."""

    original: Drawn
    quantized: Drawn
    psnr: float


def compare(
    path: Path, preset: str, label: int, seed: int, steps: int, device: torch.device, callback: Callback = silent
) -> Comparison:
    """Sample IMAGES images of a class with both models; `callback(done, x)` is called after each of 2 × `steps` steps.

    A preset is calibrated when it is first used, on the model's own sampling steps. Raises UserError for a file that
    is already quantized, and for settings that the model does not have.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed is {seed}; choose an integer from 0 to 2^63 - 1")
    original, quantized = full(path, device), fast(path, preset, device)
    config, vae = sampling(original, steps), decoder_of(original)
    first, target = draw(original, label, seed, config, vae, callback)
    second, images = draw(quantized, label, seed, config, vae, lambda done, x: callback(steps + done, x))
    return Comparison(first, second, psnr((images - target).square().flatten(1).mean(1)).psnr)


def draw(
    model: DiT, label: int, seed: int, config: SamplingConfig, vae: Autoencoder, callback: Callback
) -> tuple[Drawn, Tensor]:
    """What is shown of a model, and its images (N, C, H, W) in [-1, 1]."""
    start = time.perf_counter()
    images = generate_decoded(model, [label] * IMAGES, config, vae, seed=seed, callback=callback).clamp(-1, 1).cpu()
    seconds = time.perf_counter() - start
    pixels = grid(to_uint8(images, model.config.uint8), COLUMNS, scale=max(1, SIDE // images.shape[2]))
    return Drawn(pixels, seconds, nbytes(model)), images.double()


def classes(path: Path, device: torch.device) -> list[str]:
    """The names of a model's classes, or their numbers. Raises UserError as `full`."""
    model = full(path, device)
    return list(model.class_names or map(str, range(model.config.num_classes)))


def sampling(model: DiT, steps: int) -> SamplingConfig:
    """DDIM with the guidance of calibration for a DiT, Heun for a flow. Raises UserError for steps out of range."""
    scale = guidance(model)
    if model.config.is_flow:
        return default_sampling(model.config, sampler="heun", steps=str(steps), cfg_scale=scale)
    return SamplingConfig("ddim", str(steps), scale)


def guidance(model: DiT) -> float:
    """The guidance scale that a model is calibrated with; 1 where it has no null class."""
    return calibration_sampling(model.config, 1).cfg_scale if model.config.has_null_class else 1.0


@lru_cache(maxsize=1)
def full(path: Path, device: torch.device) -> DiT:
    """The model of a file, called once. Raises UserError for a quantized one."""
    model = load_model(path, device=device)
    if quantized_layers(model):
        raise UserError(f"{path} is already quantized; pass the checkpoint that it was made from")
    model.cache_plan = None  # both models run all blocks
    return warmed(model)


@lru_cache(maxsize=3)
def fast(path: Path, preset: str, device: torch.device) -> DiT:
    """The same model, quantized and accelerated, called once. Raises UserError for an unknown preset."""
    recipe, model = recipe_for(preset), load_model(path, device=device)
    model.cache_plan = None
    images, steps = calibration_size(model)
    last_block = model.config.depth - 1 if model.config.prediction == "x0" else None
    loop = calibration_loop(images=images, steps=steps, cfg_scale=guidance(model))
    quantize_(model, dit_config(recipe, last_block=last_block), loop)
    return warmed(accelerate(model))


def warmed(model: DiT) -> DiT:
    """The model after the first call, in which torch allocates memory and kernels choose instructions."""
    generate_decoded(model, [0] * IMAGES, sampling(model, 2), decoder_of(model))
    return model


def decoder_of(model: DiT) -> Autoencoder:
    """The default autoencoder of a model. Raises UserError as `autoencoder_for`."""
    return with_kernels(autoencoder_for(model.config, device=model.pos_embed.device))


def nbytes(model: nn.Module) -> int:
    """The bytes of a model's tensors."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
