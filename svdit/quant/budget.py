"""Bits, group and rank of every layer for a size or a quality: the least predicted output error within a budget.

Each layer offers options (bytes, error), of which `knapsack.Table` chooses one. An option's error is that of rounding
to nearest on the calibration sample, times the share that GPTQ leaves, times the squared effect of the layer's output
on the model's (`sensitivities`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np
from torch import nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.quant.config import QuantConfig, Recipe, Rule
from svdit.quant.gptq import Inverse
from svdit.quant.knapsack import Option, Table, frontier
from svdit.quant.linear import LinearSpec
from svdit.quant.lowrank import truncated_svd
from svdit.quant.observe import ForwardLoop, Statistics, chunks, full_precision, observe
from svdit.quant.select import Selection, select
from svdit.quant.sensitivity import Call, recording, sensitivities
from svdit.quant.solve import fit
from svdit.quant.transforms import Transform, choose_transform

HEADER = 1500  # bytes of a layer's names and spec in the file
WEIGHTS = (
    Format(2, 64, "int8", "full"),
    Format(3, 64, "int8", "full"),
    WEIGHT_FORMATS["int4"],
    Format(5, 64, "bf16", "full"),
    Format(6, 64, "bf16", "full"),
    WEIGHT_FORMATS["int8"],
)
RANKS = (0, 8, 16, 32, 64)
PLENTY = 6  # from this many bits on, the error of the activations dominates


Options = dict[str, list[Option]]  # by layer


@dataclass(frozen=True)
class Plan:
    """An option for every layer, and the curve of (bytes of the file, predicted SQNR in dB) it was chosen from.

    `uniform` are the settings with the same bits and rank in every layer: (bits, rank, bytes, predicted SQNR).
    `statistics` are those of the layers' inputs, for `quantize_` to reuse; None where memory did not suffice.
    """

    config: QuantConfig
    nbytes: int
    sqnr: float
    curve: list[tuple[int, float]]
    uniform: list[tuple[int, int, int, float]]
    statistics: dict[str, Statistics] | None = field(repr=False)


def plan_(
    model: nn.Module,
    config: QuantConfig,
    loop: ForwardLoop,
    *,
    target_bytes: int | None = None,
    target_sqnr: float | None = None,
    max_memory: float = 8e9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """The best configuration for a file of at most `target_bytes`, or the smallest with `target_sqnr` dB.

    `config` selects the layers and all of their recipes but weight formats and ranks, which are chosen here. The
    model is not changed. `max_memory` bounds the bytes of calibration statistics held at once, as in `quantize_`.
    `progress(done, total)` counts layers.
    Raises UserError for a target that cannot be reached, for none or two, and for what `select` and `observe` refuse.
    """
    if (target_bytes is None) == (target_sqnr is None):
        raise UserError(f"target_bytes is {target_bytes} and target_sqnr {target_sqnr}; pass one of them")
    planner = observed(model, config, loop, max_memory=max_memory, progress=progress)
    return planner.reaching(target_sqnr) if target_sqnr is not None else planner.within(target_bytes or 0)


def observed(
    model: nn.Module,
    config: QuantConfig,
    loop: ForwardLoop,
    *,
    max_memory: float = 8e9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "Planner":
    """A planner for the model, which is not changed, on the loop's inputs; the arguments of `plan_`.

    Raises UserError for what `select` and `observe` refuse.
    """
    selection, calls, options = select(model, config), list[Call](), Options()
    sizes = {name: Statistics.nbytes(linear.in_features) for name, linear in selection.linears.items()}
    pieces = chunks(sizes, max_memory)
    for piece in pieces:
        statistics = observe(model, piece, loop if calls else recording(loop, calls))
        for name, choices in options_of(selection, statistics):
            options[name] = choices
            progress(len(options), len(sizes))
    return Planner(model, selection, options, calls, statistics if len(pieces) == 1 else None)


class Planner:
    """The options of every layer of a model, from which plans for any target follow."""

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        options: Options,
        calls: list[Call],
        statistics: dict[str, Statistics] | None = None,
    ) -> None:
        """The options' errors are weighted by the sensitivities on these calls; UserError if one is not finite."""
        weights, self.energy = sensitivities(model, selection.recipes, calls)
        if bad := [name for name, weight in weights.items() if not math.isfinite(weight)]:
            raise UserError(f"the effect of layer {bad[0]} on the output is not finite; use a checkpoint in float32")
        self.options = {n: [o._replace(error=o.error * weights[n]) for o in options[n]] for n in selection.recipes}
        self.selection, self.statistics = selection, statistics
        self.fixed = sum(t.nbytes for t in model.state_dict().values()) + HEADER * len(options)
        self.fixed -= sum(p.nbytes for linear in selection.linears.values() for p in linear.parameters())
        self.table = Table([frontier(each) for each in self.options.values()])
        self.curve = [(self.fixed + size, decibels(self.energy, error)) for size, error in self.table.curve()]

    def within(self, target_bytes: int) -> Plan:
        """The best plan for a file of at most `target_bytes`. Raises UserError where there is none."""
        least = self.curve[0][0]
        if target_bytes < least:
            raise UserError(f"{target_bytes / 1e6:.2f} MB is too small; the minimum is about {least / 1e6:.2f} MB")
        available = target_bytes - self.fixed
        options = at_least_uniform(self.options, self.selection, available)
        return self._plan(Table([frontier(each) for each in options.values()]), available)

    def reaching(self, target_sqnr: float) -> Plan:
        """The smallest plan of this predicted SQNR in dB. Raises UserError where there is none."""
        good = [size for size, sqnr in self.curve if sqnr >= target_sqnr]
        if not good:
            raise UserError(f"{target_sqnr} dB is too high; the maximum is {self.curve[-1][1]:.1f} dB")
        return self._plan(self.table, good[0] - self.fixed)

    def choices(self, target_bytes: int) -> list[Plan]:
        """Different plans for a file of at most `target_bytes`, the first as `within`, the last one uniform.

        Raises UserError where there is none.
        """
        plans, available = [self.within(target_bytes)], target_bytes - self.fixed
        plans.append(self._plan(self.table, available))
        within = [each for each in self._uniform().values() if sum(o.nbytes for o in each) <= available]
        if within:
            least = min(within, key=lambda each: sum(o.error for o in each))
            plans.append(self._plan(Table([[option] for option in least]), available))
        return [plan for i, plan in enumerate(plans) if plan.config not in [other.config for other in plans[:i]]]

    @cached_property
    def uniform(self) -> list[tuple[int, int, int, float]]:
        """(bits, rank, bytes, predicted SQNR) of the plans with the same bits and rank in every layer."""
        return [(bits, rank, *self._predicted(chosen)) for (bits, rank), chosen in self._uniform().items()]

    def _predicted(self, chosen: list[Option]) -> tuple[int, float]:
        nbytes = self.fixed + sum(option.nbytes for option in chosen)
        return nbytes, decibels(self.energy, sum(option.error for option in chosen))

    def _uniform(self) -> dict[tuple[int, int], list[Option]]:
        """By bits and rank, the options of every layer with them; adaLN keeps its bits."""
        settings: dict[tuple[int, int], list[Option]] = {}
        for bits, rank in product(sorted({form.bits for form in WEIGHTS}), RANKS):
            chosen: list[Option] = []
            for name, linear in self.selection.linears.items():
                recipe = self.selection.recipes[name]
                own = recipe.weight.bits if recipe.weight and recipe.low_rank == "none" else bits
                fitted = fit(replace(recipe, rank=rank), linear.weight).rank
                chosen += [o for o in self.options[name] if (o.bits, o.recipe.rank) == (own, fitted)]
            if len(chosen) == len(self.options):
                settings[bits, rank] = chosen
        return settings

    def _plan(self, table: Table, available: int) -> Plan:
        chosen = [options[i] for options, i in zip(table.choices, table.solve(available), strict=True)]
        rules = QuantConfig(tuple(Rule(n, option.recipe) for n, option in zip(self.options, chosen, strict=True)))
        return Plan(rules, *self._predicted(chosen), self.curve, self.uniform, self.statistics)


