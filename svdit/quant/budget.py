"""Bits, group and rank of every layer for a size or a quality: the least predicted output error within a budget.

Each layer offers options (bytes, error); choosing one each is a multiple-choice knapsack. Sizes are rounded up to
1/RESOLUTION of the largest; with them the dynamic programme is exact, so the choice is at least as good as every
one whose size is smaller by a layer count of such units. Errors are those of rounding to nearest on the calibration
sample, times what GPTQ leaves of them, and weighted by how much the layer's output moves the model's (`sensitivity`).
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.quant.config import QuantConfig, Recipe, Rule
from svdit.quant.gptq import Inverse
from svdit.quant.linear import LinearSpec, linears
from svdit.quant.lowrank import truncated_svd
from svdit.quant.observe import ForwardLoop, Statistics, observe
from svdit.quant.sensitivity import Call, recording, sensitivities
from svdit.quant.solve import fit
from svdit.quant.transforms import TRIED, Transform, choose_transform

RESOLUTION = 1 << 14
HEADER = 1500  # bytes that a layer's names and spec take in the file
WEIGHTS = (
    Format(2, 64, "int8", "full"),
    Format(3, 64, "int8", "full"),
    WEIGHT_FORMATS["int4"],
    Format(5, 64, "bf16", "full"),
    Format(6, 64, "bf16", "full"),
    WEIGHT_FORMATS["int8"],
)
RANKS = (0, 8, 16, 32, 64)
PLENTY = 6  # bits, from which on activations decide


class Option(NamedTuple):
    recipe: Recipe
    nbytes: int
    error: float  # added to the squared norm of the model's output error

    @property
    def bits(self) -> int:
        assert self.recipe.weight is not None
        return self.recipe.weight.bits


@dataclass(frozen=True)
class Plan:
    """A choice for every layer, and the whole curve it was taken from: (bytes of the file, predicted SQNR in dB).

    `statistics` are those of the layers' inputs, for `quantize_` to use again.
    """

    config: QuantConfig
    nbytes: int
    sqnr: float
    curve: list[tuple[int, float]]
    statistics: dict[str, Statistics] = field(repr=False)


def plan_(
    model: nn.Module,
    config: QuantConfig,
    loop: ForwardLoop,
    *,
    target_bytes: int | None = None,
    target_sqnr: float | None = None,
) -> Plan:
    """The best configuration for a file of at most `target_bytes`, or the smallest with `target_sqnr` dB.

    `config` says which layers, how their inputs are transformed and rounded, and the rest of the recipe; weights'
    formats and ranks are chosen here. The model is not changed.
    """
    calls: list[Call] = []
    names = [name for name, _ in linears(model) if config.recipe(name)]
    statistics = observe(model, names, recording(loop, calls))
    return allot(model, config, statistics, calls, target_bytes, target_sqnr)


def allot(
    model: nn.Module,
    config: QuantConfig,
    statistics: dict[str, Statistics],
    calls: list[Call],
    target_bytes: int | None,
    target_sqnr: float | None,
) -> Plan:
    """`plan_` on what was observed: the layers' inputs, and some calls of the model."""
    layers = {name: (layer, recipe) for name, layer in linears(model) if (recipe := config.recipe(name))}
    weights, energy = sensitivities(model, layers, calls)
    every = {n: options(*pair, statistics[n], weights[n]) for n, pair in layers.items()}
    fixed = sum(t.nbytes for t in model.state_dict().values()) + HEADER * len(layers)
    fixed -= sum(p.nbytes for layer, _ in layers.values() for p in layer.parameters())
    choices = {name: frontier(found) for name, found in every.items()}
    table = Table(list(choices.values()))
    curve = [(fixed + size, 10 * float(np.log10(energy / error))) for size, error in table.curve()]
    if target_bytes is not None:
        if target_bytes < curve[0][0]:
            raise UserError(
                f"{target_bytes / 1e6:.2f} MB cannot be reached; the smallest is {curve[0][0] / 1e6:.2f} MB"
            )
        room = target_bytes - fixed
        choices = {name: frontier(left) for name, left in no_less_than_uniform(every, layers, room).items()}
        table = Table(list(choices.values()))
    else:
        assert target_sqnr is not None, "give target_bytes or target_sqnr"
        good = [size for size, db in curve if db >= target_sqnr]
        if not good:
            raise UserError(f"{target_sqnr} dB cannot be reached; the best is {curve[-1][1]:.1f} dB")
        room = good[0] - fixed
    chosen = {name: choices[name][pick] for name, pick in zip(choices, table.solve(room), strict=True)}
    nbytes = fixed + sum(option.nbytes for option in chosen.values())
    sqnr = 10 * float(np.log10(energy / sum(option.error for option in chosen.values())))
    rules = tuple(Rule(name, option.recipe) for name, option in chosen.items())
    return Plan(QuantConfig(rules), nbytes, sqnr, curve, statistics)


