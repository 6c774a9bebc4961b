"""What distinguishes the files of the families: which wrote a file, and its tensors in the layout of our model.

REPA adds projectors, and in files of its first version other names for the later blocks; REPA-E the batch norm of its
latents; LightningDiT its RoPE tables. SwiGLU of any hidden width is padded with zeros, which changes no output.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svdit.checkpoints.hub import is_published
from svdit.checkpoints.padding import padded
from svdit.errors import UserError
from svdit.model.config import DiTConfig
from svdit.model.embeddings import rotation

NAMES = {"dit": "DiT", "sit": "SiT", "repa": "REPA", "lightningdit": "LightningDiT", "jit": "JiT"}
TOLERANCE = 0.01  # of RoPE tables in half precision
QK_NORM, ROPE = "blocks.0.attn.q_norm", "feat_rope.freqs_cos"
EXTRA = ("projectors.", "bn.", "feat_rope.")


def families(tensors: Mapping[str, Tensor], learn_sigma: bool) -> tuple[str, ...]:
    """The families whose training scripts write such tensors (…)."""
    if "x_embedder.proj1.weight" in tensors:
        return ("jit",)
    if any(name in tensors for name in ("blocks.0.norm1.weight", "blocks.0.mlp.w3.weight", ROPE)):
        return ("lightningdit",)
    if f"{QK_NORM}.weight" in tensors:
        return ("repa",) if f"{QK_NORM}.bias" in tensors else ("lightningdit",)
    if any(name.startswith(("projectors.", "bn.", "decoder_blocks.")) for name in tensors):
        return ("repa",)
    return ("dit", "sit") if learn_sigma else ("dit", "sit", "repa")


def decide(possible: tuple[str, ...], claim: str | None, recorded: Mapping[str, Any], path: Path) -> str:
    """One of the possible families: the caller's `claim`, the recorded one, or DiT for a published file.

    Raises UserError for a claim that is not possible or not what was recorded, and where nothing decides.
    """
    choices = listed([f"a {NAMES[family]}" for family in possible])
    if claim is not None and claim not in possible:
        raise UserError(
            f"{path} has the tensors of {choices}, not of a {NAMES.get(claim, claim)}; omit --family and --model"
        )
    if claim is not None and (recorded.get("family", claim) != claim or (claim == "dit" and "path_type" in recorded)):
        other = recorded.get("family", "sit")
        raise UserError(
            f"{path} records the training of another model than a {NAMES[claim]}; pass --family {other} instead"
        )
    decided = [family for family in (claim, recorded.get("family")) if family in possible]
    if decided or len(possible) == 1:
        return [*decided, *possible][0]
    if is_published(path):
        return "dit"
    model = recorded.get("model")
    hint = f" (its training script recorded the model {model[:40]!r})" if isinstance(model, str) else ""
    options = listed([f"--family {family}" for family in possible])
    raise UserError(
        f"{path} may be {choices}, which have the same tensors but are sampled differently{hint}; pass {options} "
        "(in Python family), or --model"
    )


def listed(choices: list[str]) -> str:
    """The choices in words."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def converted(tensors: Mapping[str, Tensor], config: DiTConfig, path: Path) -> dict[str, Tensor]:
    """Tensors (…) of a file, in fp32, under the names and in the layout of a model of this configuration.

    Raises UserError for RoPE tables of other positions.
    """
    check_rope(tensors, config, path)
    encoder_depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})

    def later(match: re.Match[str]) -> str:
        return f"blocks.{int(match[1]) + encoder_depth}."

    names = {name: re.sub(r"^decoder_blocks\.(\d{1,6})\.", later, name) for name in tensors}
    kept = {names[name]: tensor.float() for name, tensor in tensors.items() if not name.startswith(EXTRA)}
    return padded(kept, config)


def check_rope(tensors: Mapping[str, Tensor], config: DiTConfig, path: Path) -> None:
    """Raises UserError for RoPE tables (T, D/heads) of other positions or frequencies than the model computes."""
    stored = [tensors[name] for name in (ROPE, ROPE.replace("cos", "sin")) if name in tensors]
    if not stored or stored[0].is_meta:
        return
    head, side = config.hidden_size // config.num_heads, config.input_size // config.patch_size
    expected = rotation(head, side)
    pairs = zip(stored, expected, strict=False)
    fits = [each.shape == table.shape and (each - table).abs().max() < TOLERANCE for each, table in pairs]
    if fits != [True, True]:
        raise UserError(
            f"{path} has RoPE tables of other positions than 0 to {side - 1} or other frequencies; these are not "
            "supported, pass a checkpoint with unchanged feat_rope"
        )
