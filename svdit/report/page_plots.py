"""The page's plots as SVG: size against quality, singular values.

Colours are classes of the style sheet, so that they follow the reader's light or dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svdit.report.figures import LINES
from svdit.report.page_inputs import Run, number, numbers, part
from svdit.report.page_markup import Markup, join, tag

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 260, 46, 10, 10, 38
SMALLEST = 1e-3  # of ‖W‖; singular values below are not drawn
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """What an axis shows, from `low` to `high`."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, label: str, values: Iterable[float], log: bool = False) -> Axis:
        """An axis with all values, and some room on both sides of a linear one."""
        low, high = min(values := list(values)), max(values)
        room = 0 if log else 0.06 * (high - low) or 0.5
        return cls(label, low - room, max(high + room, low * 1.01), log)

    def at(self, value: float) -> float:
        """The place of a value, 0 to 1."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            digits = (1,) if len(exponents) > 2 else (1, 2, 5)
            values = [digit * 10.0**exponent for exponent in (exponents.start - 1, *exponents) for digit in digits]
            return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """The place of a plot's points in its SVG."""

    x: Axis
    y: Axis

    def at(self, point: Point) -> Point:
        """Pixels from the upper left."""
        across, down = self.x.at(point[0]), 1 - self.y.at(point[1])
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Iterable[Point], style: str) -> Markup:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        return tag("polyline", points=path, class_=f"line {style}")

    def dot(self, point: Point, style: str, title: str) -> Markup:
        """A point with a text that appears on hovering."""
        x, y = self.at(point)
        return tag("circle", tag("title", title), cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_=f"dot {style}")

    def text(self, point: Point, text: str, style: str = "", title: str | None = None, beside: bool = True) -> Markup:
        """A label next to a point, inside the plot; or centred on it."""
        x, y = self.at(point)
        left = beside and x > WIDTH * 0.62
        shift = (-8 if left else 8) if beside else 0
        anchor = ("end" if left else "start") if beside else "middle"
        more = tag("title", title) if title else None
        return tag("text", text, more, x=f"{x + shift:.1f}", y=f"{y + 4:.1f}", text_anchor=anchor, class_=style)

    def drawn(self, title: str, *content: Markup | None) -> Markup:
        """The SVG: grid, axes, labels, content."""
        lines = [*self._ticks(), *(part for part in content if part)]
        middle = f"rotate(-90 12 {(HEIGHT - BOTTOM) / 2})"
        lines.append(
            tag("text", self.x.label, x=(LEFT + WIDTH) / 2, y=HEIGHT - 6, text_anchor="middle", class_="label")
        )
        label = {"x": 12, "y": (HEIGHT - BOTTOM) / 2, "text_anchor": "middle", "transform": middle}
        lines.append(tag("text", self.y.label, class_="label", **label))
        return tag("svg", *lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)

    def _ticks(self) -> Iterator[Markup]:
        for value in self.x.ticks():
            x, bottom = self.at((value, self.y.low))
            yield tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=bottom, class_="rule")
            yield tag("text", short(value), x=f"{x:.1f}", y=bottom + 14, text_anchor="middle", class_="tick")
        for value in self.y.ticks():
            left, y = self.at((self.x.low, value))
            yield tag("line", x1=left, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rule")
            yield tag("text", short(value), x=left - 5, y=f"{y + 3.5:.1f}", text_anchor="end", class_="tick")


def short(value: float) -> str:
    """A tick's number."""
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.0e}".replace("e-0", "e-")


def figure(picture: Markup, caption: object, *more: Markup | None) -> Markup:
    """A picture with its caption below."""
    return tag("figure", picture, tag("figcaption", caption), *more)


def key(entries: Iterable[tuple[str, str]]) -> Markup:
    """The legend: (style, text)."""
    return tag("ul", *(tag("li", tag("i", class_=style), text) for style, text in entries), class_="key")


def sizes(points: Sequence[tuple[str, float, float]]) -> Markup | None:
    """PSNR of images against bytes of the model, for each (name, bytes, dB); None for fewer than two."""
    if len(points) < 2:
        return None
    x = Axis.around("tensors, MB", [size / 1e6 for _, size, _ in points])
    frame = Frame(x, Axis.around("PSNR of the images, dB", [psnr for *_, psnr in points]))
    marks = [
        join([frame.dot((size / 1e6, psnr), f"s{i % 8}", f"{name}: {size / 1e6:.2f} MB, {psnr:.1f} dB"),
              frame.text((size / 1e6, psnr), name)])
        for i, (name, size, psnr) in enumerate(points)
    ]  # fmt: skip
    title = "Size and image quality: " + "; ".join(f"{n}: {s / 1e6:.2f} MB, {p:.1f} dB" for n, s, p in points)
    return figure(frame.drawn(title, *marks), "Measured: size and PSNR against full precision. Up and left is better.")


