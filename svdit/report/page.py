"""One HTML file from the outputs of `quantize`, `generate` and `evaluate`: `svdit report`.

It opens from disk and requests nothing: style, script, images and numbers are inside, and its Content-Security-Policy
allows no others. Names and texts from files are escaped where they become markup (`page_markup`).
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

from svdit import __version__
from svdit.files import atomic_path
from svdit.images import natural_key
from svdit.printing import finite
from svdit.report import page_facts as facts
from svdit.report import page_plots as plots
from svdit.report import page_tables as tables
from svdit.report.page_heat import heat_maps
from svdit.report.page_images import MOST, data_uri, gallery, groups
from svdit.report.page_inputs import Inputs, Run, number, read_inputs
from svdit.report.page_markup import Markup, join, raw, section, tag

LIMIT = 5_000_000  # bytes of the page
GRIDS = 1_500_000  # of them for image grids
ORDERS = {"": "as generated", "worst": "lowest PSNR first"}
MARGIN = 50_000  # for what the images add to tables
STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}") for kind in ("css", "js"))


@dataclass(frozen=True)
class Page:
    """The HTML, what it shows, and what it could not, as sentences."""

    html: str
    models: list[str]
    images: int
    notes: list[str]


def write_page(paths: Sequence[str | Path], output: str | Path) -> Page:
    """Write the page of these outputs. Raises UserError for missing and unreadable ones, and other files."""
    page = build(paths)
    with atomic_path(output) as temporary:
        temporary.write_text(page.html, encoding="utf-8")
    return page


def build(paths: Sequence[str | Path]) -> Page:
    """The page of reports, sets, metrics and grids. Raises UserError as `write_page`."""
    inputs = read_inputs(paths)
    found, notes = groups(inputs.runs)
    grids = [grid for grid in inputs.grids if len(grid[1]) < GRIDS / max(1, len(inputs.grids))]
    notes += [f"{name} is left out: it has {len(content) / 1e6:.1f} MB." for name, content in inputs.grids
              if (name, content) not in grids]  # fmt: skip
    inputs = Inputs(inputs.runs, grids)
    without = html_of(inputs, [], notes)
    rest = LIMIT - MARGIN - len(without.encode())
    galleries = [gallery(group, rest // len(found)) for group in found]
    images = sum(len(row["src"]) for each in galleries for row in each["images"]) + len(grids)
    html = html_of(inputs, galleries, notes) if galleries else without
    return Page(html, [run.name for run in inputs.runs], images, notes)


def html_of(inputs: Inputs, galleries: list[dict[str, Any]], notes: list[str]) -> str:
    """The whole document."""
    style, script = (path.read_text(encoding="utf-8") for path in (STYLE, SCRIPT))
    policy = f"default-src 'none'; img-src data:; style-src {allowed(style)}; script-src {allowed(script)}"
    title = facts.title_of(inputs.runs)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} – svdit report"),
        tag("style", raw(style)),
    ]
    data = raw(json.dumps(finite(galleries)).replace("<", "\\u003c"))
    body = [*content(inputs, galleries, notes, title), tag("script", data, type="application/json", id="data")]
    document = tag("html", tag("head", *head), tag("body", *body, tag("script", raw(script))), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def allowed(text: str) -> str:
    """The source expression that allows an inline style or script of exactly this text."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def content(inputs: Inputs, galleries: list[dict[str, Any]], notes: list[str], title: str) -> list[Markup]:
    """The body: header with navigation, and the sections that have content."""
    runs = inputs.runs
    psnrs = tables.psnrs_of(runs, galleries)
    warnings, table = tables.warnings(runs, notes), tables.summary(runs, psnrs)
    means = any("±" not in text for _, text in psnrs.values())
    remarks = "PSNR without ± is the mean over the images on this page. " * means + "No warnings." * (not warnings)
    summary = table and join([table, tag("p", remarks, class_="note") if remarks else None])
    quantized = [run for run in runs if run.report]
    pictures = [(tag("img", src=data_uri(png), alt=f"sample grid {name}"), name) for name, png in inputs.grids]
    grids = tag("div", *(plots.figure(*each) for each in pictures), class_="grids") if pictures else None
    parts = {
        "summary": ("Summary", summary),
        "warnings": ("Warnings", warnings),
        "images": ("Images", join([*(pairs(each, len(galleries) > 1) for each in galleries), grids])),
        "size": ("Size and quality", plotted(size_plots(runs, psnrs), "wide", *map(tables.tries, quantized))),
        "metrics": ("Metrics", tables.metrics(runs)),
        "layers": ("Layers", tables.layers(quantized)),
        "time": ("Errors over time", join(heat_maps(quantized)) or None),
        "spectra": ("Singular values", spectra(quantized)),
        "making": ("How it was made", facts.making(runs)),
    }
    sections = [section(name, heading, inside) for name, (heading, inside) in parts.items() if inside]
    links = [tag("a", heading, href=f"#{name}") for name, (heading, inside) in parts.items() if inside]
    made = f"svdit {__version__}, {date.today().isoformat()}"
    header = tag(
        "header", tag("p", "svdit report", class_="brand"), tag("h1", title), tag("nav", *links, aria_label="Sections")
    )
    return [header, tag("main", *sections), tag("footer", made)]


