"""diffusers' DiTTransformer2DModel to the published names and layout, and back.

diffusers splits the fused qkv projection, repeats both embedders in every block and stores no position table.
A converted model computes the published forward pass. diffusers' own differs: it spaces the timestep frequencies by
1/127 instead of 1/128 (relative change 0.25 with random weights), and its second norms default to an eps of 1e-5
instead of 1e-6 (relative change 1e-6). Weights trained in diffusers are therefore not reproduced exactly.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.model.embeddings import position_embedding

MAX_SIZE = 1024  # of the input; the table of positions grows with its square, and no tensor bounds it
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
INSIDE = {  # several names: concatenated along the rows
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
REPEATED = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors (…) of these names belong to diffusers' DiT."""
    name = REPEATED["y_embedder.embedding_table.weight"]  # which SD3 and Flux lack
    return f"transformer_blocks.0.{name}" in state


def from_diffusers(state: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """diffusers' tensors (…) under the published names and in the published layout.

    `input_size` is diffusers' `sample_size`, which no tensor shows. Raises UserError for missing, unknown or misshapen
    tensors, and where the blocks' embedders differ.
    """
    if not 0 < input_size <= MAX_SIZE:
        raise UserError(f"the input size (sample_size) is {input_size}; it must be from 1 to {MAX_SIZE}")
    left, depth = dict(state), count(state, "transformer_blocks")
    try:
        result = {ours: torch.cat([left.pop(name) for name in theirs]) for ours, theirs in layout(depth).items()}
        for ours, name in REPEATED.items():
            first, *others = [left.pop(f"transformer_blocks.{i}.{name}") for i in range(depth)]
            if not all(torch.equal(first, other) for other in others):
                raise UserError(f"the blocks of this diffusers DiT differ in {name}; a published DiT shares it")
            result[ours] = first
        hidden_size, _, patch_size, _ = result["x_embedder.proj.weight"].shape
        position = position_embedding(hidden_size, input_size // patch_size)
    except KeyError as error:
        raise UserError(f"this diffusers DiT lacks {error}; pass a complete DiTTransformer2DModel") from None
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        raise UserError(f"this diffusers DiT has tensors of other shapes ({error}); pass an unchanged one") from None
    if left:
        raise UserError(
            f"this diffusers DiT has {len(left)} tensors that a published one lacks ({min(left)}, …); "
            "pass an unchanged DiTTransformer2DModel"
        )
    return {"pos_embed": position, **result}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`: tensors (…) of a full-precision model under diffusers' names."""
    depth = count(state, "blocks")
    result: dict[str, Tensor] = {}
    for ours, theirs in layout(depth).items():
        result.update(zip(theirs, (part.clone() for part in state[ours].chunk(len(theirs))), strict=True))
    for ours, name in REPEATED.items():
        result.update({f"transformer_blocks.{i}.{name}": state[ours].clone() for i in range(depth)})
    return result


def count(state: Mapping[str, Tensor], blocks: str) -> int:
    """Number of blocks whose tensors (…) start with that name."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def layout(depth: int) -> dict[str, list[str]]:
    """Published names outside the embedders, each with the diffusers tensors that it concatenates."""
    pairs = {ours: [theirs] for ours, theirs in OUTSIDE.items()}
    for i in range(depth):
        for ours, parts in INSIDE.items():
            pairs[f"blocks.{i}.{ours}"] = [f"transformer_blocks.{i}.{part}" for part in parts]
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": [f"{part}.{kind}" for part in parts] for ours, parts in pairs.items() for kind in kinds}