def pareto(run: Run) -> Markup | None:
    """The best predicted SQNR for every file size, uniform settings, the tries, and what was requested and chosen."""
    curve = [(x / 1e6, y) for x, y in points(run.measured.get("curve"))]
    if len(curve) < 2:
        return None
    chosen = next(iter(points([run.measured.get("chosen")])), None)
    tried = [(x / 1e6, y) for x, y in points([[entry.get("bytes"), entry.get("sqnr")] for entry in run.tries])]
    uniform = [(n, x / 1e6, y) for n in uniforms(run.measured.get("uniform")) for x, y in [n[2:]]]
    uniform = [entry for entry in uniform if entry[1] <= curve[-1][0] * 1.1]
    everything = [*curve, *tried, *((x, y) for _, x, y in uniform)]
    frame = Frame(
        Axis.around("file size, MB", [x for x, _ in everything]),
        Axis.around("predicted output SQNR, dB", [y for _, y in everything]),
    )
    steps = [
        point
        for (x, y), (later, _) in zip(curve, [*curve[1:], curve[-1]], strict=True)
        for point in ((x, y), (later, y))
    ]
    marks: list[Markup | None] = [requested(frame, run.plan), frame.line(steps, "s0")]
    marks += [
        frame.text((x, y), f"{n[0]:.0f}", "bits", f"{n[0]:.0f} bits, rank {n[1]:.0f}: {x:.2f} MB, {y:.1f} dB", False)
        for n, x, y in uniform
    ]
    marks += [frame.dot(point, "s2", f"tried: {point[0]:.2f} MB, {point[1]:.1f} dB") for point in tried]
    entries = [("s0", "best choice of bits and ranks per layer")]
    entries += [("s2", "tried with images")] * bool(tried)
    if chosen:
        size = chosen[0] / 1e6
        marks.append(frame.dot((size, chosen[1]), "s1 chosen", f"chosen: {size:.2f} MB, {chosen[1]:.1f} dB"))
        entries.append(("s1", f"chosen: {size:.2f} MB, {chosen[1]:.1f} dB"))
    entries += [("bits", "digits: the same bits in every layer, ranks 0 to 64")] * bool(uniform)
    title = f"{run.name}: predicted output SQNR for every file size"
    return figure(frame.drawn(title, *marks), f"{run.name}: predicted error for every size.", key(entries))


def points(values: object) -> list[Point]:
    """The pairs of finite numbers in a list of a file."""
    pairs = [numbers(value) for value in values] if isinstance(values, list) else []
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and pair[0] is not None and pair[1] is not None]


def uniforms(values: object) -> list[tuple[float, float, float, float]]:
    """(bits, rank, bytes, SQNR) of the uniform settings in a file."""
    rows = [numbers(value) for value in values] if isinstance(values, list) else []
    return [(row[0], row[1], row[2], row[3]) for row in rows if len(row) == 4 and None not in row]  # type: ignore[misc]


def requested(frame: Frame, plan: dict[str, Any]) -> Markup | None:
    """A line at the requested size or SQNR."""
    size, sqnr = number(plan.get("target_mb")), number(plan.get("target_sqnr"))
    if size is not None and frame.x.low < size < frame.x.high:
        ends = [(size, frame.y.low), (size, frame.y.high)]
        return join(
            [
                frame.line(ends, "dashed"),
                frame.text((size, frame.y.low + 0.06 * (frame.y.high - frame.y.low)), "requested"),
            ]
        )
    if sqnr is not None and frame.y.low < sqnr < frame.y.high:
        ends = [(frame.x.low, sqnr), (frame.x.high, sqnr)]
        return join(
            [
                frame.line(ends, "dashed"),
                frame.text((frame.x.low, sqnr + 0.03 * (frame.y.high - frame.y.low)), "requested"),
            ]
        )
    return None


def spectra(run: Run) -> dict[str, Markup]:
    """For a few layers the singular values of the weight before and after the transform, and of the residual."""
    figures: dict[str, Markup] = {}
    for name, entry in part(run.measured, "spectra").items():
        curves = {k: positive(entry.get(k)) for k in LINES} if isinstance(entry, dict) else {}
        values = [value for curve in curves.values() for _, value in curve]
        if len(values) < 2:
            continue
        last = max(index for curve in curves.values() for index, _ in curve)
        frame = Frame(Axis("index", 1, max(last, 2), log=True), Axis.around("σ / ‖W‖", values, log=True))
        lines = [frame.line(thinned(curves[k]), style) for k, style in zip(LINES, ("grey", "s0", "s1"), strict=True)]
        rank = number(entry.get("rank")) or 0
        if 1 <= rank <= last:
            lines.append(frame.line([(rank, frame.y.low), (rank, frame.y.high)], "dashed"))
        title = f"{run.name}, {name}: singular values of the weight, of the transformed weight and of the residual"
        figures[name] = figure(frame.drawn(title, *lines), f"{name}, {run.name}: rank {rank:.0f}")
    return figures


def positive(values: object) -> list[Point]:
    """(index from 1, value) of the singular values that are drawn."""
    return [(i, value) for i, value in enumerate(numbers(values), 1) if value is not None and value > SMALLEST]


def thinned(curve: Sequence[Point]) -> list[Point]:
    """At most about 80 points, evenly on a logarithmic axis, with both ends."""
    places = np.unique(np.geomspace(1, max(len(curve), 1), 80).round().astype(int)) - 1
    return [curve[i] for i in places if i < len(curve)]
