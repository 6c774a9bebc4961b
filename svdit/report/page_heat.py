"""The page's heat maps of errors by layer and time: a PNG of one pixel per cell, and its numbers for the script."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from svdit.images import encode_png
from svdit.report.diagnose import HALVES
from svdit.report.figures import TIMES
from svdit.report.page_images import data_uri
from svdit.report.page_inputs import Run, numbers, part
from svdit.report.page_markup import Markup, tag
from svdit.report.page_plots import WIDTH, figure
from svdit.report.tables import by_kind

VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
COLOURS = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], float)
LONG = 11  # characters of a label beside a heat map


def heat_maps(runs: Sequence[Run]) -> list[Markup]:
    """Layers × times for each model and guidance half, with one scale of colours, which comes first."""
    maps = [(run, half, table_of(run, half)) for run in runs for half in HALVES]
    known = [value for _, _, rows in maps for row in rows.values() for value in row if value and value > 0]
    if not known:
        return []
    low, high = min(known), max(known)
    figures = [heat_map(run, half, rows, low, high) for run, half, rows in maps if any(map(any, rows.values()))]
    hint = tag("p", "Point at a cell to read it, or focus a map and use the arrow keys.", class_="note")
    return [scale_bar(low, high), hint, tag("div", *figures, class_="plots wide")]


def table_of(run: Run, half: str) -> dict[str, list[float | None]]:
    """Relative errors in percent by layer, in the order of the kinds; layers of another length are left out."""
    table = {name: numbers(row) for name, row in part(part(run.measured, "errors"), half).items()}
    times = numbers(run.measured.get("timesteps"))
    if None in times:
        return {}
    order = [name for members in by_kind(table).values() for name in members if len(table[name]) == len(times)]
    return {name: [None if value is None else 100 * value for value in table[name]] for name in order}


def heat_map(run: Run, half: str, rows: dict[str, list[float | None]], low: float, high: float) -> Markup:
    """One map: its cells are the pixels of a PNG, its numbers are read out by the script."""
    times, kinds = numbers(run.measured.get("timesteps")), by_kind(rows)
    values = np.array([[float("nan") if v is None else v for v in row] for row in rows.values()])
    left, top, height = 62, 4, max(150.0, min(420.0, 7.0 * len(rows)))
    box = {"x": left, "y": top, "width": WIDTH - left, "height": height}
    parts = [tag("image", href=data_uri(encode_png(coloured(values, low, high))), preserveAspectRatio="none", **box)]
    start = 0
    for kind, members in kinds.items():
        y = top + height * start / len(rows)
        middle = y + height * len(members) / len(rows) / 2
        parts.append(tag("line", x1=0, x2=WIDTH, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="cut") if start else Markup())
        label = kind if len(kind) <= LONG else f"{kind[: LONG - 1]}…"
        parts.append(
            tag(
                "text", label, tag("title", kind), x=left - 5, y=f"{middle + 3.5:.1f}", text_anchor="end", class_="tick"
            )
        )
        start += len(members)
    width = (WIDTH - left) / max(len(times), 1)
    for i, time in enumerate(times):
        if i % max(1, math.ceil(len(times) / 10)) == 0:
            x = left + width * (i + 0.5)
            parts.append(
                tag("text", f"{time:.3g}", x=f"{x:.1f}", y=top + height + 14, text_anchor="middle", class_="tick")
            )
    label = TIMES.get(str(run.measured.get("time")), "time")
    parts.append(tag("text", label, x=(left + WIDTH) / 2, y=top + height + 30, text_anchor="middle", class_="label"))
    parts.append(tag("rect", class_="cursor", width=f"{width:.2f}", height=f"{height / len(rows):.2f}", x=-99, y=-99))
    data = {
        "rows": list(rows),
        "times": times,
        "cells": [[v and float(f"{v:.3g}") for v in row] for row in rows.values()],
    }
    span = f"{np.nanmin(values):.3g} to {np.nanmax(values):.3g} %"
    picture = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {top + height + 36}",
        role="img",
        tabindex="0",
        aria_label=f"{run.name}, {half}: relative output error by layer and time, {span}",
        class_="heat",
        data_box=json.dumps([left, top, WIDTH - left, height]),
        data_heat=json.dumps(data),
    )
    return figure(picture, f"{run.name}, {half}", tag("output"))


def coloured(values: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    """Viridis on a logarithmic scale, uint8 (H, W, 3); grey for NaN."""
    span = math.log(high / low) or 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.clip(np.log(np.maximum(values, low) / low) / span, 0, 1) * (len(COLOURS) - 1)
    channels = [np.interp(place, range(len(COLOURS)), COLOURS[:, c]) for c in range(3)]
    return np.where(np.isnan(values)[..., None], 128, np.stack(channels, -1)).astype(np.uint8)


def scale_bar(low: float, high: float) -> Markup:
    """The colours with the numbers at both ends."""
    values = np.geomspace(low, max(high, low * 1.0001), 64)[None]
    bar = tag("img", src=data_uri(encode_png(coloured(values, low, high))), alt="", class_="scale")
    return tag("p", "relative output error: ", f"{low:.2g} % ", bar, f" {high:.2g} %", class_="legend")
