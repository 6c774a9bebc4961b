"""Several metrics.json in one table, the first as the baseline; different protocols are refused, by field.

Where two sets share protocol and sampling seed, the error of their difference is the jackknife of the pairs;
otherwise it is the root of the sum of the squared errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from svdit.errors import UserError
from svdit.evaluation.jackknife import Estimate, Estimates
from svdit.evaluation.metrics import METRICS, RANDOM
from svdit.evaluation.paired import OF_ALL_PAIRS
from svdit.evaluation.protocol import disagreements
from svdit.evaluation.report import NOT_COMPARABLE, aligned, literal, markdown_table, number, read_report
from svdit.printing import printable

PROTOCOL = (  # the fields that are printed below a table
    *("n_fake", "n_real", "pixels", "extractor", "sample_family", "sample_sampler", "sample_steps", "sample_cfg_scale"),
    *("sample_vae", "sample_seed"),
)
WIDTH, LONGEST = 100, 32  # characters of a table and of a name in a terminal
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
}


@dataclass(frozen=True)
class Row:
    """One file: its path, name, protocol and estimates, and the protocol fields in which it differs from the first."""

    path: str
    name: str
    protocol: dict[str, Any]
    metrics: Estimates
    differs: tuple[str, ...] = ()

    def paired_with(self, other: Row) -> bool:
        """Whether both have the same protocol and sampling seed."""
        seeds = self.protocol.get("sample_seed"), other.protocol.get("sample_seed")
        return not self.differs and not other.differs and seeds[0] == seeds[1] is not None

    def value(self, key: str) -> float | None:
        """The value of a metric; None if it was not measured."""
        return self.metrics[key].value if key in self.metrics else None


@dataclass(frozen=True)
class Cell:
    """A value and its error; in other rows than the first also the difference to the first, and its error."""

    value: float | None
    se: float | None = None
    difference: float | None = None
    difference_se: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        cell = _with_error(self.value, self.se)
        if self.difference is None:
            return cell
        sign = "+" if self.difference >= 0 else ""
        return f"{cell} ({sign}{_with_error(self.difference, self.difference_se)})"


@dataclass(frozen=True)
class Comparison:
    """A table of the metrics `keys`: one row per file, the first is the baseline."""

    keys: list[str]
    rows: list[Row]

    def cells(self, row: Row) -> dict[str, Cell]:
        """The values of a row by metric."""
        return {key: _cell(self.rows[0], row, key) for key in self.keys}

    def lines(self) -> list[list[str]]:
        """The heading and the rows as text; * marks a set of another protocol."""
        names = [row.name + " *" * bool(row.differs) for row in self.rows]
        cells = [map(str, self.cells(row).values()) for row in self.rows]
        return [["", *self.keys], *([name, *values] for name, values in zip(names, cells, strict=True))]

    def text(self) -> str:
        """The table for a terminal of WIDTH columns, with notes: several below each other where it is wider."""
        names, *columns = zip(*self.lines(), strict=True)
        tables: list[list[tuple[str, ...]]] = [[tuple(shortened(printable(name)) for name in names)]]
        for column in columns:
            if len(tables[-1]) > 1 and width([*tables[-1], column]) > WIDTH:
                tables.append(tables[-1][:1])
            tables[-1].append(column)
        parts = [aligned(list(zip(*table, strict=True))) for table in tables]
        texts = ["\n".join("  ".join(line).rstrip() for line in part) for part in parts]
        notes = [line for note in self.notes(printable) for line in wrap(note, WIDTH)]
        return "\n\n".join([*texts, "\n".join(notes)])

    def markdown(self) -> str:
        """The table in Markdown, with notes."""
        heading, *rows = self.lines()
        return "\n".join([*markdown_table(heading, rows), "", *self.notes(literal)])

    def latex(self) -> str:
        """The table in LaTeX, for the package booktabs, with notes as comments."""
        heading, *rows = ([_latex(cell) for cell in line] for line in self.lines())
        body = [" & ".join(line) + r" \\" for line in (heading, *rows)]
        begin, end = rf"\begin{{tabular}}{{l{'r' * len(self.keys)}}}", r"\end{tabular}"
        notes = [f"% {line}" for line in self.notes(printable)]
        return "\n".join([begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", end, *notes])

    def notes(self, escaped: Callable[[object], str]) -> list[str]:
        """What the cells mean, and which rows are not comparable; `escaped` makes text of what is in files."""
        first, *others = self.rows
        how = "paired by seed" if all(row.paired_with(first) for row in others) else "not all paired by seed"
        notes = [f"In brackets: minus the first line; errors of differences {how}."] if others else []
        notes += [
            f"* {escaped(row.name)} differs in {', '.join(row.differs)}: not comparable."
            for row in self.rows
            if row.differs
        ]
        notes += [
            f"{escaped(row.name)} was sampled with feature caching: {escaped(facts(value))}."
            for row in self.rows
            if (value := row.protocol.get("sample_caching"))
        ]
        protocol = {name: value for name in PROTOCOL if (value := first.protocol.get(name)) is not None}
        notes += [f"Protocol of the first line: {escaped(facts(protocol))}."] if protocol else []
        random = any(not row.protocol.get("comparable") for row in self.rows)
        return notes + ([f"{NOT_COMPARABLE}."] if random else [])

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON: file, name, the fields in which its protocol differs from the first row's, and values."""
        return [
            {
                "file": row.path,
                "name": row.name,
                "differs": list(row.differs),
                "metrics": {key: asdict(cell) for key, cell in self.cells(row).items()},
            }
            for row in self.rows
        ]