def size_plots(runs: Sequence[Run], psnrs: dict[int, tuple[float, str]]) -> list[Markup | None]:
    """Measured quality against size, and the predicted curves of the models with a target."""
    known = [(run.name, size, psnrs[i][0]) for i, run in enumerate(runs)
             if i in psnrs and (size := number(run.report.get("bytes_after")))]  # fmt: skip
    return [plots.sizes(known), *map(plots.pareto, runs)]


def plotted(figures: Sequence[Markup | None], width: str = "", *more: Markup | None) -> Markup | None:
    """Figures side by side, "wide" or not, and what follows; None for nothing."""
    inside = [figure for figure in figures if figure]
    return join([tag("div", *inside, class_=f"plots {width}") if inside else None, *more]) or None


def spectra(runs: Sequence[Run]) -> Markup | None:
    """The singular values of a few layers of every model, with one legend."""
    drawn = [entry for run in runs for entry in plots.spectra(run).items()]
    figures = [figure for _, figure in sorted(drawn, key=lambda entry: natural_key(entry[0]))]
    entries = [("grey", "weight W"), ("s0", "transformed Ŵ"), ("s1", "residual Ŵ − L1 L2"), ("dashed", "rank")]
    return join([plots.key(entries), plotted(figures)]) if figures else None


def pairs(each: dict[str, Any], headed: bool) -> Markup:
    """The controls of a gallery; the script fills in the images. `headed`: there are others."""
    names = each["columns"]
    labels = sorted({row["label"] for row in each["images"] if row["label"] is not None})
    classes = [tag("option", "all", value=""), *(tag("option", label, value=label) for label in labels)]
    order = [tag("option", text, value=value) for value, text in ORDERS.items()]
    wipe = tag("input", type="range", min=0, max=100, value=0, class_="wipe")
    gain = tag("input", type="range", min=1, max=64, value=each["gain"], class_="gain")
    controls = [
        tag("label", "Full precision over quantized ", wipe),
        tag("label", "Difference × ", tag("output", each["gain"]), " ", gain),
        tag("label", "Class ", tag("select", *classes, class_="class")) if len(labels) > 1 else None,
        tag("label", "Order ", tag("select", *order, class_="order")),
    ]
    shown = len(each["images"])
    count = f"{shown} images of each model, from the same noise as in full precision ({names[0]})."
    left_out = f" {each['of'] - shown} of {each['of']} are left out: there are at most {MOST}, and what fits into 5 MB."
    parts = [
        tag("h3", each["model"] or names[0]) if headed else None,
        tag("p", count, left_out if shown < each["of"] else None, class_="note"),
        tag("div", *controls, class_="controls"),
        tag("div", class_="tiles"),
        tag("button", "Show all", type="button", class_="more", hidden=True),
        tag("noscript", tag("p", "The images need JavaScript, which is inside this file.")),
    ]
    return tag("div", *parts, class_="gallery")
