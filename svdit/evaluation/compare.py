"""Several metrics.json in one table, the first as the baseline; unlike protocols are refused, by field.

Where two sets share protocol and sampling seed, the error of their difference is the jackknife's of the pairs;
otherwise the two errors are added in squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdit.errors import UserError
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.protocol import disagreements
from svdit.evaluation.report import NOT_COMPARABLE, markdown_table, number, read_report

SHOWN = ("fid", "sfid", "kid_full", "is", "precision", "recall", "psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Row:
    """One file: its name, protocol and estimates, and the fields in which it departs from the first."""

    name: str
    protocol: dict[str, Any]
    metrics: dict[str, Estimate]
    departs: tuple[str, ...] = ()

    def paired_with(self, other: Row) -> bool:
        seeds = self.protocol.get("sample_seed"), other.protocol.get("sample_seed")
        return not self.departs and not other.departs and seeds[0] == seeds[1] is not None


def compare(paths: Sequence[str | Path], metrics: Sequence[str] | None = None, force: bool = False) -> str:
    """A Markdown table of `metrics` (default: the usual ones that the first file has), a line per file."""
    rows = [_read(path) for path in paths]
    rows = [_against(rows[0], row, force) for row in rows]
    names = _columns(rows[0], metrics)
    cells = [[row.name + " *" * bool(row.departs), *(_cell(rows[0], row, name) for name in names)] for row in rows]
    return "\n".join([*markdown_table(["", *names], cells), "", *_notes(rows)])


def _read(path: str | Path) -> Row:
    report = read_report(path)
    name = Path(path).parent.name if Path(path).name == "metrics.json" else Path(path).stem
    estimates = {
        name: Estimate(found["value"], tuple(found["leave_out"]), found["reason"])
        for name, found in report["metrics"].items()
    }
    return Row(name, report["protocol"], estimates)


def _against(first: Row, row: Row, force: bool) -> Row:
    fields = disagreements(first.protocol, row.protocol)
    if fields and not force:
        values = "; ".join(f"{f}: {first.protocol.get(f)} against {row.protocol.get(f)}" for f in fields)
        raise UserError(f"{first.name} and {row.name} differ in {values}; measure alike, or pass --force to mark them")
    return Row(row.name, row.protocol, row.metrics, tuple(fields))


def _columns(first: Row, metrics: Sequence[str] | None) -> list[str]:
    if metrics is None:
        had = [name for name, estimate in first.metrics.items() if estimate.value is not None]
        return [name for name in had if name.removeprefix("random_") in SHOWN]
    for name in metrics:
        if name not in first.metrics:
            raise UserError(f"{first.name} has no metric {name}; it has {', '.join(first.metrics)}")
    return list(metrics)


def _cell(first: Row, row: Row, name: str) -> str:
    a, b = first.metrics[name], row.metrics.get(name, Estimate(None))
    if b.value is None:
        return "–"
    cell = _with_error(b.value, b.se)
    if row is first or a.value is None:
        return cell
    paired = row.paired_with(first) and len(a.leave_out) == len(b.leave_out)
    error = b.minus(a).se if paired else _in_squares(a.se, b.se)
    sign = "+" if b.value >= a.value else ""
    return f"{cell} ({sign}{_with_error(b.value - a.value, error)})"


def _with_error(value: float, error: float | None) -> str:
    return number(value, error) + (f" ± {number(error, error)}" if error else "")


def _in_squares(*errors: float | None) -> float | None:
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def _notes(rows: Sequence[Row]) -> list[str]:
    first, *others = rows
    how = "paired by seed" if all(row.paired_with(first) for row in others) else "not all paired by seed"
    notes = [f"In brackets: minus the first line; errors of differences {how}."] if others else []
    notes += [f"* {row.name} differs in {', '.join(row.departs)}: not comparable." for row in rows if row.departs]
    return notes + ([f"{NOT_COMPARABLE}."] if any(not row.protocol["comparable"] for row in rows) else [])
