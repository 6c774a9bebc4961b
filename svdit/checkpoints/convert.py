"""diffusers' DiTTransformer2DModel to the published names and layout, and back; quantized layers too.

diffusers splits the fused qkv projection, repeats both embedders in every block and stores no position table.
A converted model computes the published forward pass. diffusers' own differs: it spaces the timestep frequencies by
1/127 instead of 1/128 (relative change 0.25 with random weights), and its second norms default to an eps of 1e-5
instead of 1e-6 (relative change 1e-6). Weights trained in diffusers are therefore not reproduced exactly.
"""

from collections.abc import Mapping
from typing import TypeVar

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
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
OF_INPUTS = ("l2", "in_")  # how the tensors of a quantized layer start that have no row per output
Value = TypeVar("Value")


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors (…) of these names belong to diffusers' DiT."""
    name = REPEATED["y_embedder.embedding_table"]  # which SD3 and Flux lack
    return f"transformer_blocks.0.{name}.weight" in state


def from_diffusers(state: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """diffusers' tensors (…) under the published names and in the published layout.

    `input_size` is diffusers' `sample_size`, which no tensor shows. Raises UserError for missing, unknown or misshapen
    tensors, where the blocks' embedders differ, and where queries, keys and values were quantized separately.
    """
    if not 0 < input_size <= MAX_SIZE:
        raise UserError(f"the input size (sample_size) is {input_size}; it must be from 1 to {MAX_SIZE}")
    left, depth, kinds = dict(state), count(state, "transformer_blocks"), kinds_of(state)
    try:
        result: dict[str, Tensor] = {}
        for ours, theirs in layout(depth).items():
            for kind in quantized_kinds(kinds.get(theirs[0], [])) or ("weight", "bias"):
                result[f"{ours}.{kind}"] = joined(kind, {name: left.pop(f"{name}.{kind}") for name in theirs})
        for ours, name in REPEATED.items():
            for kind in kinds.get(f"transformer_blocks.0.{name}", ("weight",)):
                first, *others = [left.pop(f"transformer_blocks.{i}.{name}.{kind}") for i in range(depth)]
                if not all(same(first, other) for other in others):
                    raise UserError(
                        f"the blocks of this diffusers DiT differ in {name}.{kind}; a published DiT shares it"
                    )
                result[f"{ours}.{kind}"] = first
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


def same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors (…) are equal, on the meta device of shape."""
    return a.shape == b.shape if a.is_meta else torch.equal(a, b)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`: tensors (…) under diffusers' names, of a quantized model those of its layers.

    Queries, keys and values share the layer's low-rank input L2, its centring and its smoothing.
    """
    depth, kinds = count(state, "blocks"), kinds_of(state)
    result: dict[str, Tensor] = {}
    for ours, theirs in names_in_diffusers(depth).items():
        for kind in kinds[ours]:
            tensor, n = state[f"{ours}.{kind}"], len(theirs)
            whole = kind.startswith(OF_INPUTS) or ours in REPEATED
            parts = [tensor] * n if whole else tensor.chunk(n)
            result.update({f"{name}.{kind}": part.clone() for name, part in zip(theirs, parts, strict=True)})
    return result


def specs_to_diffusers(specs: Mapping[str, Value]) -> dict[str, Value]:
    """What belongs to layers of a published DiT, such as their specs, by the names of the layers in diffusers."""
    names = names_in_diffusers(count(specs, "blocks"))
    return {name: spec for ours, spec in specs.items() for name in names[ours]}


def specs_from_diffusers(specs: Mapping[str, Value]) -> dict[str, Value]:
    """The inverse of `specs_to_diffusers`. Raises UserError for unknown names, and where parts of a layer differ."""
    result: dict[str, Value] = {}
    left = dict(specs)
    for ours, theirs in names_in_diffusers(count(specs, "transformer_blocks")).items():
        values = [left.pop(name) for name in theirs if name in left]
        if values and (len(values) < len(theirs) or any(value != values[0] for value in values)):
            raise UserError(
                f"{', '.join(theirs[:3])} have different formats, and a published DiT has one layer for them"
            )
        result |= {ours: values[0]} if values else {}
    if left:
        raise UserError(f"a diffusers DiT has no layer {min(left)}")
    return result


def joined(kind: str, parts: Mapping[str, Tensor]) -> Tensor:
    """One tensor (…) of a fused layer from those of its parts, by their names.

    Raises UserError for parts that were quantized separately.
    """
    first, *others = parts.values()
    if not kind.startswith(OF_INPUTS):
        return torch.cat([first, *others])
    if not all(torch.equal(first, other) for other in others):
        raise UserError(
            f"{', '.join(parts)} of this DiT were quantized separately (their {kind} differ), and a published "
            "DiT has one layer for them; convert the full-precision model, then quantize it"
        )
    return first


def kinds_of(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The last part of the names of tensors (…), by the rest: ["weight", "bias"], or those of a quantized layer."""
    kinds: dict[str, list[str]] = {}
    for key in state:
        name, _, kind = key.rpartition(".")
        kinds.setdefault(name, []).append(kind)
    return kinds


def quantized_kinds(kinds: list[str]) -> list[str]:
    """The kinds of tensors that a layer has, if they are those of a quantized one."""
    return kinds if any(kind.startswith(("residual", "l1")) for kind in kinds) else []


def count(names: Mapping[str, object], blocks: str) -> int:
    """Number of blocks whose tensors or layers have names that start with that name."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{blocks}.")})


def layout(depth: int) -> dict[str, list[str]]:
    """Published layers outside the embedders, each with the layers of diffusers that it concatenates."""
    pairs = {ours: [theirs] for ours, theirs in OUTSIDE.items()}
    for i in range(depth):
        for ours, parts in INSIDE.items():
            pairs[f"blocks.{i}.{ours}"] = [f"transformer_blocks.{i}.{part}" for part in parts]
    return pairs


def names_in_diffusers(depth: int) -> dict[str, list[str]]:
    """All published layers with the layers of diffusers that they become; embedders are repeated in every block."""
    repeated = {ours: [f"transformer_blocks.{i}.{name}" for i in range(depth)] for ours, name in REPEATED.items()}
    return {**layout(depth), **repeated}
