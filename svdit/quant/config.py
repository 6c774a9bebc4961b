"""What to do with which layer: recipes, rules that map name patterns to recipes, and the presets.

A preset is a `QuantConfig`; every comparison between methods is made by switching parts of one recipe.
Patterns are those of fnmatch and the first that matches a layer's name decides.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from svdit.errors import UserError
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format

LowRank = Literal["none", "factors", "svd", "iterated", "correction", "alternated"]


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantized.

    `low_rank`: factors (no residual, the rank-ratio mode), svd (split off once), iterated (SVDQuant as published),
    correction (of the rounding error, weighted by the inputs: QERA), alternated (rounding and weighted refit in turn).
    `smoothing`: candidates of the grid: 0 none, 39 as published, 19 and 7 every second and fifth of them.
    """

    weight: Format | None = WEIGHT_FORMATS["int8"]
    act: Format | None = ACT_FORMATS["int8"]
    low_rank: LowRank = "alternated"
    rank: int = 32
    rank_ratio: float | None = None
    factors: Format | None = None
    factor_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    whiten: bool = False  # low_rank="factors": weight the SVD by the inputs' second moment
    centre: bool = True  # subtract the calibrated mean input
    shift: float = 0.0  # subtract a constant instead (SVDQuant's for the input of fc2)
    smoothing: Literal[0, 7, 19, 39] = 7
    hadamard: int = 64
    search_scales: bool = True  # weight scales by weighted squared error, not by the largest magnitude
    rounding: Literal["nearest", "gptq"] = "gptq"
    iterations: int = 2

    def __post_init__(self) -> None:
        if self.low_rank == "factors" and (self.weight or self.act):
            raise UserError(f"low_rank='factors' leaves no residual, but weight is {self.weight} and act {self.act}")
        if self.low_rank != "factors" and self.weight is None:
            raise UserError(f"low_rank={self.low_rank!r} needs a weight format; give one, or low_rank='factors'")
        if self.centre and self.shift:
            raise UserError(f"centre and shift={self.shift} exclude each other; choose one")
        if self.rank < 0 or self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise UserError(f"rank {self.rank} and hadamard {self.hadamard}: give a rank >= 0 and a power of two")

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration is needed at all."""
        return self.whiten or self.centre or bool(self.smoothing) or self.rounding == "gptq" or self.search_scales


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` get `recipe`; None leaves them alone."""

    pattern: str
    recipe: Recipe | None


@dataclass(frozen=True)
class QuantConfig:
    """Rules in order of precedence; a layer that no rule matches is left alone."""

    rules: tuple[Rule, ...] = (Rule("*", Recipe()),)

    def recipe(self, name: str) -> Recipe | None:
        """The recipe of the layer called `name`."""
        return next((rule.recipe for rule in self.rules if fnmatchcase(name, rule.pattern)), None)


# One INT8 scale a row, weights only: adaLN is a third of DiT's parameters and a five-hundredth of its work.
ADALN = {
    "int8": Recipe(
        act=None,
        low_rank="none",
        rank=0,
        centre=False,
        smoothing=0,
        hadamard=0,
        search_scales=False,
        rounding="nearest",
    ),
    "int4": Recipe(WEIGHT_FORMATS["int4-zero"], None, low_rank="none", rank=0, centre=False, smoothing=0, hadamard=0),
    "fp16": None,
}

FULL = Recipe(rank=16)  # more gives eight bits nothing
FOUR_BITS = replace(FULL, weight=WEIGHT_FORMATS["int4"], rank=32, smoothing=19, iterations=3)
PUBLISHED = Recipe(
    low_rank="iterated",
    centre=False,
    smoothing=39,
    hadamard=0,
    search_scales=False,
    rounding="nearest",
    iterations=100,
)
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

GELU_SHIFT = -0.171875  # −11/64, below the minimum −0.17004 of tanh-GELU; shifted inputs of fc2 are never negative


def dit_config(recipe: Recipe, adaln: str = "int8", skip: tuple[str, ...] = ()) -> QuantConfig:
    """The rules for a DiT: the linears of the blocks by `recipe`, adaLN by itself, the rest left alone."""
    fc2 = recipe
    if recipe.act == INT4_SYMMETRIC and recipe.smoothing and not recipe.centre:
        fc2 = replace(recipe, shift=GELU_SHIFT, act=replace(recipe.act, span="unsigned"))
    return QuantConfig(
        (
            *(Rule(pattern, None) for pattern in skip),
            Rule("*adaLN_modulation*", ADALN[adaln]),
            Rule("blocks.*.mlp.fc2", fc2),
            Rule("blocks.*", recipe),
        )
    )


def rank_ratio_config(ratio: float, num_bits: int, whiten: bool = False, skip: tuple[str, ...] = ()) -> QuantConfig:
    """The documented mode: every linear becomes its truncated SVD with `num_bits`-bit factors."""
    recipe = Recipe(
        weight=None,
        act=None,
        low_rank="factors",
        rank_ratio=ratio,
        factors=Format(num_bits),
        whiten=whiten,
        centre=False,
        smoothing=0,
        hadamard=0,
        search_scales=False,
        rounding="nearest",
    )
    return QuantConfig((*(Rule(pattern, None) for pattern in skip), Rule("*", recipe)))


def recipe_for(preset: str, **changes: Any) -> Recipe:
    """The recipe of a preset, with some fields replaced."""
    if preset not in RECIPES:
        raise UserError(f"there is no preset {preset!r}; choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[preset], **changes)
