"""The page's tables and texts: the summary, warnings, layers, metrics, tries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from svdit.evaluation.compare import comparison
from svdit.evaluation.protocol import disagreements
from svdit.evaluation.report import NOT_COMPARABLE
from svdit.quant.report import FEW
from svdit.report.page_facts import NONE, brief, counted, details
from svdit.report.page_inputs import Run, number, part
from svdit.report.page_markup import Markup, join, scrolling, table, tag
from svdit.report.tables import place

CAP = 100.0  # dB, of identical images in a mean
COLUMNS = {  # of the layers' table, and their class: "n" is a number
    **{"layer": None, "model": None, "bits": "n", "rank": "n", "rows": "n", "SQNR, dB": "n"},
    **{"weights": None, "activations": None, "held out": "n", "KB": "n", "weight error": "n"},
}


def summary(runs: Sequence[Run], psnrs: Mapping[int, tuple[float, str]]) -> Markup | None:
    """One row per quantized model: size, formats, quality; `psnrs` by the run's place."""
    rows = [summary_row(run, psnrs.get(i)) for i, run in enumerate(runs) if not run.full_precision]
    quality = ["median SQNR, dB", "lowest"]
    columns = ["model", "tensors, MB", "smaller", "PSNR, dB", "weights", "activations", "rank", *quality]
    return table(columns, rows, "Models", visible=False) if rows else None


def summary_row(run: Run, psnr: tuple[float, str] | None) -> list[object]:
    """The cells of a model; a dash for what is unknown."""
    before, after = (number(run.report.get(key)) for key in ("bytes_before", "bytes_after"))
    known = sorted(v for line in run.layers if (v := number(line.get("sqnr"))) is not None)
    return [
        run.name,
        NONE if after is None else f"{after / 1e6:.2f}",
        f"{before / after:.2f}×" if before and after else NONE,
        psnr[1] if psnr else NONE,
        *(counted(line.get(key) for line in run.layers) for key in ("weight", "act")),
        ranks(run.layers),
        f"{median(known):.1f}" if known else NONE,
        f"{known[0]:.1f}" if known else NONE,
    ]


def ranks(layers: Sequence[dict[str, Any]]) -> str:
    """The ranks of the low-rank branches, 0 without one: by frequency, or the least and the largest of many."""
    found = [int(rank) for line in layers if (rank := number(line.get("rank"))) is not None]
    return f"{min(found)} to {max(found)}" if len(set(found)) > 3 else counted(found)


def psnrs_of(runs: Sequence[Run], galleries: Sequence[dict[str, Any]]) -> dict[int, tuple[float, str]]:
    """By the run's place its PSNR and a text: measured by `evaluate`, else the mean over the images on the page."""
    shown: dict[str, list[float]] = {}
    for each in galleries:
        for row in each["images"]:
            for name, psnr in zip(each["columns"][1:], row["psnr"], strict=True):
                if psnr is not None:
                    shown.setdefault(name, []).append(CAP if psnr == "identical" else psnr)
    found: dict[int, tuple[float, str]] = {}
    for i, run in enumerate(runs):
        entry = part(part(run.evaluation, "metrics"), "psnr")
        value, error, images = number(entry.get("value")), number(entry.get("se")), shown.get(run.name)
        if value is not None:
            found[i] = value, f"{value:.1f} ± {error:.1f}" if error is not None else f"{value:.1f}"
        elif images:
            found[i] = (mean := sum(images) / len(images)), f"{mean:.1f}"
    return found


def warnings(runs: Sequence[Run], notes: Sequence[str]) -> Markup | None:
    """What a reader should know before using the models, with their names; None for nothing."""
    names: dict[str, list[str]] = {}
    for run in runs:
        for text in warnings_of(run):
            names.setdefault(text, []).append(run.name)
    items = [tag("li", tag("b", ", ".join(of)), ": ", text) for text, of in names.items()]
    items += [tag("li", note) for note in notes]
    return tag("ul", *items, class_="warnings") if items else None


def warnings_of(run: Run) -> list[str]:
    """Layers with few rows, those that are not quantized and those without a fast kernel; the evaluation's warnings."""
    sentences = [str(run.report["fallbacks"])] if run.report.get("fallbacks") else []
    sentences += [f"{name} was not quantized: {reason}" for name, reason in part(run.report, "skipped").items()]
    sentences += [f"{line.get('name')}: {line['note']}" for line in run.layers if line.get("note")]
    few = [(rows / inputs, line) for line in run.layers for rows, inputs in [rows_of(line)] if 0 < rows < FEW * inputs]
    if few:
        worst = min(few, key=lambda pair: pair[0])[1]
        sentences.append(
            f"{len(few)} of {len(run.layers)} layers were calibrated with fewer than {FEW} rows per input feature; the "
            f"fewest: {worst.get('name')}, {worst.get('rows')} rows for {worst.get('inputs')} features"
        )
    listed = run.evaluation.get("warnings")
    return sentences + [str(text) for text in (listed if isinstance(listed, list) else ())]


def rows_of(line: dict[str, Any]) -> tuple[float, float]:
    """Calibration rows and input features of a layer; 0 where unknown."""
    return number(line.get("rows")) or 0, number(line.get("inputs")) or 0


