"""The named configurations: the twelve of the paper, and those of the models in this package."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from svdit.errors import UserError
from svdit.model.dit import DiT, DiTConfig

SIZES: dict[str, dict[str, Any]] = {
    "DiT-XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "DiT-L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "DiT-B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "DiT-S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"{name}/{patch}": {**size, "patch_size": patch} for name, size in SIZES.items() for patch in (2, 4, 8)},
    "DiT-digits": {
        "depth": 6,
        "hidden_size": 128,
        "num_heads": 4,
        "patch_size": 2,
        "input_size": 8,
        "in_channels": 1,
        "num_classes": 10,
    },
}


def config_for(name: str, **overrides: Any) -> DiTConfig:
    """The configuration called `name`, with `overrides` of its fields. Raises UserError for an unknown name."""
    if name not in CONFIGS:
        raise UserError(f"there is no model called {name!r}; choose one of {', '.join(CONFIGS)}")
    known = {field.name for field in fields(DiTConfig)}
    if unknown := set(overrides) - known:
        raise TypeError(f"DiT has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return DiTConfig(**{**CONFIGS[name], **overrides})


def build(name: str, **overrides: Any) -> DiT:
    """The model called `name`, freshly initialized."""
    return DiT(config_for(name, **overrides))


DiT_models: dict[str, Callable[..., DiT]] = {name: partial(build, name) for name in CONFIGS}
