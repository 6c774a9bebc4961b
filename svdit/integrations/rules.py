"""Which layers of a transformer of diffusers are quantized by default, and why the others are not.

A layer of a block is inside a list of modules: its name has a number in it. Attention and feed-forward are quantized by
the preset. Modulation (adaLN) is stored as INT8, its inputs in full precision. All else is left alone: embedders, what
is outside of the blocks, convolutions.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from svdit.errors import UserError
from svdit.kernels.formats import Format
from svdit.quant.config import ADALN, PLAIN, QuantConfig, Recipe, Rule, recipe_for
from svdit.quant.select import names_by_linear, peculiarity

EMBEDDER = re.compile(r"emb(ed\w*)?$|time_proj|^emb", re.IGNORECASE)  # parts of names
MODULATION = re.compile(r"norm|adaln|(^|_)mod(ulation)?(_|$)", re.IGNORECASE)
WEIGHTED = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class Plan(NamedTuple):
    """The rules for a model, and for every other layer with weights why it is left alone."""

    config: QuantConfig
    kept: dict[str, str]


def rules_for(
    model: nn.Module, preset: str | Recipe = "w8a8", *, adaln: str = "int8", skip: Iterable[str] = ()
) -> QuantConfig:
    """The default rules for a transformer of diffusers: attention and feed-forward of its blocks by `preset`.

    `adaln` is the format of the blocks' modulation, as for a DiT: int8, int4, or fp16 for none. Layers that match a
    pattern of `skip` are left alone.
    Raises UserError for unknown names, and for a model without such layers.
    """
    return plan_for(model, preset, adaln=adaln, skip=skip).config


def plan_for(
    model: nn.Module,
    preset: str | Recipe = "w8a8",
    *,
    adaln: str = "int8",
    skip: Iterable[str] = (),
    reached: Iterable[str] | None = None,
) -> Plan:
    """`rules_for`, and the reasons for all other layers; only layers in `reached` are quantized, if that is given.

    Raises UserError as `rules_for`, and for a pattern of `skip` that matches no layer.
    """
    recipe = preset if isinstance(preset, Recipe) else recipe_for(preset)
    if adaln not in ADALN:
        raise UserError(f"{adaln!r} is not a format of adaLN; choose one of {', '.join(ADALN)}")
    conditioning = PLAIN if adaln == "int8" and not recipe.needs_inputs else ADALN[adaln]
    named, patterns = names_by_linear(model), tuple(skip)
    names = [name for every in named.values() for name in every]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"the pattern {pattern!r} matches no linear layer of this model; correct or omit it")
    attention = {f"{name}.out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    rules: list[Rule] = []
    kept = {name: "" for name, module in model.named_modules() if isinstance(module, WEIGHTED)}
    for linear, (name, *others) in named.items():
        if name in attention:
            kept.pop(name)  # it is named with its in_proj
            continue
        own = conditioning if is_modulation(name) else recipe
        reason = unsuitable(name, linear, own, patterns, None if reached is None else set(reached))
        if own and not reason:
            rules += [Rule(each, own) for each in (name, *others)]
            kept.pop(name, None)
        else:
            kept[name] = reason or "modulation"
    if not rules:
        raise UserError(
            f"a {type(model).__name__} has no blocks with linear layers that can be quantized; pass another"
        )
    modules = dict(model.named_modules())
    return Plan(QuantConfig(tuple(rules)), {name: reason or kind_of(modules[name]) for name, reason in kept.items()})


def unsuitable(
    name: str, linear: nn.Linear, recipe: Recipe | None, skip: tuple[str, ...], reached: set[str] | None
) -> str:
    """Why a linear layer is left alone; empty for one to quantize."""
    parts = name.split(".")
    if any(fnmatchcase(name, pattern) for pattern in skip):
        return "skipped"
    if not any(part.isdecimal() for part in parts[:-1]):
        return "outside of the blocks"
    if any(EMBEDDER.search(part) for part in parts):
        return "embedder"
    if own := peculiarity(linear):
        return own
    if recipe and (problem := undivided(linear, recipe)):
        return problem
    return "never reached" if reached is not None and name not in reached else ""


def undivided(linear: nn.Linear, recipe: Recipe) -> str:
    """Which groups of the recipe do not divide the layer's inputs; empty for none."""
    forms: tuple[Format | None, ...] = (recipe.weight, recipe.act)
    for form in filter(None, forms):
        if form.group and linear.in_features % form.group:
            return f"{linear.in_features} inputs, not a multiple of {form.group}"
    return ""


def is_modulation(name: str) -> bool:
    """Whether the layer called `name` computes shifts, scales or gates from the timestep."""
    return any(MODULATION.search(part) for part in name.split("."))


def kind_of(module: nn.Module) -> str:
    """What a layer that is no linear is."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention: in_proj and out_proj are no calls of a linear"
    return "embedding" if isinstance(module, nn.Embedding) else "convolution"