def options(linear: nn.Linear, recipe: Recipe, statistics: Statistics, sensitivity: float) -> list[Option]:
    """What a layer could be stored as."""
    W, x = linear.weight.detach().float(), statistics.selection_rows[:TRIED]
    transform, _ = (
        choose_transform(W, statistics, fit(recipe, W)) if recipe.smoothing else (plain(recipe, statistics), 0)
    )
    hat, What = transform.inputs(x), transform.weight(W)
    lost = ref.fake_quantize(hat, recipe.act) - hat if recipe.act else 0 * hat
    left = Inverse(transform.second_moment(statistics)).left if recipe.rounding == "gptq" else 1.0
    l1, l2 = truncated_svd(What, min(max(RANKS), *W.shape)) if recipe.rank else (W[:, :0], W[:0])
    found: list[Option] = []
    for rank in RANKS if recipe.rank else (0,):
        residual = What - l1[:, :rank] @ l2[:rank]
        of_inputs = float((lost @ residual.T).square().sum())
        for form in WEIGHTS:
            if form.group and W.shape[1] % form.group:
                continue
            of_weights = float((hat @ (ref.fake_quantize(residual, form) - residual).T).square().sum())
            low_rank = recipe.low_rank if rank else "none"
            variant = fit(replace(recipe, weight=form, rank=rank, low_rank=low_rank), W)
            error = (of_inputs + left * of_weights) / len(x) * sensitivity
            found.append(Option(variant, size_of(variant, transform, linear), error))
    return found


def frontier(options: list[Option]) -> list[Option]:
    """Those that are not larger and worse than another, by size."""
    best, kept = float("inf"), []
    for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
        if option.error < best:
            best = option.error
            kept.append(option)
    return kept


def no_less_than_uniform(
    every: dict[str, list[Option]], layers: dict[str, tuple[nn.Linear, Recipe]], room: int
) -> dict[str, list[Option]]:
    """If a uniform setting of PLENTY bits or more fits, with the recipes' ranks: only what is at least that.

    Rounded inputs decide there, and a branch in every layer is worth more than its layer shows.
    """
    for bits in sorted({form.bits for form in WEIGHTS if form.bits >= PLENTY}, reverse=True):
        left: dict[str, list[Option]] = {}
        for name, (linear, recipe) in layers.items():
            least = recipe.weight.bits if recipe.weight and recipe.low_rank == "none" else bits  # adaLN keeps its own
            rank = fit(recipe, linear.weight).rank
            left[name] = [o for o in every[name] if o.bits >= least and o.recipe.rank >= rank]
        if all(left.values()) and sum(min(o.nbytes for o in found) for found in left.values()) <= room:
            return left
    return every


def plain(recipe: Recipe, statistics: Statistics) -> Transform:
    return Transform(statistics.mean if recipe.centre else None, None, recipe.hadamard)


def size_of(recipe: Recipe, transform: Transform, linear: nn.Linear) -> int:
    scaled, shifted = transform.scale is not None, transform.shift is not None
    spec = LinearSpec(recipe.rank, recipe.factors, recipe.factor_dtype, recipe.weight, None, scaled, shifted)
    return spec.nbytes(linear.out_features, linear.in_features, shifted or linear.bias is not None)


class Table:
    """The dynamic programme over layers: least error for every size up to the largest sensible one."""

    def __init__(self, choices: list[list[Option]]) -> None:
        self.choices = choices
        largest = sum(options[-1].nbytes for options in choices)
        self.unit = max(1, -(-largest // RESOLUTION))
        self.sizes = [[-(-o.nbytes // self.unit) for o in options] for options in choices]
        width = sum(sizes[-1] for sizes in self.sizes) + 1
        least = np.full(width, np.inf)
        least[0] = 0.0
        self.picked: list[np.ndarray[tuple[int], np.dtype[np.int16]]] = []
        for options, sizes in zip(choices, self.sizes, strict=True):
            after, picked = np.full(width, np.inf), np.full(width, -1, np.int16)
            for i, (option, size) in enumerate(zip(options, sizes, strict=True)):
                error = np.full(width, np.inf)
                error[size:] = least[: width - size] + option.error
                better = error < after
                after[better], picked[better] = error[better], i
            least = after
            self.picked.append(picked)
        self.least = least

    def solve(self, nbytes: int) -> list[int]:
        """The options, one a layer, of least total error within `nbytes`; the smallest, if only rounding is over it."""
        at = int(self.least[: nbytes // self.unit + 1].argmin())
        if np.isinf(self.least[at]):
            return [0] * len(self.choices)
        picks: list[int] = []
        for picked, sizes in zip(reversed(self.picked), reversed(self.sizes), strict=True):
            picks.append(int(picked[at]))
            at -= sizes[picks[-1]]
        return picks[::-1]

    def curve(self) -> list[tuple[int, float]]:
        """(bytes, error) of every choice that no smaller one equals; ascending in bytes."""
        best = np.minimum.accumulate(self.least)
        steps = np.flatnonzero(np.isfinite(best) & (best < np.concatenate([[np.inf], best[:-1]])))
        return [(int(s) * self.unit, float(best[s])) for s in steps]
