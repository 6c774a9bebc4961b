"""Checkpoints of small random models as the training script of each family writes them."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import small
from torch import Tensor, nn

from svdit.model.dit import DiT

State = dict[str, Tensor]
FIELDS = {"jit": {"input_size": 8, "depth": 2}}  # of pixels; the others generate 4 × 4 latents


def noise(state: State) -> State:
    """Other weights, which no one samples."""
    return {key: torch.randn_like(tensor) for key, tensor in state.items()}


def sit(model: DiT) -> dict[str, Any]:
    args = Namespace(model="SiT-XL/2", num_classes=5, vae="ema", path_type="Linear", prediction="velocity")
    return {"model": noise(model.state_dict()), "ema": model.state_dict(), "opt": {"state": {}}, "args": args}


def repa(model: DiT) -> dict[str, Any]:
    state = model.state_dict()
    for i, (rows, columns) in zip((0, 2, 4), ((16, 64), (16, 16), (8, 16)), strict=True):
        state |= {f"projectors.0.{i}.weight": torch.randn(rows, columns), f"projectors.0.{i}.bias": torch.randn(rows)}
    args = Namespace(model="SiT-XL/2", path_type="linear", prediction="v", qk_norm=True, encoder_depth=1, legacy=False)
    return {"model": noise(state), "ema": state, "opt": {"state": {}}, "args": args, "steps": 400000}


def repae(model: DiT) -> dict[str, Any]:
    content, channels = repa(model), model.config.in_channels
    statistics = nn.BatchNorm2d(channels, affine=False).train()
    statistics(2 * torch.randn(9, channels, 4, 4) + 1)
    for weights in (content["model"], content["ema"]):
        weights |= {f"bn.{key}": tensor.clone() for key, tensor in statistics.state_dict().items()}
    others: dict[str, Any] = {"vae": {"decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}, "opt_vae": {"state": {}}}
    return content | others | {"discriminator": {"main.0.weight": torch.ones(4, 3, 4, 4)}, "opt_disc": {"state": {}}}


def lightningdit(model: DiT) -> dict[str, Any]:
    cos, sin = model.rotation
    state = {**model.state_dict(), "feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    config = {
        "model": {"model_type": "LightningDiT-XL/1", "use_qknorm": True, "use_rope": True},
        "data": {"latent_norm": True, "latent_multiplier": 1.0},
        "transport": {"path_type": "Linear", "prediction": "velocity"},
        "sample": {"timestep_shift": 0.3, "cfg_scale": 6.7},
    }
    prefixed = {f"module.{key}": tensor for key, tensor in noise(state).items()}
    return {"model": prefixed, "ema": state, "opt": {"state": {}}, "config": config}


def jit(model: DiT) -> dict[str, Any]:
    state = {f"net.{key}": tensor for key, tensor in model.state_dict().items()}
    averages = {
        f"model_ema{i}": {key: nn.Parameter(value) for key, value in x.items()}
        for i, x in ((1, state), (2, noise(state)))
    }
    args = Namespace(model="JiT-B/16", noise_scale=1.0, img_size=8)
    return {"model": noise(state), "optimizer": {"state": {}}, "epoch": 599, "args": args, **averages}


WRITERS: dict[str, tuple[str, Callable[[DiT], dict[str, Any]]]] = {  # the file's name, and its content
    "sit": ("0400000.pt", sit),
    "repa": ("0400000.pt", repa),
    "repae": ("0400000.pt", repae),
    "lightningdit": ("0080000.pt", lightningdit),
    "jit": ("checkpoint-last.pth", jit),
}
OPTIONS = {  # what such small models do not show
    "sit": ("--family", "sit", "--num-heads", "2"),
    "repa": (), "repae": (), "lightningdit": (),
    "jit": ("--context-start", "1"),
}  # fmt: skip


def write(family: str, folder: Path) -> tuple[Path, DiT]:
    """A checkpoint in `folder`, of LightningDiT with the statistics of its latents beside it; and its model."""
    name, content = WRITERS[family]
    model = small({"repae": "repa"}.get(family, family), **FIELDS.get(family, {"depth": 1}))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content(model), folder / name)
    if family == "lightningdit":
        statistics = {"mean": torch.randn(1, 4, 1, 1), "std": 1 + torch.rand(1, 4, 1, 1)}
        torch.save(statistics, folder / "latents_stats.pt")
    return folder / name, model
