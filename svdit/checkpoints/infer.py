"""The configuration of a bare published state dict, read off its shapes.

Everything shows in a shape but the number of heads, which comes from the named model of the same depth and width,
or from the caller.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from svdit.errors import UserError
from svdit.model.dit import DiTConfig
from svdit.model.zoo import CONFIGS


def config_from_shapes(tensors: Mapping[str, Tensor], path: Path, num_heads: int | None = None) -> DiTConfig:
    """The configuration that these published names and shapes belong to; `path` is for messages."""
    try:
        hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        _, tokens, _ = tensors["pos_embed"].shape
        rows, _ = tensors["final_layer.linear.weight"].shape
        mlp_size, _ = tensors["blocks.0.mlp.fc1.weight"].shape
        labels, _ = tensors["y_embedder.embedding_table.weight"].shape
    except KeyError as error:
        raise UserError(f"{path} is no checkpoint of a DiT: it has no tensor {error}") from None
    except ValueError:
        raise UserError(f"{path} is no checkpoint of a DiT: its tensors have other numbers of dimensions") from None
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return DiTConfig(
        input_size=math.isqrt(tokens) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads or named_heads(depth, hidden_size, path),
        mlp_ratio=mlp_size / hidden_size,
        num_classes=labels - 1,
        learn_sigma=rows == 2 * in_channels * patch_size**2,
    )


def named_heads(depth: int, hidden_size: int, path: Path) -> int:
    """The heads of the named model of this depth and width."""
    for options in CONFIGS.values():
        if (options["depth"], options["hidden_size"]) == (depth, hidden_size):
            return int(options["num_heads"])
    raise UserError(
        f"{path} does not say how many heads its {depth} blocks of width {hidden_size} have, "
        "and no named model has that size; give num_heads"
    )
