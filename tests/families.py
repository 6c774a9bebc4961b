"""The published outputs of SiT, REPA, REPA-E, LightningDiT and JiT, and small random models of each family.

The files are a part of those that the outputs were recorded with; `SVDIT_GOLDEN` names a folder with others.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import GOLDEN, randomize
from safetensors import safe_open
from torch import Tensor

from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT

FOLDER = Path(os.environ.get("SVDIT_GOLDEN", GOLDEN))
NAMES = sorted(str(path.relative_to(FOLDER))[: -len(".npz")] for path in FOLDER.glob("*/*.npz"))
MODELS = [name for name in NAMES if (FOLDER / f"{name}.weights.safetensors").is_file()]
FILE_ONLY = ("projectors.", "bn.", "feat_rope.")  # not part of the forward pass, or computed
FIELDS = {  # the published constructors' arguments, where ours have other names
    "use_qknorm": lambda on: {"qk_norm": "rms" if on else "none"},
    "qk_norm": lambda on: {"qk_norm": "layer" if on else "none"},
    "wo_shift": lambda on: {"shift": not on},
    "path_type": lambda path: {"path": {"cosine": "gvp"}.get(path, path)},
    "bottleneck_dim": lambda size: {"bottleneck": size},
    "in_context_len": lambda size: {"context_tokens": size},
    "in_context_start": lambda start: {"context_start": start},
}
SAME = {"input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes"}
SAME |= {"learn_sigma", "noise_scale"}


def config_of(published: dict[str, Any]) -> DiTConfig:
    """Our configuration of published constructor arguments with their `family`."""
    family = {"repae": "repa"}.get(published["family"], published["family"])
    fields = {"family": family, **FAMILIES[family]}
    for key, value in published.items():
        if key in FIELDS:
            fields |= FIELDS[key](value)
        elif key in SAME:
            fields[key] = value
    return DiTConfig(**fields)


class Published:
    """One of MODELS: `config`, `model` with the published weights, `raw` their configuration, `[key]` a tensor."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.weights.safetensors", "pt") as file:
            self.raw: dict[str, Any] = json.loads(file.metadata()["config"])
            self.weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.arrays = np.load(FOLDER / f"{name}.npz")
        self.config = config_of(self.raw)
        self.model = DiT(self.config).eval()
        kept = {key: value for key, value in self.weights.items() if not key.startswith(FILE_ONLY)}
        self.model.load_state_dict(kept)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files


SMALL = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 64,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dit": {},
    "sit": {},
    "repa": {"qk_norm": "layer"},
    "lightningdit": {"qk_norm": "rms", "mlp_hidden": 192},
    "jit": {"in_channels": 3, "bottleneck": 8, "context_tokens": 3, "context_start": 1, "mlp_hidden": 192},
}


def small(family: str, **fields: Any) -> DiT:
    """A random model, 64 wide, 3 blocks of which every quantization format applies, with all parts of its family."""
    config = {**SMALL, "family": family, **FAMILIES[family], **VARIANTS[family], **fields}
    model = randomize(DiT(DiTConfig(**config)))
    assert isinstance(model, DiT)
    return model


def inputs(model: DiT) -> tuple[Tensor, Tensor, Tensor]:
    """Three images with their times and labels."""
    generator = torch.Generator().manual_seed(3)
    t = torch.tensor([0.1, 0.5, 0.9]) if model.config.is_flow else torch.tensor([3, 500, 999])
    return torch.randn(3, *model.input_shape, generator=generator), t, torch.tensor([0, 1, 2])
