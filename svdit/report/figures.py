"""The figures of `svdit quantize`'s report, from the numbers of `svdit.report.diagnose`.

The x axis is the block, with one colour and marker per kind of layer; layers outside the blocks come last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.extras import require
from svdit.files import writable_folder
from svdit.pictures import COLOURS, GREYS, MARKERS, blank, few_decades, plot
from svdit.report.tables import by_kind, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from svdit.quant.report import LayerReport

TITLES = {
    "layers": "Output SQNR and size of each layer",
    "timesteps": "Relative output error by time: a row for each block, the first on top",
    "spectra": "Singular values of weights and of their residuals",
    "smoothing": "Smoothing scales λ = |x|^α / |W|^β of each layer",
    "activations": "Inputs of the layers of lowest SQNR, before (x) and after (x̂) the transform",
    "pareto": "Best predicted SQNR for a file size, over bits and ranks of each layer",
}


def draw(folder: Path, lines: Sequence[LayerReport], measured: dict[str, Any], about: str) -> list[Path]:
    """Write a PNG for every quantity in `measured`, with `about` in its title; returns the paths.

    Raises UserError without matplotlib.
    """
    figures: dict[str, tuple[Any, Callable[[], Figure]]] = {
        "layers": (measured["sqnr"], lambda: layers(lines, measured["sqnr"])),
        "timesteps": (measured["errors"], lambda: timesteps(measured)),
        "spectra": (measured["spectra"], lambda: spectra(measured["spectra"])),
        "smoothing": (measured["smoothing"], lambda: smoothing(measured["smoothing"])),
        "activations": (measured["activations"], lambda: activations(measured["activations"])),
        "pareto": (
            measured.get("curve"),
            lambda: pareto(measured["curve"], measured["chosen"], measured.get("uniform", ())),
        ),
    }
    require("matplotlib")  # before there is a folder
    writable_folder(folder)
    paths = []
    for name, (data, figure) in figures.items():
        if data:
            paths.append(folder / f"{name}.png")
            plot(paths[-1], TITLES[name], about, figure)
    return paths


def layers(lines: Sequence[LayerReport], sqnr: dict[str, float | None]) -> Figure:
    """Output SQNR of every layer above, its size below; between them bits and rank, if they differ within a kind."""
    at = positions([line.name for line in lines])
    mixed = any(len({(line.weight, line.rank) for line in members}) > 1 for members in by_kind(lines).values())
    figure, axes = blank(2 + mixed, 1, 4 + 0.2 * max(16, *at.values()), 6 + 2 * mixed, sharex=True)
    top, bottom = axes[0, 0], axes[-1, 0]
    before, height = dict.fromkeys(at.values(), 0.0), dict.fromkeys(at.values(), 0.0)
    for line in lines:
        before[at[line.name]] += line.bytes_before / 1e6
    bottom.bar(before.keys(), before.values(), 0.9, color=GREYS[0], label="full precision")
    for (kind, members), colour, marker in zip(by_kind(lines).items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        x, sizes = [at[line.name] for line in members], [line.bytes_after / 1e6 for line in members]
        top.plot(x, [sqnr[line.name] for line in members], color=colour, marker=marker, ms=4.5, lw=1, label=kind)
        bottom.bar(x, sizes, 0.6, [height[i] for i in x], color=colour)
        for i, size in zip(x, sizes, strict=True):
            height[i] += size
    top.set(ylabel="output SQNR, dB")
    if mixed:
        formats(axes[1, 0], by_kind(lines), at)
    outside = any(isinstance(x, float) for x in at.values())
    bottom.set(xlabel="block" + ", then layers outside the blocks" * outside, ylabel="size, MB")
    mark_blocks(bottom, at, 16)
    for axis in (top, bottom):
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def formats(axis: Axes, kinds: dict[str, list[LayerReport]], at: dict[str, float]) -> None:
    """A cell for every layer: the colour shows the bits of the weights, the number the rank of the branch."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    bits_of = {line.name: re.match(r"[A-Z]+(\d+)", line.weight) for members in kinds.values() for line in members}
    bits = {name: int(match[1]) for name, match in bits_of.items() if match}
    colours = {n: colormaps["YlGnBu"](n / 10) for n in sorted(set(bits.values()))}
    for row, members in enumerate(kinds.values()):
        for line in members:
            number = bits.get(line.name, 0)
            axis.bar(at[line.name], 0.9, 0.9, row - 0.45, color=colours.get(number, GREYS[0]))
            if line.rank:
                ink = "white" if number > 5 else "black"
                axis.text(at[line.name], row, str(line.rank), color=ink, fontsize=8, ha="center", va="center")
    axis.set_yticks(range(len(kinds)), list(kinds))
    axis.invert_yaxis()
    axis.grid(visible=False)
    patches = [Patch(color=colour, label=f"{n} bits") for n, colour in colours.items()]
    axis.legend(handles=patches, title="weights; number: rank", loc="upper left", bbox_to_anchor=(1, 1))


