"""A DiT as a folder of diffusers' DiTTransformer2DModel; quantized layers stay quantized, for svdit's quantizer."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from svdit.checkpoints.convert import specs_to_diffusers, to_diffusers
from svdit.errors import UserError
from svdit.extras import require
from svdit.integrations.diffusers import SvditConfig
from svdit.model.dit import DiT
from svdit.quant.linear import layer_specs

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_folder(model: DiT, folder: Path) -> None:
    """Write config.json and the weights into an empty folder.

    With quantized layers, config.json asks svdit's quantizer for the published timesteps, which diffusers' own class
    does not have; in full precision the folder needs no svdit, and `published_timesteps_` corrects the loaded model.
    Raises UserError for families that diffusers does not have, and without diffusers.
    """
    config = model.config
    if config.family != "dit" or config.prediction != "epsilon" or not config.has_null_class:
        null = "" if config.has_null_class else " without a null class"
        raise UserError(
            f"diffusers has the published DiT only, and this is a {config.family} with prediction {config.prediction}"
            f"{null}; choose --to float"
        )
    diffusers = require("diffusers")
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=model.out_channels,
            num_layers=config.depth,
            sample_size=config.input_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=1e-6,
        )
    if specs := layer_specs(model):
        quantization = SvditConfig(specs_to_diffusers(specs), timesteps="published")
        theirs.register_to_config(quantization_config=quantization)
    theirs.save_config(folder)
    save_file(to_diffusers(model.state_dict()), folder / WEIGHTS, {"format": "pt"})