def decibels(energy: float, error: float) -> float:
    """10 log10 of energy to error, which may be zero."""
    return 10 * float(np.log10(max(energy, 1e-30) / max(error, 1e-30)))


def options_of(selection: Selection, statistics: dict[str, Statistics]) -> Iterator[tuple[str, list[Option]]]:
    """Each layer with statistics, and its options, their errors per unit of sensitivity."""
    for name, each in statistics.items():
        with full_precision(each.total.device):
            options = layer_options(selection.linears[name], selection.recipes[name], each)
        yield name, options


def layer_options(linear: nn.Linear, recipe: Recipe, statistics: Statistics) -> list[Option]:
    """How a layer could be stored, with the squared output error of each option."""
    W, x = linear.weight.detach().float(), statistics.sample
    transform, _ = choose_transform(W, statistics, fit(recipe, W))
    hat, What = transform.inputs(x), transform.weight(W)
    lost = ref.fake_quantize(hat, recipe.act) - hat if recipe.act else 0 * hat
    left = Inverse(transform.second_moment(statistics)).left if recipe.rounding == "gptq" else 1.0
    l1, l2 = truncated_svd(What, min(max(RANKS), *W.shape)) if recipe.rank else (W[:, :0], W[:0])
    options: list[Option] = []
    for rank in RANKS if recipe.rank else (0,):
        residual = What - l1[:, :rank] @ l2[:rank]
        input_error = float((lost @ residual.T).square().sum())
        for form in WEIGHTS:
            if form.group and W.shape[1] % form.group:
                continue
            weight_error = float((hat @ (ref.fake_quantize(residual, form) - residual).T).square().sum())
            low_rank = recipe.low_rank if rank else "none"
            variant = fit(replace(recipe, weight=form, rank=rank, low_rank=low_rank), W)
            error = (input_error + left * weight_error) / len(x)
            options.append(Option(variant, size_of(variant, transform, linear), error))
    return options


def at_least_uniform(options: Options, selection: Selection, available: int) -> Options:
    """If a uniform setting of at least PLENTY bits fits with the recipes' ranks, only options at least as large.

    Rounded inputs dominate there, and a branch in every layer improves the images more than the layer's own error.
    """
    for bits in sorted({form.bits for form in WEIGHTS if form.bits >= PLENTY}, reverse=True):
        left: Options = {}
        for name, linear in selection.linears.items():
            recipe = selection.recipes[name]
            least = recipe.weight.bits if recipe.weight and recipe.low_rank == "none" else bits  # adaLN keeps its own
            rank = fit(recipe, linear.weight).rank
            left[name] = [o for o in options[name] if o.bits >= least and o.recipe.rank >= rank]
        if all(left.values()) and sum(min(o.nbytes for o in each) for each in left.values()) <= available:
            return left
    return options


def size_of(recipe: Recipe, transform: Transform, linear: nn.Linear) -> int:
    """Bytes of the layer that this recipe stores."""
    scaled, shifted = transform.scale is not None, transform.shift is not None
    spec = LinearSpec(recipe.rank, recipe.factors, recipe.factor_dtype, recipe.weight, None, scaled, shifted)
    return spec.nbytes(linear.out_features, linear.in_features, shifted or linear.bias is not None)
