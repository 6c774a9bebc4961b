"""The named configurations: those of the papers, and those of the models in this package."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from svdit.errors import check_names, unknown
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT

SIZES: dict[str, dict[str, Any]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}
LARGER: dict[str, dict[str, Any]] = {
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}
JIT: dict[str, dict[str, Any]] = {
    "B": {**SIZES["B"], "context_start": 4, "bottleneck": 128},
    "L": {**SIZES["L"], "context_start": 8, "bottleneck": 128},
    "H": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "context_start": 10, "bottleneck": 256},
}
F16D32 = {"in_channels": 32, "input_size": 16}  # latents of VA-VAE and of REPA-E's autoencoder, 16 times smaller
DIGITS = {
    "depth": 6,
    "hidden_size": 128,
    "num_heads": 4,
    "patch_size": 2,
    "input_size": 8,
    "in_channels": 1,
    "num_classes": 10,
}
CIFAR10 = {**DIGITS, "depth": 8, "hidden_size": 256, "patch_size": 4, "input_size": 32, "in_channels": 3}


def named(prefix: str, family: str, sizes: dict[str, dict[str, Any]], patches: tuple[int, ...], **others: Any) -> Any:
    """The configurations PREFIX-SIZE/PATCH of a family."""
    return {
        f"{prefix}-{name}/{patch}": {"family": family, **FAMILIES[family], **size, "patch_size": patch, **others}
        for name, size in sizes.items()
        for patch in patches
    }


CONFIGS: dict[str, dict[str, Any]] = {
    **named("DiT", "dit", SIZES, (2, 4, 8)),
    **named("SiT", "sit", SIZES, (2, 4, 8)),
    **named("REPA", "repa", SIZES, (2, 4, 8)),
    **named("REPA", "repa", SIZES, (1,), **F16D32),
    **named("LightningDiT", "lightningdit", {**SIZES, **LARGER}, (1, 2), **F16D32),
    **named("JiT", "jit", JIT, (16,), in_channels=3, input_size=256, context_tokens=32),
    **named("JiT", "jit", JIT, (32,), in_channels=3, input_size=512, context_tokens=32, noise_scale=2.0),
    "DiT-digits": DIGITS,
    "DiT-cifar10": CIFAR10,
    "SiT-digits": {"family": "sit", **FAMILIES["sit"], **DIGITS},
    "JiT-digits": {
        "family": "jit",
        **FAMILIES["jit"],
        **DIGITS,
        "mlp_hidden": 320,
        "bottleneck": 16,
        "context_tokens": 4,
        "context_start": 2,
    },
}


def config_for(name: str, **overrides: Any) -> DiTConfig:
    """The configuration called `name`, with `overrides` of its fields. Raises UserError for unknown names."""
    if name not in CONFIGS:
        raise unknown("model", name, CONFIGS)
    check_names("option of a DiT", overrides, (field.name for field in fields(DiTConfig)))
    return DiTConfig(**{**CONFIGS[name], **overrides})


def build(name: str, **overrides: Any) -> DiT:
    """The model called `name`, freshly initialized."""
    return DiT(config_for(name, **overrides))


DiT_models: dict[str, Callable[..., DiT]] = {name: partial(build, name) for name in CONFIGS}
