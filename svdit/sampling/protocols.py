"""The published ways to sample 50,000 images for an FID, by name; docs/protocols.md has the figures and the sources.

A protocol fixes what changes the number: sampler, steps, guidance, labels, autoencoder, and the file with the real
images' statistics. The rule for uint8 and the latent statistics are the model's own, see `DiTConfig`.
"""

from dataclasses import dataclass, field
from typing import Any

from svdit.model.config import DiTConfig

ADM = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
JIT = {256: "jit_in256_stats.npz", 512: "jit_in512_stats.npz"}
JIT_SCALES = {  # width and image size of JiT-B, -L and -H: guidance scale
    (768, 256): 3.0, (1024, 256): 2.4, (1280, 256): 2.2,
    (768, 512): 3.0, (1024, 512): 2.5, (1280, 512): 2.3,
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """Fields of SamplingConfig, and what surrounds sampling.

    `scales`: guidance scales by width and image size, where they differ. `vae` None: no repository has it in
    diffusers' layout. `references`: the file to compare with, by image size.
    """

    family: str
    sampling: dict[str, Any]
    scales: dict[tuple[int, int], float] = field(default_factory=dict)
    vae: str | None = "ema"
    label_policy: str = "random"
    references: dict[int, str] = field(default_factory=lambda: ADM)

    def options(self, config: DiTConfig, size: int | None) -> dict[str, Any]:
        """The fields of SamplingConfig for a model that generates size × size images; without a scale if unknown."""
        scale = self.scales.get((config.hidden_size, size or 0))
        return self.sampling if scale is None else {**self.sampling, "cfg_scale": scale}


SDE = {"sampler": "sde", "steps": "250", "sde_form": "sigma", "last_step": "mean", "last_step_size": 0.04}
LINEAR = {**SDE, "sde_form": "linear"}  # the same on a linear path
EULER = {"sampler": "euler", "steps": "250", "time_shift": 0.3, "cfg_channels": 3}
PROTOCOLS: dict[str, Protocol] = {
    "dit-250": Protocol("dit", {"sampler": "ddpm", "steps": "250", "cfg_scale": 1.5, "cfg_channels": 3}),
    "sit-sde-250": Protocol("sit", {**SDE, "cfg_scale": 1.5, "cfg_channels": 3}),
    "sit-ode-250": Protocol("sit", {"sampler": "dopri5", "steps": "250", "cfg_scale": 1.5, "cfg_channels": 3}),
    "repa-sde-250": Protocol("repa", {**LINEAR, "cfg_scale": 1.8, "cfg_channels": None, "cfg_interval": (0.0, 0.7)}),
    "repae-sde-250": Protocol(
        "repa",
        {**LINEAR, "cfg_scale": 2.4, "cfg_channels": None, "cfg_interval": (0.0, 0.73)},
        vae="REPA-E/e2e-vavae-hf",
        label_policy="balanced",
    ),
    "lightningdit-250": Protocol("lightningdit", {**EULER, "cfg_scale": 6.7, "cfg_interval": (0.125, 1.0)}, vae=None),
    "lightningdit-64ep-250": Protocol(
        "lightningdit", {**EULER, "cfg_scale": 10.0, "cfg_interval": (0.1, 1.0)}, vae=None
    ),
    "jit-heun-50": Protocol(
        "jit",
        {"sampler": "heun", "steps": "50", "cfg_channels": None, "cfg_interval": (0.1, 1.0)},
        scales=JIT_SCALES,
        vae="none",
        label_policy="balanced",
        references=JIT,
    ),
}
