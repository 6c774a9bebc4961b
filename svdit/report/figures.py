"""The pictures of `svdit quantize`'s report, drawn from the report's own numbers (`svdit.report.diagnose`).

Layers stand by block, one colour and marker a kind; layers outside of the blocks follow the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.files import atomic_path, writable_folder
from svdit.report.tables import by_kind, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from svdit.quant.report import LayerReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255")
MARKERS = "os^Dvxp*P"  # the first seven colours are Okabe and Ito's
GREYS = ("#DDDDDD", "#999999")
STYLE: Any = {
    "axes.titlesize": 10, "figure.titlesize": 11, "axes.labelsize": 9, "legend.fontsize": 8, "legend.frameon": False,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "savefig.dpi": 130, "legend.title_fontsize": 8,
}  # fmt: skip
Numbers = dict[str, Any]


def draw(folder: Path, lines: Sequence[LayerReport], numbers: Numbers) -> list[Path]:
    """Write a PNG for everything that there are numbers for, and return their paths."""
    pictures: dict[str, tuple[Any, Callable[[], Figure]]] = {
        "layers": (numbers["sqnr"], lambda: layers(lines, numbers["sqnr"])),
        "timesteps": (numbers["errors"], lambda: timesteps(numbers["timesteps"], numbers["errors"])),
        "spectra": (numbers["spectra"], lambda: spectra(numbers["spectra"])),
        "smoothing": (numbers["smoothing"], lambda: smoothing(numbers["smoothing"])),
        "activations": (numbers["activations"], lambda: activations(numbers["activations"])),
        "pareto": (numbers.get("curve"), lambda: pareto(numbers["curve"], numbers["chosen"])),
    }
    from matplotlib import rc_context

    writable_folder(folder)
    paths = []
    for name, (there, picture) in pictures.items():
        if there:
            paths.append(folder / f"{name}.png")
            with rc_context(STYLE), atomic_path(paths[-1]) as temporary:
                picture().savefig(temporary)
    return paths


def layers(lines: Sequence[LayerReport], sqnr: dict[str, float | None]) -> Figure:
    """Output SQNR of every layer above, what it weighs below."""
    at = positions([line.name for line in lines])
    figure, ((top,), (bottom,)) = blank(2, 1, 4 + 0.2 * max(16, *at.values()), 6, sharex=True)
    before, height = dict.fromkeys(at.values(), 0.0), dict.fromkeys(at.values(), 0.0)
    for line in lines:
        before[at[line.name]] += line.bytes_before / 1e6
    bottom.bar(before.keys(), before.values(), 0.9, color=GREYS[0], label="before")
    for (kind, members), colour, marker in zip(by_kind(lines).items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        x, sizes = [at[line.name] for line in members], [line.bytes_after / 1e6 for line in members]
        top.plot(x, [sqnr[line.name] for line in members], color=colour, marker=marker, ms=4.5, lw=1, label=kind)
        bottom.bar(x, sizes, 0.6, [height[i] for i in x], color=colour)
        for i, size in zip(x, sizes, strict=True):
            height[i] += size
    top.set(title="How exact each layer's output is, and what it weighs", ylabel="SQNR, dB")
    top.grid(alpha=0.3)
    bottom.set(xlabel="block", ylabel="size, MB")
    mark_blocks(bottom, at, 16)
    for axis in (top, bottom):
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def timesteps(steps: Sequence[int], errors: dict[str, dict[str, list[float]]]) -> Figure:
    """A row a layer, a column a timestep, a panel a guidance half."""
    from matplotlib.colors import LogNorm

    halves = {half: by_kind(table) for half, table in errors.items()}
    kinds = next(iter(halves.values()))
    rows = sum(map(len, kinds.values()))
    figure, (panels,) = blank(1, len(halves), 2.2 + 3 * len(halves), min(9.0, 2.6 + 0.055 * rows), sharey=True)
    tables = [[errors[half][name] for members in kinds.values() for name in members] for half in halves]
    found = [100 * error for table in tables for row in table for error in row if error]
    norm = LogNorm(min(found, default=1), max(found, default=1))
    for axis, half, table in zip(panels, halves, tables, strict=True):
        image = axis.imshow(
            [[100 * e for e in row] for row in table], norm=norm, cmap="viridis", aspect="auto", interpolation="nearest"
        )
        axis.set(title=half, xlabel="timestep, noise to picture")
        axis.set_xticks(range(len(steps)), [str(t) for t in steps], rotation=90)
        separate(axis, kinds)
    bar = figure.colorbar(image, ax=list(panels), label="relative error of the output, %")
    few_decades(bar.ax.yaxis)
    figure.suptitle("Where and when layers err; of each kind the first block is on top")
    return figure


def separate(axis: Axes, kinds: dict[str, Any]) -> None:
    """Name the bands of a heat map's rows, and draw a line between them."""
    ends = [sum(map(len, list(kinds.values())[: i + 1])) for i in range(len(kinds))]
    for end in ends[:-1]:
        axis.axhline(end - 0.5, color="white", lw=1.5)
    middles = [end - len(members) / 2 - 0.5 for end, members in zip(ends, kinds.values(), strict=True)]
    axis.set_yticks(middles, list(kinds))
    axis.tick_params(axis="y", length=0)


LINES = {
    "original": ("W", GREYS[1], 2.5),
    "transformed": ("Ŵ = (W Λ) H", COLOURS[0], 1.3),
    "remaining": ("Ŵ − L1 L2", COLOURS[1], 1.3),
}


