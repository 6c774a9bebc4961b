"""Titles of pictures: what they show, of which model, in which setting, on which day; and the style of plots."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.extras import require
from svdit.files import atomic_path
from svdit.printing import printable

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's seven colours, distinct for colour-blind readers, and two more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255")
MARKERS = "os^Dvxp*P"
GREYS = ("#DDDDDD", "#999999")
STYLE: Any = {
    "axes.titlesize": 10, "figure.titlesize": 11, "axes.labelsize": 9.5, "legend.fontsize": 9, "legend.frameon": False,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 130, "legend.title_fontsize": 9,
}  # fmt: skip
FULL_PRECISION = "full precision"
MOST = 80  # characters of a part of a title


def subject(*parts: str, day: str = "") -> str:
    """ "DiT-digits, w4a8, rank 8, 2026-11-28": what a picture is of, and the day; by default today."""
    return ", ".join(filter(None, (*(part[:MOST] for part in parts), day or date.today().isoformat())))


def setting(quantization: Mapping[str, Any] | None) -> str:
    """The preset and what was chosen beside it, from the record in a checkpoint; None: full precision."""
    if not quantization:
        return FULL_PRECISION
    if quantization.get("mode") == "unrecorded":
        return "quantized"
    if quantization.get("mode") == "rank_ratio":
        return f"rank ratio {quantization.get('rank_ratio')}, {quantization.get('num_bits')} bits"
    plan = quantization.get("plan") or {}
    units = (("target_mb", "at most {:g} MB"), ("target_sqnr", "at least {:g} dB"), ("target_psnr", "PSNR {:g} dB"))
    targets = [text.format(plan[key]) for key, text in units if plan.get(key) is not None]
    recipe = quantization.get("recipe") or {}
    rank = recipe.get("rank") if recipe.get("low_rank") != "none" else 0
    return ", ".join([str(quantization.get("preset")), *(targets or [f"rank {rank}"] * bool(rank))])


def plot(path: Path, title: str, about: str, draw: Callable[[], Figure]) -> None:
    """Write the figure that `draw` returns as a PNG, below its title. Raises UserError without matplotlib."""
    require("matplotlib")
    from matplotlib import rc_context

    with rc_context(STYLE), atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font does not have
        figure = draw()
        lines = (printable(line) for line in (title, *about.split("\n")))
        figure.suptitle("\n".join(lines), parse_math=False)
        figure.savefig(temporary, format="png")


def blank(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def few_decades(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, also within one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