def layers(runs: Sequence[Run]) -> Markup | None:
    """The layers of all models in one table, which the script sorts and filters."""
    lines = [(run, line) for run in runs for line in run.layers]
    if not lines:
        return None
    buttons = {title: tag("button", title, type="button") for title in COLUMNS}
    head = tag("tr", *(tag("th", buttons[title], scope="col", class_=COLUMNS[title]) for title in COLUMNS))
    body = [layer_row(run.name, line) for run, line in lines]
    names = list(dict.fromkeys(run.name for run, _ in lines))
    kinds = list(dict.fromkeys(place(str(line.get("name")))[0] for _, line in lines))
    controls = [
        tag("label", "Filter ", tag("input", type="search", id="layer-text", placeholder="name or format")),
        choice("layer-model", "Model ", names),
        choice("layer-kind", "Kind ", kinds),
        tag("output", f"{len(lines)} layers", id="layer-count", aria_live="polite"),
    ]
    note = "A click on a heading sorts. SQNR is of the layer's output on held-out inputs."
    grid = tag(
        "table", tag("caption", "Layers", class_="unseen"), tag("thead", head), tag("tbody", *body), id="layer-table"
    )
    return join(
        [tag("div", *controls, class_="controls"), tag("p", note, class_="note"), scrolling(grid, "Layers", "tall")]
    )


def layer_row(model: str, line: dict[str, Any]) -> Markup:
    """One layer; numbers carry their exact value for sorting."""
    name, weight = str(line.get("name")), str(line.get("weight", NONE))
    bits = "".join(re.findall(r"^[A-Z]+(\d+)", weight))
    size, error, sqnr = (number(line.get(key)) for key in ("bytes_after", "weight_error", "sqnr"))
    rows, held_out = (number(line.get(key)) or None for key in ("rows", "held_out"))
    cells = [
        (model, None),
        (bits or NONE, number(int(bits)) if bits else None),
        (f"{number(line.get('rank')) or 0:.0f}", number(line.get("rank")) or 0.0),
        (NONE if rows is None else f"{rows:.0f}", rows),
        (NONE if sqnr is None else f"{sqnr:.1f}", sqnr),
        (weight, None),
        (str(line.get("act", NONE)), None),
        (NONE if held_out is None else f"{held_out:.0f}", held_out),
        (NONE if size is None else f"{size / 1e3:.1f}", size),
        (NONE if error is None else f"{error:.4f}", error),
    ]
    sides = list(COLUMNS.values())[1:]
    tds = [tag("td", text, data_v=value, class_=side) for (text, value), side in zip(cells, sides, strict=True)]
    return tag("tr", tag("th", name, scope="row"), *tds, data_model=model, data_kind=place(name)[0])


def choice(identity: str, label: str, options: Sequence[str]) -> Markup | None:
    """A drop-down list with "all" first; nothing for a single option."""
    entries = [tag("option", "all", value=""), *(tag("option", option, value=option) for option in options)]
    return tag("label", label, tag("select", *entries, id=identity)) if len(options) > 1 else None


def metrics(runs: Sequence[Run]) -> Markup | None:
    """The metrics of evaluated sets with errors and differences to the first, one table per protocol; the protocols."""
    evaluated = [run for run in runs if run.metrics]
    if not evaluated:
        return None
    comparable: list[list[Run]] = []
    for run in evaluated:
        same = (g for g in comparable if not disagreements(g[0].evaluation["protocol"], run.evaluation["protocol"]))
        group = next(same, None)
        if group is None:
            comparable.append(group := [])
        group.append(run)
    notes = ["± is one standard error, by the jackknife over images; in brackets the difference to the first row."]
    if len(comparable) > 1:
        notes.append("Sets in different tables have different protocols and are not comparable.")
    if not all(run.evaluation["protocol"].get("comparable") for run in evaluated):
        notes.append(f"{NOT_COMPARABLE[0].upper()}{NOT_COMPARABLE[1:]}.")
    keys = list(dict.fromkeys(key for run in evaluated for key in run.evaluation["protocol"]))
    rows = [[key.replace("_", " "), *protocol_row(evaluated, key)] for key in keys]
    protocol = [row for row in rows if set(row[1:]) != {NONE}]
    return join([
        *map(metrics_table, comparable),
        *(tag("p", note, class_="note") for note in notes),
        details("Protocol", table(["field", *(run.name for run in evaluated)], protocol, "Protocol", visible=False)),
    ])  # fmt: skip


def metrics_table(runs: Sequence[Run]) -> Markup:
    """The metrics of sets of one protocol."""
    compared = comparison([run.metrics for run in runs if run.metrics], force=True)
    cells = [map(str, compared.cells(row).values()) for row in compared.rows]
    rows = [[run.name, *values] for run, values in zip(runs, cells, strict=True)]
    return table(["set", *compared.keys], rows, "Metrics", visible=False)


def protocol_row(runs: Sequence[Run], key: str) -> list[str]:
    """A field of the protocol in every evaluation."""
    values = [run.evaluation["protocol"].get(key) for run in runs]
    return [NONE if value is None else brief(value) for value in values]


def tries(run: Run) -> Markup | None:
    """The choices that --target-psnr and --preset auto compared by images, the used one first."""
    rows = [
        [f"{i + 1}{' (used)' * (i == 0)}", *(NONE if (v := number(entry.get(k))) is None else f"{v / unit:.{digits}f}"
         for k, unit, digits in (("bytes", 1e6, 2), ("sqnr", 1, 1), ("psnr", 1, 1)))]
        for i, entry in enumerate(run.tries)
    ]  # fmt: skip
    caption = f"{run.name}: choices compared by their images"
    target = number(run.plan.get("target_psnr"))
    caption += f"; requested: {target:g} dB" if target is not None else ""
    return table(["choice", "size, MB", "predicted SQNR, dB", "PSNR, dB"], rows, caption) if rows else None
