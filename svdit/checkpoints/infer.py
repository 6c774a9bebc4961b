"""Infers the configuration of a published state dict from its shapes.

No shape shows the number of heads. It comes from the caller, or from the named model of the same depth and width.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from svdit.errors import UserError
from svdit.model.dit import DiTConfig
from svdit.model.zoo import CONFIGS


def config_from_shapes(
    tensors: Mapping[str, Tensor], path: Path, num_heads: int | None = None, num_classes: int | None = None
) -> DiTConfig:
    """The configuration of tensors (…) with the published names; `path` is for messages.

    The last row of the label table is the null class, unless there are only `num_classes` rows.

    Raises UserError for names or shapes that are not a DiT's, and for an unknown number of heads.
    """
    try:
        hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        _, tokens, _ = tensors["pos_embed"].shape
        rows, _ = tensors["final_layer.linear.weight"].shape
        mlp_size, _ = tensors["blocks.0.mlp.fc1.weight"].shape
        labels, _ = tensors["y_embedder.embedding_table.weight"].shape
        mlp_ratio = mlp_size / hidden_size
        side = math.isqrt(tokens) * patch_size
        learn_sigma = rows // (in_channels * patch_size**2) == 2
    except KeyError as error:
        raise UserError(
            f"{path} is not a checkpoint of a DiT: it has no tensor {error} among its {len(tensors)} "
            f"({min(tensors, default='')[:60]!r}, …); pass another file"
        ) from None
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{path} is not a checkpoint of a DiT: its tensors have other shapes; pass another file"
        ) from None
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return DiTConfig(
        input_size=side,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads or named_heads(depth, hidden_size, path),
        mlp_ratio=mlp_ratio,
        num_classes=labels - (labels != num_classes),
        learn_sigma=learn_sigma,
        has_null_class=labels != num_classes,
    )


def named_heads(depth: int, hidden_size: int, path: Path) -> int:
    """Number of heads of the named model of this depth and width. Raises UserError where there is none."""
    for options in CONFIGS.values():
        if (options["depth"], options["hidden_size"]) == (depth, hidden_size):
            return int(options["num_heads"])
    raise UserError(
        f"{path} does not record its number of heads, and no named model has depth {depth} and width {hidden_size}; "
        "pass num_heads in Python, or --num-heads"
    )