def spectra(measured: dict[str, Numbers]) -> Figure:
    """Singular values of the weight before and after the transform, and of what the branch leaves of it."""
    figure, panels = panels_for(measured)
    for axis, (name, found) in zip(panels, measured.items(), strict=False):
        for key, (label, colour, width) in LINES.items():
            values = [value for value in found[key] if value > 1e-6]
            axis.plot(range(1, len(values) + 1), values, color=colour, lw=width, label=label)
        axis.axvline(found["rank"], color="black", ls=":", lw=1, label=f"rank {found['rank']}")
        axis.set(title=name, xscale="log", yscale="log", xlabel="i", ylabel="σᵢ over the weight's norm")
        few_decades(axis.xaxis)
        few_decades(axis.yaxis)
        axis.legend(loc="lower left")
    figure.suptitle("Singular values σᵢ of the weight, and of what its low-rank branch leaves to round")
    return figure


def smoothing(chosen: dict[str, Numbers]) -> Figure:
    """α and β above, the spread of λ below; a column a kind."""
    kinds = by_kind(chosen)
    figure, axes = blank(2, len(kinds), 1.6 + 2.4 * len(kinds), 5.2, sharey="row", sharex=True)
    at = positions(chosen)
    for (kind, names), top, bottom in zip(kinds.items(), *axes, strict=True):
        x = [at[name] for name in names]
        for key, label, colour, marker in (
            ("alpha", "α, of inputs", COLOURS[0], "o"),
            ("beta", "β, of weights", COLOURS[1], "s"),
        ):
            top.plot(x, [chosen[name][key] for name in names], marker, color=colour, ms=4, mfc="none", label=label)
        low, p10, middle, p90, high = zip(*(chosen[name]["scale_quantiles"] for name in names), strict=True)
        bottom.vlines(x, low, high, color=COLOURS[0], lw=0.8, label="all")
        bottom.vlines(x, p10, p90, color=COLOURS[0], lw=3.5, label="80 %")
        bottom.plot(x, middle, "_", color="black", ms=6, label="median")
        top.set(title=kind, ylim=(-0.05, 1.05))
        bottom.set(yscale="log", xlabel="block")
        few_decades(bottom.yaxis)
        mark_blocks(bottom, {name: at[name] for name in names}, 8)
    axes[0, 0].set_ylabel("exponent")
    axes[1, 0].set_ylabel("λ of the layer's channels")
    for axis in axes[:, -1]:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("Smoothing: λ = max |x|^α / max |W|^β")
    return figure


def activations(measured: dict[str, Numbers]) -> Figure:
    """Histograms of a few layers' inputs before and after centring, smoothing and rotation."""
    figure, panels = panels_for(measured)
    for axis, (name, both) in zip(panels, measured.items(), strict=False):
        for key, label, colour in (("before", "x", COLOURS[1]), ("after", "x̂", COLOURS[0])):
            limit, shares = both[key]["limit"], both[key]["shares"]
            edges = [limit * (2 * i / len(shares) - 1) for i in range(len(shares) + 1)]
            axis.stairs(shares, edges, color=colour, lw=1.3, label=f"{label}: {both[key]['peak']:.1f}")
        axis.set(title=name, yscale="log", xlabel="value over root mean square", ylabel="share of values")
        axis.legend(title="largest of a row")
    figure.suptitle("Inputs of the least exact layers, as they come (x) and as they are rounded (x̂)")
    return figure


def pareto(curve: Sequence[tuple[int, float]], chosen: tuple[int, float]) -> Figure:
    """The best predicted quality for every size."""
    figure, ((axis,),) = blank(1, 1, 6.5, 4.2)
    axis.step([size / 1e6 for size, _ in curve], [quality for _, quality in curve], where="post", color=COLOURS[0])
    axis.plot(
        chosen[0] / 1e6, chosen[1], "*", color=COLOURS[1], ms=13, label=f"{chosen[0] / 1e6:.4g} MB, {chosen[1]:.1f} dB"
    )
    axis.set(
        title="The best choice of bits and ranks for every size",
        xlabel="file, MB",
        ylabel="predicted SQNR of the output, dB",
    )
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    return figure


def blank(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of that size in inches and its axes, (rows, columns) of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def few_decades(axis: Axis) -> None:
    """Plain numbers along a logarithmic axis, enough of them also within one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def panels_for(measured: dict[str, Any]) -> tuple[Figure, list[Axes]]:
    """Two panels to a row, as many as there are things to show."""
    columns, rows = min(2, len(measured)), -(-len(measured) // 2)
    figure, axes = blank(rows, columns, max(7, 1 + 4 * columns), 0.6 + 2.8 * rows)
    for axis in list(axes.flat)[len(measured) :]:
        axis.set_visible(False)
    return figure, list(axes.flat)


def positions(names: Iterable[str]) -> dict[str, float]:
    """Where layers stand: at their block's number, or one after the other, at halves, behind the last block."""
    blocks = {name: place(name)[1] for name in names}
    last = max((block for block in blocks.values() if block is not None), default=-1)
    outside = [name for name, block in blocks.items() if block is None]
    return {name: last + 1.5 + outside.index(name) if block is None else block for name, block in blocks.items()}


def mark_blocks(axis: Axes, at: dict[str, float], most: int) -> None:
    """Ticks for the blocks, `most` or fewer; what stands behind the last one is told by its colour."""
    numbers = sorted({x for x in at.values() if isinstance(x, int)})
    axis.set_xticks(numbers[:: -(-len(numbers) // most) or 1])