TIMES = {  # axis label of a model's time
    "timesteps": "timestep",
    "noise_to_data": "t, from noise (0) to data (1)",
    "data_to_noise": "t, from noise (1) to data (0)",
}


def timesteps(measured: dict[str, Any]) -> Figure:
    """A heat map of layers and times for each guidance half; blank where the half was not computed."""
    from matplotlib.colors import LogNorm

    times, errors = measured["timesteps"], measured["errors"]
    halves = {half: by_kind(table) for half, table in errors.items()}
    kinds = next(iter(halves.values()))
    rows = sum(map(len, kinds.values()))
    figure, (panels,) = blank(1, len(halves), 2.2 + 3 * len(halves), min(9.0, 2.6 + 0.055 * rows), sharey=True)
    order = [name for members in kinds.values() for name in members]
    tables = {half: [[percent(error) for error in errors[half][name]] for name in order] for half in halves}
    positive = [error for table in tables.values() for row in table for error in row if error > 0]
    norm = LogNorm(min(positive, default=1), max(positive, default=1))
    for axis, (half, table) in zip(panels, tables.items(), strict=True):
        image = axis.imshow(table, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set(title=half, xlabel=TIMES[measured["time"]])
        axis.grid(visible=False)
        axis.set_xticks(range(len(times)), [f"{t:.3g}" for t in times], rotation=90)
        separate(axis, kinds)
    bar = figure.colorbar(image, ax=list(panels), label="relative output error, %")
    few_decades(bar.ax.yaxis)
    return figure


def percent(error: float | None) -> float:
    """In percent; NaN for None."""
    return float("nan") if error is None else 100 * error


def separate(axis: Axes, kinds: dict[str, Any]) -> None:
    """Label the kinds of layers along the rows of a heat map, with lines between them."""
    ends = [sum(map(len, list(kinds.values())[: i + 1])) for i in range(len(kinds))]
    for end in ends[:-1]:
        axis.axhline(end - 0.5, color="white", lw=1.5)
    middles = [end - len(members) / 2 - 0.5 for end, members in zip(ends, kinds.values(), strict=True)]
    axis.set_yticks(middles, list(kinds))
    axis.tick_params(axis="y", length=0)


LINES = {
    "original": ("W", GREYS[1], 2.5),
    "transformed": ("Ŵ = (W Λ) H", COLOURS[0], 1.3),
    "remaining": ("residual Ŵ − L1 L2", COLOURS[1], 1.3),
}


def spectra(measured: dict[str, dict[str, Any]]) -> Figure:
    """Singular values of the weight before and after the transform, and of the residual."""
    figure, panels = panels_for(measured)
    for axis, (name, spectrum) in zip(panels, measured.items(), strict=False):
        for key, (label, colour, width) in LINES.items():
            values = [value for value in spectrum[key] if value > 1e-6]
            axis.plot(range(1, len(values) + 1), values, color=colour, lw=width, label=label)
        axis.axvline(spectrum["rank"], color="black", ls=":", lw=1, label=f"rank {spectrum['rank']}")
        axis.set(title=name, xscale="log", yscale="log", xlabel="index i", ylabel="σᵢ / ‖W‖")
        few_decades(axis.xaxis)
        few_decades(axis.yaxis)
        axis.legend(loc="lower left")
    return figure


def smoothing(chosen: dict[str, dict[str, Any]]) -> Figure:
    """The distribution of λ, and above it the exponents α and β if a grid chose them; one column per kind of layer."""
    kinds = by_kind(chosen)
    searched = len({(layer["alpha"], layer["beta"]) for layer in chosen.values()}) > 1
    figure, axes = blank(
        1 + searched, len(kinds), 1.6 + 1.9 * len(kinds), 2.6 * (1 + searched), sharey="row", sharex=True
    )
    at = positions(chosen)
    exponents = (("alpha", "α (activations)", COLOURS[0], "o"), ("beta", "β (weights)", COLOURS[1], "s"))
    for (kind, names), top, bottom in zip(kinds.items(), axes[0], axes[-1], strict=True):
        x = [at[name] for name in names]
        for key, label, colour, marker in exponents * searched:
            top.plot(x, [chosen[name][key] for name in names], marker, color=colour, ms=4, mfc="none", label=label)
            top.set(ylim=(-0.05, 1.05))
        low, p10, middle, p90, high = zip(*(chosen[name]["scale_quantiles"] for name in names), strict=True)
        bottom.vlines(x, low, high, color=COLOURS[0], lw=0.8, label="range")
        bottom.vlines(x, p10, p90, color=COLOURS[0], lw=3.5, label="10 to 90 %")
        bottom.plot(x, middle, "_", color="black", ms=6, label="median")
        top.set(title=kind)
        bottom.set(yscale="log", xlabel="block")
        few_decades(bottom.yaxis)
        mark_blocks(bottom, {name: at[name] for name in names}, 8)
    if searched:
        axes[0, 0].set_ylabel("exponent")
    axes[-1, 0].set_ylabel("λ per channel")
    for axis in axes[:, -1]:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def activations(measured: dict[str, dict[str, Any]]) -> Figure:
    """Histograms of a few layers' inputs before and after centering, smoothing and rotation."""
    figure, panels = panels_for(measured)
    for axis, (name, pair) in zip(panels, measured.items(), strict=False):
        for key, label, colour in (("before", "x", COLOURS[1]), ("after", "x̂", COLOURS[0])):
            limit, shares = pair[key]["limit"], pair[key]["shares"]
            edges = [limit * (2 * i / len(shares) - 1) for i in range(len(shares) + 1)]
            axis.stairs(shares, edges, color=colour, lw=1.3, label=f"{label}: {pair[key]['peak']:.1f}")
        axis.set(title=name, yscale="log", xlabel="value / RMS", ylabel="fraction of values")
        axis.legend(title="row absmax / RMS", loc="upper right")
    return figure


def pareto(
    curve: Sequence[tuple[int, float]],
    chosen: tuple[int, float],
    uniform: Sequence[tuple[int, int, int, float]] = (),
) -> Figure:
    """The best predicted SQNR for every file size, and that of the uniform settings (bits, rank, bytes, SQNR)."""
    figure, ((axis,),) = blank(1, 1, 8, 4.2)
    sizes, best = [size / 1e6 for size, _ in curve], [quality for _, quality in curve]
    axis.step(sizes, best, where="post", color=COLOURS[0], label="best choice for each layer")
    label = f"chosen: {chosen[0] / 1e6:.4g} MB, {chosen[1]:.1f} dB"
    axis.plot(chosen[0] / 1e6, chosen[1], "*", color=COLOURS[1], ms=13, label=label)
    within = [setting for setting in uniform if setting[2] <= curve[-1][0]]
    for bits, colour, marker in zip(sorted({setting[0] for setting in within}), COLOURS[2:], MARKERS[2:], strict=False):
        points = [(size / 1e6, sqnr) for b, _, size, sqnr in within if b == bits]
        axis.plot(*zip(*points, strict=True), marker, color=colour, ms=4, label=f"{bits} bits in every layer")
    axis.set(xlabel="file size, MB", ylabel="predicted output SQNR, dB")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def panels_for(measured: dict[str, Any]) -> tuple[Figure, list[Axes]]:
    """One panel per entry, two per row."""
    columns, rows = min(2, len(measured)), -(-len(measured) // 2)
    figure, axes = blank(rows, columns, max(7, 1 + 4 * columns), 0.6 + 2.8 * rows)
    for axis in list(axes.flat)[len(measured) :]:
        axis.set_visible(False)
    return figure, list(axes.flat)


def positions(names: Iterable[str]) -> dict[str, float]:
    """x coordinates of layers: the block number; outside the blocks, half-integers after the last one."""
    blocks = {name: place(name)[1] for name in names}
    last = max((block for block in blocks.values() if block is not None), default=-1)
    outside = [name for name, block in blocks.items() if block is None]
    return {name: last + 1.5 + outside.index(name) if block is None else block for name, block in blocks.items()}


def mark_blocks(axis: Axes, at: dict[str, float], most: int) -> None:
    """At most `most` ticks, at block numbers; layers outside the blocks are identified by their colour."""
    numbers = sorted({x for x in at.values() if isinstance(x, int)})
    axis.set_xticks(numbers[:: -(-len(numbers) // most) or 1])
