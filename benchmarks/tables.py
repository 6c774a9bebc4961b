"""The tables of the docs, made from results.csv: `python benchmarks/tables.py` puts them between their markers."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).with_name("results.csv")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (DOCS / "quantization.md", DOCS / "evaluation.md", DOCS / "performance.md")
Rows = dict[str, dict[str, str]]


def latest(benchmark: str) -> Rows:
    """The newest row of every name."""
    with RESULTS.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file) if row["benchmark"] == benchmark}


def markdown(header: list[str], lines: list[list[str]], below: str) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", below])


def source(rows: Rows, command: str, setting: str = "") -> str:
    """Where and when the newest of the rows was measured, and how to do it again."""
    row = list(rows.values())[-1]
    parts = [setting, row["machine"], row["versions"], f"commit {row['commit']}", row["date"]]
    return "; ".join(filter(None, parts)) + f". `python benchmarks/{command}` measures it again."


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text!r}"
    return match[1]


def pictures(what: str, header: str) -> str:
    """What each method does to the digits, and how many megabytes its model takes."""
    rows, lines, note = latest(f"digits {what}"), [], ""
    if not rows:
        return "Not measured yet."
    names = [key.removesuffix(" PSNR") for key in rows if key.endswith(" PSNR")]
    if what == "presets":
        names.sort(key=lambda name: -float(rows[f"{name} PSNR"]["value"]))
    for name in names:
        psnr, relative, layer = (rows.get(f"{name} {key}") for key in ("PSNR", "relative L2", "layer SQNR"))
        assert psnr is not None
        assert relative is not None
        note = psnr["note"]
        se = found("se ([0-9.]+|nan)", note)
        value = f"{float(psnr['value']):.1f}" + ("" if se == "nan" else f" ± {se}")
        shown = f"{float(layer['value']):.1f}" if layer else "–"
        size = f"{float(found('([0-9.]+) MB', note)):.2f}"
        lines.append([f"`{name}`", size, value, f"{float(relative['value']):.4f}", shown])
    rank = "" if what == "ranks" else ", rank 8"
    setting = f"{found('^([0-9]+) digits', note)} digits, DDIM 50, cfg 1.5{rank}; ± over 2 or 3 calibrations, else one"
    columns = [header, "model, MB", "PSNR, dB", "relative L2", "layer SQNR, dB"]
    return markdown(columns, lines, source(rows, f"bench_end_to_end.py {what}", setting))


def synthetic() -> str:
    """SQNR of layer outputs on the synthetic block."""
    rows = latest("synthetic")
    columns = [("moderate", layer) for layer in ("qkv", "proj", "fc1", "fc2")] + [("plain", "qkv"), ("plain", "fc2")]
    names = dict.fromkeys(name.split(" ", 2)[2] for name in rows)
    lines = []
    for name in names:
        values = [rows.get(f"{profile} {layer} {name}") for profile, layer in columns]
        lines.append([name, *(f"{float(row['value']):.2f}" if row else "" for row in values)])
    header = ["SQNR, dB", *(layer if profile == "moderate" else f"{layer}, plain" for profile, layer in columns)]
    return markdown(header, lines, source(rows, "bench_quantization.py --profiles moderate plain", "rank 16"))


def listed(benchmark: str, command: str, groups: tuple[str, ...] = ()) -> str:
    """Every number by its name; those with one of `groups` in their names stand together, in that order."""
    rows = latest(benchmark)
    if not rows:
        return "Not measured yet."
    names = sorted(rows, key=lambda name: [group not in name for group in groups])
    lines = [[name, number(rows[name]), rows[name]["note"], rows[name]["machine"]] for name in names]
    return markdown(["what", "", "setting", "machine"], lines, source(rows, command))


def number(row: dict[str, str]) -> str:
    value = float(row["value"])
    return f"{value:.0f} {row['unit']}" if abs(value) >= 1000 else f"{value:.3g} {row['unit']}"


CPU = ("batch 2", "batch 8", "share of peak", "share of a block", "attention", "memory", "first forward pass")
TABLES: dict[str, Callable[[], str]] = {
    "digits": lambda: pictures("presets", "method"),
    "ablation": lambda: pictures("ablation", "recipe"),
    "ranks": lambda: pictures("ranks", "recipe"),
    "budget": lambda: pictures("budget", "weights"),
    "synthetic": synthetic,
    "cost": lambda: listed("cost", "bench_cost.py"),
    "evaluation": lambda: (ROOT / "benchmarks" / "digits_evaluation.md").read_text().strip(),
    "evaluation speed": lambda: listed("evaluation", "evaluation.py"),
    "cpu": lambda: listed("cpu", "bench_cpu.py", CPU),
    "anchors": lambda: listed("anchors", "bench_anchors.py"),
    "guidance interval": lambda: listed("guidance interval", "bench_sampling.py --digits"),
    "backends": lambda: listed("digits backends", "bench_end_to_end.py backends"),
    "sampling": lambda: listed("sampling", "bench_sampling.py"),
}


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        if start in text:
            before, _, rest = text.partition(start)
            text = f"{before}{start}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
