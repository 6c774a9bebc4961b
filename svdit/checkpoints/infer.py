"""Infers the configuration of another project's state dict: its family from names, its sizes from shapes.

A DiT and a SiT have the same names and shapes. What tensors do not show (this, and often the number of heads) comes
from the caller, from what the training script recorded, or from the named model of the same depth and width.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svdit.checkpoints.families import QK_NORM, ROPE, decide, families
from svdit.checkpoints.padding import padded_width
from svdit.checkpoints.restore import naming
from svdit.errors import UserError
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.zoo import CONFIGS

# Fields that tensors do not show. Training scripts record two of them, in these words or in ours.
UNSEEN = ("num_heads", "context_start", "rope", "prediction", "path", "noise_scale", "uint8")
WORDS = {"v": "velocity", "noise": "epsilon", "cosine": "gvp"}
PATHS = ("linear", "gvp", "vp")  # of a flow
BLOCKS = ("blocks.", "decoder_blocks.")


def config_from_shapes(
    tensors: Mapping[str, Tensor],
    path: Path,
    claims: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> DiTConfig:
    """The configuration of tensors (…) with the published names; `path` is for messages.

    `claims` are the caller's fields, `recorded` those of the training script. The last row of the label table is the
    null class, unless there are only `num_classes` rows.
    Raises UserError for names or shapes that are not those of a family, and where a field stays open.
    """
    claims, recorded = claims or {}, recorded or {}
    try:
        shown = shapes(tensors)
        labels, _ = tensors["y_embedder.embedding_table.weight"].shape
    except KeyError as error:
        raise UserError(
            f"{path} is not a checkpoint of a DiT: it has no tensor {error} among its {len(tensors)} "
            f"({min(tensors, default='')[:60]!r}, …); pass another file"
        ) from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{path} is not a checkpoint of a DiT: its tensors have other shapes; pass another file"
        ) from None
    family = decide(families(tensors, shown["learn_sigma"]), claims.get("family"), recorded, path)
    unseen = {key: claims[key] for key in UNSEEN if key in claims} | noted(recorded)
    fields = {"family": family, **FAMILIES[family], **unseen, **shown}
    num_classes = claims.get("num_classes", recorded.get("num_classes"))
    fields |= {"num_classes": labels - (labels != num_classes), "has_null_class": labels != num_classes}
    if family == "jit":
        fields.setdefault("noise_scale", 2.0 if fields["patch_size"] == 32 else 1.0)
    elif family == "lightningdit" and "rope" not in {*unseen, *shown}:
        raise UserError(
            f"{path} does not record whether its model has RoPE: it has no {ROPE}; pass --model, or rope in Python"
        )
    needed = ("num_heads", "context_start") if fields["context_tokens"] else ("num_heads",)
    fields |= {field: named(field, fields, path) for field in needed if field not in fields}
    with naming(path, "a configuration that no model has", "pass an unchanged checkpoint and the options of its model"):
        return DiTConfig(**fields)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that tensors (…) show. Raises KeyError, IndexError, ValueError or ZeroDivisionError for others."""
    bottleneck = 0
    if "x_embedder.proj1.weight" in tensors:
        bottleneck, in_channels, patch_size, _ = tensors["x_embedder.proj1.weight"].shape
        hidden_size, _, _, _ = tensors["x_embedder.proj2.weight"].shape
    else:
        hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    _, tokens, _ = tensors["pos_embed"].shape
    rows, _ = tensors["final_layer.linear.weight"].shape
    modulations, _ = tensors["blocks.0.adaLN_modulation.1.weight"].shape
    context = tensors.get("in_context_posemb")
    return {
        "input_size": math.isqrt(tokens) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({tuple(name.split(".")[:2]) for name in tensors if name.startswith(BLOCKS)}),
        "learn_sigma": rows // (in_channels * patch_size**2) == 2,
        "norm": "rms" if "blocks.0.norm1.weight" in tensors else "layer",
        "shift": modulations != 4 * hidden_size,
        "bottleneck": bottleneck,
        "context_tokens": 0 if context is None else context.shape[1],
        **mlp(tensors, hidden_size),
        **attention(tensors, hidden_size),
    }


def mlp(tensors: Mapping[str, Tensor], hidden_size: int) -> dict[str, Any]:
    """The kind and the width of the MLP among tensors (…); that of SwiGLU as `padded` makes it."""
    if "blocks.0.mlp.w3.weight" in tensors:
        _, width = tensors["blocks.0.mlp.w3.weight"].shape
        return {"mlp": "swiglu", "mlp_hidden": padded_width(width)}
    width, _ = tensors["blocks.0.mlp.fc1.weight"].shape
    ratio = width / hidden_size
    return {"mlp": "gelu", "mlp_ratio": ratio, "mlp_hidden": 0 if int(hidden_size * ratio) == width else width}


def attention(tensors: Mapping[str, Tensor], hidden_size: int) -> dict[str, Any]:
    """The norm of queries and keys among tensors (…). Its width and that of RoPE tables show the number of heads."""
    norm, table = tensors.get(f"{QK_NORM}.weight"), tensors.get(ROPE)
    kind = "none" if norm is None else "layer" if f"{QK_NORM}.bias" in tensors else "rms"
    fields: dict[str, Any] = {"qk_norm": kind} if table is None else {"qk_norm": kind, "rope": True}
    heads = [hidden_size // tensor.shape[-1] for tensor in (norm, table) if tensor is not None]
    return {**fields, "num_heads": heads[0]} if heads else fields


def noted(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a training script recorded, in our words."""
    if recorded.get("path") not in PATHS:  # but that of a data set
        recorded = {name: value for name, value in recorded.items() if name != "path"}
    names = {"path_type": "path", "use_rope": "rope"} | {name: name for name in UNSEEN}
    fields = {ours: recorded[name] for name, ours in names.items() if name in recorded}
    texts = {key: value.lower() for key, value in fields.items() if isinstance(value, str)}
    return fields | {key: WORDS.get(text, text) for key, text in texts.items()}


def named(field: str, fields: Mapping[str, Any], path: Path) -> int:
    """The field of the named model of this depth and width. Raises UserError where there is none."""
    size = {key: fields[key] for key in ("depth", "hidden_size")}
    for options in CONFIGS.values():
        if field in options and size.items() <= options.items():
            return int(options[field])
    what, option = {"num_heads": "number of heads", "context_start": "first block with context"}[field], field
    raise UserError(
        f"{path} does not record its {what}, and no named model has depth {size['depth']} and width "
        f"{size['hidden_size']}; pass {option} in Python, or --{option.replace('_', '-')}"
    )
