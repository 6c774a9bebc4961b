"""What `svdit quantize` was asked to do: one frozen object, made from the arguments and checked once.

Options that contradict each other are errors that name them; options without effect are reported.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from svdit.errors import UserError
from svdit.kernels.formats import ACT_FORMATS, Format
from svdit.quant.config import RECIPES, QuantConfig, Recipe, dit_config, rank_ratio_config, whole_bytes

ACTS = {4: ACT_FORMATS["int4"], 8: ACT_FORMATS["int8"], 16: None}  # --act-bits
LOW_BIT = {"w8a8": "w4a8", "w8a16": "w4a16"}  # the preset that --num-bits 4 and below start from
AUTO = "auto"  # a preset: measure images
TARGETS = ("target_size", "target_sqnr", "target_psnr")
BY_TARGET = "it chooses the weight format and the rank of each layer"
EXCLUDES = {  # option: the options it excludes, and why
    "rank_ratio": (
        ("preset", "act_bits", "group_size", "rank", "factors", "adaln", *TARGETS),
        "it replaces every linear layer by two quantized factors",
    ),
    "target_size": (("target_sqnr", "target_psnr", "num_bits", "group_size"), BY_TARGET),
    "target_sqnr": (("target_psnr", "num_bits", "group_size"), BY_TARGET),
    "target_psnr": (("num_bits", "group_size"), BY_TARGET),
}


@dataclass(frozen=True)
class QuantizeSettings:
    """The options of `svdit quantize` with their defaults; `given` are those on the command line."""

    preset: str = "w8a8"
    rank_ratio: float | None = None
    num_bits: int | None = None
    act_bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    factors: str = "bf16"
    whiten: bool = False
    adaln: str = "int8"
    target_size: float | None = None  # MB
    target_sqnr: float | None = None  # dB
    target_psnr: float | None = None  # dB
    measured: bool = False  # choose by images
    skip: tuple[str, ...] = ()
    figures: bool = True
    calib_images: int | None = None
    calib_steps: int | None = None
    cfg_scale: float | None = None  # that of the family's protocol
    seed: int = 0
    max_memory: float = 8.0  # GB
    last_block: int | None = None  # the number of the last block, where the model predicts x₀
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for option, (excluded, reason) in EXCLUDES.items():
            for other in excluded:
                if {option, other} <= self.given:
                    raise UserError(f"{flag(other)} excludes {flag(option)}: {reason}; omit one of them")
        for problem in self.problems():
            raise UserError(problem)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "QuantizeSettings":
        """The settings of parsed arguments. Raises UserError for options that do not go together."""
        options = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        given, preset = frozenset(options), options.get("preset", cls.preset)
        options |= {"skip": tuple(options.get("skip", ())), "given": given}
        options["measured"] = preset == AUTO or "target_psnr" in given
        return cls(**options | {"preset": cls.preset if preset == AUTO else preset})

    def problems(self) -> Iterator[str]:
        """A sentence for every option that contradicts the preset or another option."""
        if "" in self.skip:
            yield "--skip is empty; pass a pattern, '*.attn.*' for example"
        if self.whiten and self.rank_ratio is None:
            yield "--whiten requires --rank-ratio; omit it"
        if self.measured and not {"target_size", "target_psnr"} & self.given:
            yield f"--preset {AUTO} requires --target-size or --target-psnr; pass one of them"
        yield from self.format_problems()
        yield from self.branch_problems()
        if target := self.given & set(TARGETS):
            yield from self.target_problems(flag(*target))

    def format_problems(self) -> Iterator[str]:
        """Options of integer formats for a preset of floating-point formats."""
        base = RECIPES[self.preset]
        if base.weight and base.weight.element != "int":
            for option in sorted({"num_bits", "group_size", *TARGETS} & self.given):
                yield f"{flag(option)} requires integer weights, --preset {self.preset} has {base.weight}; omit one"
        if base.act and base.act.element != "int" and self.act_bits in (4, 8):
            yield f"--act-bits is {self.act_bits}, but --preset {self.preset} has {base.act} activations; choose 16"

    def target_problems(self, target: str) -> Iterator[str]:
        """Options that fix what a target chooses."""
        weight = RECIPES[self.preset].weight
        if weight and weight.bits < 8 and not weight.group:
            yield f"--preset {self.preset} has a scale per row, but {target} chooses groups; use another preset"
        if self.rank:
            yield f"--rank excludes {target}, which chooses ranks; omit it, or use --rank 0 for no branch"
        if "adaln" in self.given and self.adaln != "fp16":
            yield f"--adaln {self.adaln} excludes {target}, which chooses bits; omit it, or use fp16"

    def branch_problems(self) -> Iterator[str]:
        """A sentence for every option of the low-rank branch where there is none."""
        branchless = "--rank 0" if self.rank == 0 else f"--preset {self.preset}"
        if self.rank == 0 or (self.rank_ratio is None and RECIPES[self.preset].low_rank == "none"):
            for option in sorted(self.given & ({"factors", "rank"} if self.rank else {"factors"})):
                yield f"{flag(option)} has no effect: there is no low-rank branch with {branchless}; omit one of them"

    def unused(self) -> Iterator[str]:
        """A sentence for every option without effect that contradicts none."""
        if not self.calibrates:
            seeds = set() if self.figures else {"seed", "cfg_scale"}  # figures are measured on other images
            for option in sorted(self.given & {"calib_images", "calib_steps", "max_memory", *seeds}):
                yield f"{flag(option)} has no effect: nothing is calibrated"

    @property
    def recipe(self) -> Recipe:
        """The preset's recipe, changed only in what the options name."""
        preset = self.preset
        if self.num_bits is not None and self.num_bits <= 4:
            published = preset == "svdquant" and self.act_bits == 4
            preset = "svdquant-w4a4" if published else LOW_BIT.get(preset, preset)
        recipe = RECIPES[preset]
        if self.rank is not None:
            recipe = replace(recipe, rank=self.rank)
        if self.factors == "int8":
            recipe = replace(recipe, factors=Format(8))
        if recipe.weight:
            recipe = replace(recipe, weight=changed(recipe.weight, self.num_bits, self.group_size))
        if self.act_bits not in (None, recipe.act.bits if recipe.act else 16):
            recipe = replace(recipe, act=ACTS[self.act_bits or 16])
        return recipe

    @property
    def config(self) -> QuantConfig:
        """What to do with which layer."""
        if self.rank_ratio is not None:
            return rank_ratio_config(self.rank_ratio, self.num_bits or 8, self.whiten, self.skip)
        return dit_config(self.recipe, self.adaln, self.skip, self.last_block)

    @property
    def calibrates(self) -> bool:
        """Whether the layers' inputs are needed at all."""
        recipes = [rule.recipe for rule in self.config.rules if rule.recipe]
        return bool(set(TARGETS) & self.given) or any(recipe.needs_inputs for recipe in recipes)

    def record(self) -> dict[str, Any]:
        """The settings as JSON, for the header of the checkpoint."""
        skip = {"skip": list(self.skip)}
        if self.rank_ratio is not None:
            mode = {"mode": "rank_ratio", "rank_ratio": self.rank_ratio, "num_bits": self.num_bits or 8}
            return {**mode, "whiten": self.whiten, **skip}
        recipes = {"recipe": asdict(self.recipe)}
        if self.last_block is not None:
            recipes["last_block"] = asdict(whole_bytes(self.recipe))
        return {"mode": "preset", "preset": self.preset, "adaln": self.adaln, **skip, **recipes}


def flag(*names: str) -> str:
    """The command line's spelling of a setting."""
    return " and ".join("--no-figures" if name == "figures" else f"--{name.replace('_', '-')}" for name in names)


def changed(form: Format, bits: int | None, group: int | None) -> Format:
    """A weight format with other bits or groups; below 8 bits, groups of 64 unless the format has its own."""
    bits = form.bits if bits is None else bits
    if group is None:
        group = 0 if bits == 8 else 64 if form.bits == 8 else form.group
    if (bits, group) == (form.bits, form.group):
        return form
    scale = form.scale if form.group and not (form.scale == "int8" and bits > 4) else "int8" if bits <= 4 else "bf16"
    span = "symmetric" if bits == 8 else "full" if form.bits == 8 else form.span
    return replace(form, bits=bits, group=group, scale=scale if group else "fp32", span=span)
