"""Recipes for layers, rules that map layer names to recipes, and the presets.

A preset is a `Recipe`; methods are compared by changing one field at a time. Patterns are those of fnmatch; the first
rule whose pattern matches a layer's name applies.
"""

import math
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from svdit.errors import UserError, check_names, unknown
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format

LowRank = Literal["none", "factors", "svd", "iterated", "correction", "alternated"]
FactorDtype = Literal["float32", "bfloat16"]
Smoothing = Literal[0, 7, 19, 39, "balanced"]
Rounding = Literal["nearest", "gptq"]
CLOSED_SETS = {
    "low_rank": get_args(LowRank),
    "factor_dtype": get_args(FactorDtype),
    "smoothing": get_args(Smoothing),
    "rounding": get_args(Rounding),
}


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantized.

    `low_rank`: none; factors (no residual, the rank-ratio mode); svd (split off once); iterated (SVDQuant as
    published); correction (of the rounding error, weighted by the inputs: QERA); alternated (rounding and weighted
    refits in turn). `smoothing`: balanced, or candidates of the search grid: 0 none, 39 as published, 19 and 7 its
    subsets.
    Raises UserError for values and combinations that are not supported.
    """

    weight: Format | None = WEIGHT_FORMATS["int8"]  # None: no residual
    act: Format | None = ACT_FORMATS["int8"]  # None: activations are not quantized
    low_rank: LowRank = "alternated"
    rank: int = 32
    rank_ratio: float | None = None  # rank relative to min(O, I), in place of `rank`
    factors: Format | None = None  # None: floats of `factor_dtype`
    factor_dtype: FactorDtype = "bfloat16"
    whiten: bool = False  # low_rank="factors": weight the SVD by the inputs' second moment
    centre: bool = True  # subtract the calibrated mean input
    shift: float = 0.0  # subtract a constant instead (SVDQuant's for the input of fc2)
    smoothing: Smoothing = "balanced"
    hadamard: int = 64  # block size; 0: no rotation
    search_scales: bool = True  # weight scales by weighted squared error, not by absmax
    rounding: Rounding = "gptq"
    iterations: int = 2  # of iterated (at most) and alternated

    def __post_init__(self) -> None:
        for field, supported in CLOSED_SETS.items():
            if (value := getattr(self, field)) not in supported or isinstance(value, bool):
                raise UserError(f"{field} is {value!r}; supported values: {', '.join(map(repr, supported))}")
        for field in ("weight", "act", "factors"):
            if not isinstance(value := getattr(self, field), Format | None):
                raise UserError(f"{field} is {value!r}; pass a Format or None")
        for field, least in (("rank", 0), ("hadamard", 0), ("iterations", 1)):
            if type(value := getattr(self, field)) is not int or value < least:
                raise UserError(f"{field} is {value!r}; pass an integer of at least {least}")
        if self.hadamard & (self.hadamard - 1):
            raise UserError(f"hadamard is {self.hadamard}; pass a power of two, or 0 for no rotation")
        if self.rank_ratio is not None and not (is_number(self.rank_ratio) and 0 < self.rank_ratio <= 1):
            raise UserError(f"rank_ratio is {self.rank_ratio!r}; pass a number above 0 and at most 1")
        if not is_number(self.shift):
            raise UserError(f"shift is {self.shift!r}; pass a finite number")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.low_rank == "factors" and (self.weight or self.act):
            raise UserError(f"low_rank='factors' leaves no residual, but weight is {self.weight} and act {self.act}")
        if self.low_rank == "factors" and not (self.rank or self.rank_ratio):
            raise UserError("low_rank='factors' with rank 0 stores nothing; pass a rank or a rank_ratio")
        if self.low_rank != "factors" and self.weight is None:
            raise UserError(f"low_rank={self.low_rank!r} needs a weight format; pass one, or low_rank='factors'")
        if self.low_rank != "factors" and self.whiten:
            raise UserError(f"whiten is for low_rank='factors', but low_rank is {self.low_rank!r}")
        if self.centre and self.shift:
            raise UserError(f"centre and shift={self.shift} exclude each other; choose one")

    @property
    def needs_inputs(self) -> bool:
        """Whether the layer's inputs must be observed."""
        weighted = self.whiten or self.low_rank in ("correction", "alternated")
        return weighted or self.centre or bool(self.smoothing) or self.rounding == "gptq" or self.search_scales


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` are quantized by `recipe`, or skipped where it is None.

    A pattern that matches no linear is an error, unless the rule is `optional`, as those of presets are.
    Raises UserError for other types.
    """

    pattern: str
    recipe: Recipe | None
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not isinstance(self.recipe, Recipe | None):
            raise UserError(f"Rule({self.pattern!r}, {self.recipe!r}): pass a pattern and a Recipe, or None to skip")


@dataclass(frozen=True)
class QuantConfig:
    """Rules in order of precedence; a layer that no rule matches is skipped. Raises UserError for other types."""

    rules: tuple[Rule, ...] = (Rule("*", Recipe()),)

    def __post_init__(self) -> None:
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise UserError(f"rules is {self.rules!r}; pass a tuple of Rules, for example (Rule('*', Recipe()),)")

    def rule(self, name: str) -> Rule | None:
        """The rule that applies to the layer called `name`."""
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def recipe(self, name: str) -> Recipe | None:
        """The recipe of the layer called `name`; None where it is skipped."""
        rule = self.rule(name)
        return rule.recipe if rule else None


# Weight-only with one INT8 scale per row.
PLAIN = Recipe(
    act=None,
    low_rank="none",
    rank=0,
    centre=False,
    smoothing=0,
    hadamard=0,
    search_scales=False,
    rounding="nearest",
)
# adaLN holds 1/3 of DiT's parameters and 0.2 % of its FLOPs. Its inputs have a large mean, whose error is common to all
# tokens and steps; centring makes it exact.
CONDITIONING = replace(PLAIN, centre=True, rounding="gptq")
ADALN: dict[str, Recipe | None] = {
    "int8": CONDITIONING,
    "int4": replace(CONDITIONING, weight=WEIGHT_FORMATS["int4-zero"], search_scales=True),
    "fp16": None,
}

FULL = Recipe(rank=16)  # 2 % of the size of a DiT-XL/2
FOUR_BITS = replace(FULL, weight=WEIGHT_FORMATS["int4"], rank=32, iterations=3)
PUBLISHED = replace(PLAIN, act=ACT_FORMATS["int8"], low_rank="iterated", rank=32, smoothing=39, iterations=100)
INT4_SYMMETRIC = Format(4, 64, "bf16")

RECIPES: dict[str, Recipe] = {
    "w8a8": FULL,
    "w4a8": FOUR_BITS,
    "w4a8-channel": replace(FOUR_BITS, weight=WEIGHT_FORMATS["int4-channel"]),
    "w4a4": replace(FOUR_BITS, act=ACT_FORMATS["int4"]),
    "w4a16": replace(FOUR_BITS, act=None),
    "w8a16": replace(FULL, act=None),
    "fp8": replace(FULL, weight=WEIGHT_FORMATS["fp8"], act=ACT_FORMATS["fp8"], search_scales=False),
    "nvfp4": replace(FOUR_BITS, weight=WEIGHT_FORMATS["nvfp4"], act=ACT_FORMATS["nvfp4"], search_scales=False),
    "mxfp4": replace(FOUR_BITS, weight=WEIGHT_FORMATS["mxfp4"], act=ACT_FORMATS["mxfp4"], search_scales=False),
    "svdquant": PUBLISHED,
    "svdquant-w4a4": replace(PUBLISHED, weight=INT4_SYMMETRIC, act=INT4_SYMMETRIC),
    "rtn": replace(PUBLISHED, low_rank="none", smoothing=0),
    "smoothquant": replace(PUBLISHED, low_rank="none"),
    "gptq": replace(PUBLISHED, low_rank="none", smoothing=0, rounding="gptq"),
    "qera": replace(PUBLISHED, low_rank="correction"),
}

GELU_SHIFT = -0.171875  # −11/64, below tanh-GELU's minimum −0.17004, so that shifted inputs of fc2 are never negative


def dit_config(
    recipe: Recipe, adaln: str = "int8", skip: tuple[str, ...] = (), last_block: int | None = None
) -> QuantConfig:
    """The rules for a DiT: `recipe` for the blocks' linears, `ADALN[adaln]` for adaLN; other linears are skipped.

    INT8 adaLN is rounded to nearest where `recipe` needs no calibration.
    `last_block`: the number of the last block of a model that predicts x₀, which has `whole_bytes` of svdit's recipes.
    Raises UserError for an unknown `adaln`.
    """
    if adaln not in ADALN:
        raise unknown("format of adaLN", adaln, ADALN)
    rules: dict[str, Recipe | None] = {"*adaLN_modulation*": ADALN[adaln]}
    if adaln == "int8" and not recipe.needs_inputs:
        rules["*adaLN_modulation*"] = PLAIN
    if last_block is not None and whole_bytes(recipe) != recipe:
        rules[f"blocks.{last_block}.*"] = whole_bytes(recipe)
    if recipe.act == INT4_SYMMETRIC and recipe.smoothing and not recipe.centre:
        rules["blocks.*.mlp.fc2"] = replace(recipe, shift=GELU_SHIFT, act=replace(recipe.act, span="unsigned"))
    rules["blocks.*"] = recipe
    return QuantConfig((*skipping(skip), *(Rule(pattern, each, optional=True) for pattern, each in rules.items())))


def whole_bytes(recipe: Recipe) -> Recipe:
    """svdit's W8A8, or W8A16, in place of its recipes with integers of fewer bits; other recipes as they are."""
    integers = recipe.weight is not None and recipe.weight.element == "int" and recipe.weight.bits < 8
    if not recipe.centre or not integers:
        return recipe
    act = FULL.act if recipe.act else None
    return replace(FULL, act=act, rank=min(recipe.rank, FULL.rank), low_rank=recipe.low_rank, factors=recipe.factors)


def rank_ratio_config(ratio: float, num_bits: int, whiten: bool = False, skip: tuple[str, ...] = ()) -> QuantConfig:
    """The rank-ratio mode: every linear becomes its truncated SVD with `num_bits`-bit factors."""
    factors = Format(num_bits)
    recipe = replace(PLAIN, weight=None, low_rank="factors", rank_ratio=ratio, factors=factors, whiten=whiten)
    return QuantConfig((*skipping(skip), Rule("*", recipe)))


def skipping(patterns: tuple[str, ...]) -> list[Rule]:
    """Rules that skip the layers matching these patterns."""
    return [Rule(pattern, None) for pattern in patterns]


def recipe_for(preset: str, **changes: Any) -> Recipe:
    """The recipe of a preset, with some fields replaced. Raises UserError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in RECIPES:
        raise unknown("preset", preset, RECIPES)
    check_names("field of a recipe", changes, (field.name for field in fields(Recipe)))
    return replace(RECIPES[preset], **changes)
