"""Which layers of a model a configuration quantizes, checked before any long work.

Only plain `nn.Linear`s are replaced: a forward of its own, or hooks, compute something else, and
`nn.MultiheadAttention` reads the weight of its out_proj without calling it.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from svdit.errors import UserError
from svdit.quant.config import QuantConfig, Recipe
from svdit.quant.linear import quantized_layers


@dataclass(frozen=True)
class Selection:
    """The layers to quantize by their first name, and reasons for what is not quantized."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    linears: dict[str, nn.Linear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # name: reason, of what a recipe asked for in vain


def select(model: nn.Module, config: QuantConfig) -> Selection:
    """The layers of `model` that `config` quantizes.

    Raises UserError for a model without such layers or quantized before, for patterns that match nothing, for one
    module under two rules, and for parameters that cannot be quantized.
    """
    if done := quantized_layers(model):
        raise UserError(f"this model is already quantized ({next(iter(done))}); load the full-precision checkpoint")
    if isinstance(model, nn.Linear):
        raise UserError("the model is itself a Linear, which cannot be replaced in place; pass nn.Sequential(linear)")
    selection, names = Selection(), names_by_linear(model)
    check_patterns(config, [name for every in names.values() for name in every])
    attention = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for linear, every in names.items():
        name = every[0]
        recipe = shared_recipe(config, every)
        if recipe is None:
            continue
        if name.rpartition(".")[0] in attention:
            reason = "nn.MultiheadAttention uses its in_proj and out_proj weights without calling a linear"
            selection.skipped[name.rpartition(".")[0]] = reason
        elif reason := peculiarity(linear):
            selection.skipped[name] = reason
        else:
            check_layer(name, linear, recipe)
            selection.recipes[name], selection.linears[name] = recipe, linear
    if not selection.recipes:
        reasons = "".join(f"; {name}: {reason}" for name, reason in selection.skipped.items())
        raise UserError(f"no rule of the configuration selects a linear layer of this model{reasons}")
    return selection


def names_by_linear(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """Every linear of a model with all its names, in order of the first."""
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(name)
    return names


def check_patterns(config: QuantConfig, names: list[str]) -> None:
    """Raises UserError for a model without linears, and for patterns that match none, except of optional rules."""
    if not names:
        raise UserError("this model has no nn.Linear, and other layers are not quantized; pass a model with some")
    for rule in config.rules:
        if not rule.optional and not any(fnmatchcase(name, rule.pattern) for name in names):
            inside = f"{rule.pattern}.*"
            close = "one of " + ", ".join(get_close_matches(rule.pattern, names, 3, 0.5) or names[-2:])
            meant = inside if any(fnmatchcase(name, inside) for name in names) else close
            raise UserError(f"{rule.pattern!r} matches no linear layer of this model; did you mean {meant}?")


def shared_recipe(config: QuantConfig, names: list[str]) -> Recipe | None:
    """The recipe of a linear with these names. Raises UserError where they have different ones."""
    recipes = [config.recipe(name) for name in names]
    for name, recipe in zip(names, recipes, strict=True):
        if recipe != recipes[0]:
            raise UserError(f"{names[0]} and {name} are the same module but have different rules; make them equal")
    return recipes[0]


def peculiarity(linear: nn.Linear) -> str:
    """Why a call of `linear` is more than x Wᵀ + b; empty where it is just that."""
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} is a subclass of nn.Linear with its own forward"
    if "forward" in vars(linear):
        return "its forward was replaced"
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    return "it has forward hooks, which may change its input or output; remove them before quantizing" if hooks else ""


def check_layer(name: str, linear: nn.Linear, recipe: Recipe) -> None:
    """Raises UserError for NaN, Inf or missing values, and for groups that do not divide the layer's width."""
    try:
        for form in (recipe.weight, recipe.act, recipe.factors):
            if form:
                form.groups(linear.in_features)
    except UserError as error:
        raise UserError(f"{name} cannot be quantized to {form}: {error}, or skip the layer") from None
    for part, tensor in linear.named_parameters():
        if tensor.is_meta:
            raise UserError(f"the {part} of {name} is on the meta device; load the checkpoint before quantizing")
        if not tensor.detach().isfinite().all():
            raise UserError(f"the {part} of {name} contains NaN or Inf; check the checkpoint and its dtype")
