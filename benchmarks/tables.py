"""The tables of the README, made from results.csv: `python benchmarks/tables.py` puts them between their markers."""

import csv
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("results.csv")
README = Path(__file__).parents[1] / "README.md"


def latest(benchmark: str) -> dict[str, dict[str, str]]:
    """The newest row of every name."""
    with RESULTS.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file) if row["benchmark"] == benchmark}


def digits() -> str:
    """What each method does to the digits, and how many megabytes its model takes."""
    rows = latest("digits presets")
    lines = ["| method | model, MB | PSNR, dB | relative L2 | layer SQNR, dB |", "|---|---|---|---|---|"]
    for name in [key.removesuffix(" PSNR") for key in rows if key.endswith(" PSNR")]:
        psnr, relative, layers = (rows.get(f"{name} {what}") for what in ("PSNR", "relative L2", "layer SQNR"))
        assert psnr is not None
        assert relative is not None
        size = re.search(r"([\d.]+) MB", psnr["note"])
        assert size is not None
        shown = f"{float(layers['value']):.1f}" if layers else "–"
        values = f"{float(psnr['value']):.1f} | {float(relative['value']):.4f} | {shown}"
        lines.append(f"| `{name}` | {float(size[1]):.2f} | {values} |")
    row = next(iter(rows.values()))
    setting = row["note"].rpartition(",")[0]
    source = f"{setting}; {row['machine']}; {row['versions']}; commit {row['commit']}; {row['date']}."
    return "\n".join([*lines, "", f"{source} `python benchmarks/bench_end_to_end.py presets` measures it again."])


TABLES = {"digits": digits}


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
