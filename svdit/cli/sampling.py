"""Options of `sample` and `generate`: how images are sampled and decoded.

An option that is not passed has the value of --protocol, else the default of the script of the model's family.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svdit.cli.arguments import above_0, keys, number, path, ratio, scale
from svdit.cli.setup import image_size
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    import torch

    from svdit.model.autoencoder import Autoencoder
    from svdit.model.config import DiTConfig
    from svdit.model.dit import DiT
    from svdit.sampling.batch import SamplingConfig
    from svdit.sampling.protocols import Protocol

CFG_CHANNELS = {"three": 3, "all": None}
OF_SDE, GUIDANCE = ("sde_form", "sde_norm", "last_step", "last_step_size"), ("cfg_channels", "cfg_interval")
FIELDS = {  # of SamplingConfig, by option
    "num_sampling_steps": "steps",
    **{name: name for name in ("sampler", "time_shift", "cfg_scale", *OF_SDE, *GUIDANCE)},
}


class Settings(NamedTuple):
    """What the options amount to for one model; `record` has the fields of the manifest about the protocol."""

    config: SamplingConfig
    vae: str
    label_policy: str
    record: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """All of them, as in the manifest."""
        return {**asdict(self.config), "vae": self.vae, "label_policy": self.label_policy}


def add_sampling(parser: argparse.ArgumentParser, cfg_scale: float, vae: str) -> None:
    """Those of `add_steps`, --vae, --no-cache"""
    add = add_steps(parser, cfg_scale).add_argument
    add(
        "--vae",
        type=path,
        metavar="NAME",
        help="ema, mse, a local folder, a repository of Hugging Face, or none for pixel-space models; default for the "
        f"latents of Stable Diffusion: {vae}",
    )
    add("--no-cache", action="store_true", help="do not follow the checkpoint's plan of `svdit cache`")


def add_steps(parser: argparse.ArgumentParser, cfg_scale: float) -> argparse._ArgumentGroup:
    """--protocol, --sampler, --num-sampling-steps, the options of flows and of guidance"""
    group = parser.add_argument_group("sampling", "defaults are those of --protocol, else of the family's script")
    add = group.add_argument
    add(
        "--protocol",
        choices=keys("sampling/protocols.py", "PROTOCOLS"),
        help="the settings of a published FID, see docs/protocols.md; other options override it",
    )
    samplers = [*keys("diffusion/samplers.py", "SAMPLERS"), *keys("diffusion/flow_samplers.py", "FLOW_SAMPLERS")]
    add("--sampler", choices=samplers, help="default for DiT: ddpm")
    spacing = "250, or as DDIM spaces them, with any sampler, ddim50; default for DiT: 250"
    add("--num-sampling-steps", metavar="STEPS", help=spacing)
    add_flow(group)
    add(
        "--cfg-scale",
        type=scale,
        metavar="SCALE",
        help=f"classifier-free guidance scale, 1 turns guidance off; default for DiT: {cfg_scale}",
    )
    add("--cfg-channels", choices=CFG_CHANNELS, help="channels to guide; default for DiT, as published: three")
    add(
        "--cfg-interval",
        nargs=2,
        type=number("from 0 to 999", lambda t: 0 <= t <= 999),
        metavar=("FIRST", "LAST"),
        help="apply guidance only from FIRST to LAST, which is faster: timesteps of a DiT (0 to 999), else times from "
        "0 to 1; default for DiT: at all timesteps",
    )
    return group


def add_flow(group: argparse._ArgumentGroup) -> None:
    """--time-shift, --sde-form, --sde-norm, --last-step, --last-step-size"""
    add = group.add_argument
    add("--time-shift", type=above_0, metavar="A", help="of LightningDiT: t to At / (1 + (A - 1)t); 1: none")
    add("--sde-form", choices=keys("diffusion/sde.py", "FORMS"), help="diffusion of --sampler sde over time")
    add("--sde-norm", type=above_0, metavar="NORM", help="factor of the diffusion")
    add("--last-step", choices=keys("diffusion/sde.py", "LAST_STEPS"), help="of --sampler sde, without noise")
    add("--last-step-size", type=ratio, metavar="SIZE", help="as time, 0.04 for example")


def settings(args: argparse.Namespace, model: DiT, cfg_scale: float) -> Settings:
    """What the options of `add_sampling` mean for a model; `cfg_scale`: the default for DiT.

    Raises UserError for settings that cannot be sampled with, and a protocol of another family.
    """
    from svdit.sampling.batch import default_sampling

    protocol, options, size = find_protocol(args, model.config), passed(args, model.config), image_size(model)
    base = {"cfg_scale": cfg_scale} if model.config.family == "dit" else {}
    base |= protocol.options(model.config, size) if protocol else {}
    config, policy = default_sampling(model.config, **{**base, **options}), getattr(args, "label_policy", None)
    config.schedule(model.config)  # raises for a sampler of other models
    for sentence in unused(config, options, model.config):
        note(sentence)
    if protocol is None:
        return Settings(config, args.vae or "auto", policy or "random", {})
    if "cfg_scale" not in {**base, **options}:
        raise UserError(
            f"--protocol {args.protocol} has no guidance scale for a model of width {model.config.hidden_size} and "
            f"{size} pixels; pass --cfg-scale"
        )
    vae = args.vae or protocol.vae or "auto"
    expected = Settings(default_sampling(model.config, **base), protocol.vae or vae, protocol.label_policy, {}).fields()
    chosen = Settings(config, vae, policy or protocol.label_policy, {})
    overrides = {name: value for name, value in chosen.fields().items() if value != expected[name]}
    reference = protocol.references.get(size or 0)
    return chosen._replace(record={"protocol": args.protocol, "overrides": overrides, "reference": reference})


def caching(args: argparse.Namespace, model: DiT, config: SamplingConfig) -> dict[str, Any] | None:
    """The cache plan to follow, as in the manifest; one that is not for these settings is removed from the model."""
    from svdit.sampling.batch import not_followed
    from svdit.sampling.dataset import caching as record

    if args.no_cache:
        model.cache_plan = None
    if reason := not_followed(model, config):
        note(reason)
        model.cache_plan = None
    return record(model, config)


def unused(config: SamplingConfig, options: Iterable[str], model: DiTConfig) -> Iterator[str]:
    """A sentence for every field among `options` that changes no image of a model."""
    from svdit.diffusion.samplers import SAMPLERS

    scale, names = config.scale(model), {field: option for option, field in FIELDS.items()}
    reasons = dict.fromkeys(GUIDANCE, "the guidance scale is 1") if scale == 1 else {}
    if scale != config.cfg_scale:
        reasons["cfg_scale"] = f"the family {model.family} is guided by scales above {scale:g} only"
    if config.sampler == "dopri5":
        reasons["steps"] = "dopri5 chooses its own steps"
    if not config.sampler.startswith("sde"):
        reasons |= dict.fromkeys(OF_SDE, f"the sampler is {config.sampler}")
    if config.sampler in SAMPLERS:
        reasons["time_shift"] = f"the sampler is {config.sampler}"
    if config.last_step == "none":
        reasons["last_step_size"] = "there is no last step"
    yield from (f"--{names[x].replace('_', '-')} has no effect: {reasons[x]}" for x in options if x in reasons)


def find_protocol(args: argparse.Namespace, config: DiTConfig) -> Protocol | None:
    """That of --protocol. Raises UserError for one of another family than the model's."""
    from svdit.sampling.protocols import PROTOCOLS

    if args.protocol is None:
        return None
    protocol = PROTOCOLS[args.protocol]
    if protocol.family != config.family:
        names = ", ".join(name for name, other in PROTOCOLS.items() if other.family == config.family)
        raise UserError(
            f"--protocol {args.protocol} is for the family {protocol.family}, but the model's is {config.family}; "
            f"choose from {names}"
        )
    return protocol


