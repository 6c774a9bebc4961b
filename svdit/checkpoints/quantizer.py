"""A DiT that diffusers saved with svdit's quantizer, as if svdit had saved it: `svdit.integrations.diffusers`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from svdit.checkpoints import foreign, io
from svdit.checkpoints.convert import from_diffusers, is_diffusers, specs_from_diffusers
from svdit.checkpoints.restore import naming
from svdit.errors import UserError
from svdit.model.config import DiTConfig
from svdit.printing import note


def from_quantizer(contents: io.Contents, path: Path) -> io.Contents:
    """The contents with published names and a header; other contents as they are.

    Raises UserError where config.json does not describe the tensors, and for other quantizers.
    """
    method, description = foreign.quantization(path), path.with_name("config.json")
    if contents.header is not None or method is None or not is_diffusers(contents.tensors):
        return contents
    with naming(description, "an unusable configuration", "load the folder with diffusers, or copy it again"):
        fields = foreign.json_object(description)
        if not isinstance(method, dict) or method.get("quant_method") != "svdit":
            raise UserError("its quantization_config is not of svdit")
        layers = method["layers"]
        inside = tuple(f"{name}." for name in layers)
        tensors = {k: x if k.startswith(inside) else x.float() for k, x in contents.tensors.items()}
        tensors = from_diffusers(tensors, fields["sample_size"])
        config, specs = config_of(fields), specs_from_diffusers(layers)
    if method.get("timesteps") != "published":
        note("diffusers spaces the timestep frequencies of this DiT by 1/127; here they are the published ones")
    return io.Contents(tensors, {"format_version": io.FORMAT_VERSION, "config": asdict(config), "layers": specs}, {})


def config_of(fields: dict[str, Any]) -> DiTConfig:
    """The configuration in diffusers' config.json. Raises KeyError and UserError for others than a DiT's."""
    channels = fields["in_channels"]
    return DiTConfig(
        input_size=fields["sample_size"],
        patch_size=fields["patch_size"],
        in_channels=channels,
        hidden_size=fields["num_attention_heads"] * fields["attention_head_dim"],
        depth=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        num_classes=fields["num_embeds_ada_norm"],
        learn_sigma=fields["out_channels"] == 2 * channels,
    )