def compare(
    paths: Sequence[str | Path], metrics: Sequence[str] | None = None, force: bool = False, sort: str = ""
) -> str:
    """A Markdown table of `metrics` (default: the usual ones that the first file has), one row per file.

    `sort`: the metric that orders the rows below the baseline, best first; by default they are in the order of `paths`.
    Raises UserError for different protocols, unless `force`, which marks them, and for a metric the first file lacks.
    """
    return comparison(paths, metrics, force, sort).markdown()


def comparison(
    paths: Sequence[str | Path], metrics: Sequence[str] | None = None, force: bool = False, sort: str = ""
) -> Comparison:
    """The table of `compare` as data. Raises UserError as `compare` does."""
    first, *others = (_read(path) for path in paths)
    keys = _columns(first, metrics)
    if sort:
        _check_known(first, sort)
        others.sort(key=lambda row: _place(row.value(sort), sort))
    return Comparison(keys, [_checked(first, row, keys, force) for row in (first, *others)])


def _place(value: float | None, key: str) -> float:
    """A number that is smaller for better values of a metric."""
    higher = key.removeprefix(RANDOM) in {name for metric in METRICS.values() for name in metric.higher}
    return math.inf if value is None else -value if higher else value


def _read(path: str | Path) -> Row:
    report = read_report(path)
    name = Path(path).parent.name if Path(path).name == "metrics.json" else Path(path).stem
    estimates = {
        key: Estimate(metric["value"], tuple(metric["leave_out"]), metric["reason"])
        for key, metric in report["metrics"].items()
    }
    return Row(str(path), name, report["protocol"], estimates)


def _checked(first: Row, row: Row, keys: Sequence[str], force: bool) -> Row:
    # Counterparts must agree only where both rows show a metric of pairs.
    of_pairs = {*OF_ALL_PAIRS, *(key for metric in METRICS.values() for key in metric.distances)}
    pairs = any(first.value(key) is not None and row.value(key) is not None for key in of_pairs.intersection(keys))
    fields = disagreements(first.protocol, row.protocol, pairs)
    if fields and not force:
        values = "; ".join(f"{f}: {first.protocol.get(f)} against {row.protocol.get(f)}" for f in fields)
        values = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", values)  # a hash
        raise UserError(
            f"{first.name} and {row.name} differ in {values}; evaluate both alike, or pass --force to mark them"
        )
    return replace(row, differs=tuple(fields))


def _columns(first: Row, metrics: Sequence[str] | None) -> list[str]:
    if metrics is None:
        usual = {key for metric in METRICS.values() for key in metric.in_comparison}
        return [key for key in first.metrics if first.value(key) is not None and key.removeprefix(RANDOM) in usual]
    for key in metrics:
        _check_known(first, key)
    return list(metrics)


def _check_known(row: Row, key: str) -> None:
    if key not in row.metrics:
        raise UserError(f"{row.name} has no metric {key}; it has {', '.join(row.metrics)}")


def _cell(first: Row, row: Row, key: str) -> Cell:
    a, b = first.metrics[key], row.metrics.get(key, Estimate(None))
    if row is first or a.value is None or b.value is None:
        return Cell(b.value, b.se)
    paired = row.paired_with(first) and len(a.leave_out) == len(b.leave_out)
    error = b.minus(a).se if paired else _independent(a.se, b.se)
    return Cell(b.value, b.se, b.value - a.value, error)


def _with_error(value: float, error: float | None) -> str:
    return number(value, error) + (f" ± {number(error, error)}" if error else "")


def _independent(*errors: float | None) -> float | None:
    """The error of a difference of independent estimates; None if one is unknown."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def facts(record: object) -> str:
    """ "speedup 2.0, sha256 40b6b057a0c010c7" of what a manifest records; anything else as it is."""
    return ", ".join(f"{key} {value}" for key, value in record.items()) if isinstance(record, dict) else str(record)


def shortened(name: str) -> str:
    """A name of at most LONGEST characters; a longer one without its middle."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def width(columns: Sequence[Sequence[str]]) -> int:
    """Characters of a line with these columns, two apart."""
    return sum(max(map(len, column)) for column in columns) + 2 * (len(columns) - 1)


def _latex(text: str) -> str:
    """Any text in LaTeX as it is."""
    text = re.sub(r"(^|\()-(?=\d)", r"\1−", printable(text))  # a minus, not a hyphen in a name
    return "".join(LATEX.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