def passed(args: argparse.Namespace, config: DiTConfig) -> dict[str, Any]:
    """The fields of SamplingConfig that options set. Raises UserError for a DiT's interval between timesteps."""
    values = {field: getattr(args, option) for option, field in FIELDS.items() if getattr(args, option) is not None}
    if args.cfg_channels:
        values["cfg_channels"] = CFG_CHANNELS[args.cfg_channels]
    if args.cfg_interval:
        first, last = args.cfg_interval
        if not config.is_flow and not (first.is_integer() and last.is_integer()):
            raise UserError(f"--cfg-interval is {first:g} {last:g}; a DiT has timesteps, choose integers")
        values["cfg_interval"] = (first, last) if config.is_flow else (int(first), int(last))
    return values


def load_vae(name: str, model: DiT, device: torch.device, default: str, checkpoint: Path | None = None) -> Autoencoder:
    """The autoencoder for `model`: for "auto" that of the pipeline of `checkpoint`, if it has one, or `default`.

    Raises UserError as `autoencoder_for`.
    """
    from svdit.checkpoints.folders import vae_beside
    from svdit.model.autoencoder import autoencoder_for
    from svdit.runtime.decoder import with_kernels

    own = vae_beside(checkpoint) if checkpoint and name == "auto" else None
    return with_kernels(autoencoder_for(model.config, name, device, default=default, own=own))
