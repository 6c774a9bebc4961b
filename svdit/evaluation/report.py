"""The result of an evaluation: values, errors, protocol, versions and warnings, as JSON, Markdown and text.

`metrics.json` has the keys schema, metrics, second, difference, protocol, inputs, versions, warnings, seconds,
and the command where there was one. A metric is {value, se, bias, leave_out, reason}; `svdit compare` pairs two files
by the leave-one-block-out values.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdit.errors import UserError
from svdit.evaluation.jackknife import Estimate, Estimates
from svdit.evaluation.metrics import METRICS, RANDOM
from svdit.files import atomic_path, reading
from svdit.images import Pixels, write_png
from svdit.printing import printable
from svdit.storage.checksum import digest

SCHEMA = 1
NOT_COMPARABLE = "random features: NOT comparable with any published number, nor with Inception's"


@dataclass(frozen=True)
class Report:
    """Metrics by key; with a second set, its metrics and the `difference`, first minus second.

    `failed` are the metrics that were requested by name and are unavailable.
    """

    metrics: Estimates
    protocol: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    command: str | None = None  # that made it
    second: Estimates = field(default_factory=dict)
    difference: Estimates = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    images: dict[str, Pixels] = field(default_factory=dict, repr=False)

    @property
    def comparable(self) -> bool:
        """Whether the numbers are comparable with published ones: not for random features."""
        return bool(self.protocol["comparable"])

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        sets = {"metrics": self.metrics, "second": self.second, "difference": self.difference}
        return {
            "schema": SCHEMA,
            **{key: {name: _plain(estimate) for name, estimate in values.items()} for key, values in sets.items()},
            "protocol": self.protocol,
            "inputs": self.inputs,
            "versions": self.versions,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            **({"command": self.command} if self.command else {}),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Key, value, standard error, debiased value; with a second set also its value, the difference, its error."""
        return [self._row(name, estimate) for name, estimate in self.metrics.items()]

    def _row(self, name: str, estimate: Estimate) -> tuple[str, ...]:
        value, se, debiased = estimate.value, estimate.se, _debiased(name, estimate)
        row = (name, number(value, se) or "–", number(se, se), number(debiased, se))
        if not self.second:
            return row
        second, difference = self.second[name], self.difference[name]
        se = difference.se
        return (*row, number(second.value, second.se), number(difference.value, se), number(se, se))

    def columns(self) -> tuple[str, ...]:
        """The titles of `rows`."""
        second = ("second", "difference", "± se") if self.second else ()
        return ("metric", "value", "± se", "debiased", *second)

    def notes(self) -> list[str]:
        """The reasons for missing values, and the warnings."""
        missing = [f"no {name}: {estimate.reason}" for name, estimate in self.metrics.items() if estimate.value is None]
        return [*missing, *(f"warning: {warning}" for warning in self.warnings)]

    def text(self) -> str:
        """The table for a terminal, followed by the sets and the notes."""
        lines = [" ".join(cells).rstrip() for cells in aligned([self.columns(), *self.rows()], right=True)]
        lines += [NOT_COMPARABLE] if not self.comparable else []
        for key, what in (("fake", "generated"), ("real", "real")):
            if entry := self.inputs.get(key):
                classes = f" in {entry['classes']}" if "classes" in entry else ""
                lines.append(f"{self.protocol['n_' + key]} {what} images of {entry['path']}{classes}")
        return "\n".join(map(printable, [*lines, *self.notes()]))

    def markdown(self) -> str:
        """The table, its protocol and its warnings."""
        lines = [f"**{NOT_COMPARABLE}**", ""] if not self.comparable else []
        lines += markdown_table(self.columns(), self.rows())
        lines += ["", *(f"- {key}: {literal(value)}" for key, value in self.protocol.items() if value is not None)]
        lines += [f"- {literal(note)}" for note in self.notes()]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `metrics.json`, `metrics.md` and the images into the folder."""
        folder = Path(folder)
        content = self.to_json()
        plain = json.dumps({**content, "sha256": digest(content, {})}, indent=1, ensure_ascii=False)
        texts = {"metrics.json": _flat_lists(plain) + "\n", "metrics.md": self.markdown()}
        for name, text in texts.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        for name, image in self.images.items():
            write_png(folder / f"{name}.png", image)


def _flat_lists(text: str) -> str:
    """JSON with each list of numbers on one line."""
    string_or_numbers = r'"(?:[^"\\]|\\.)*"|\[[^][{}"]*\]'
    return re.sub(string_or_numbers, lambda m: m[0] if m[0][0] == '"' else " ".join(m[0].split()), text)


def _plain(estimate: Estimate) -> dict[str, Any]:
    value, leave_out = estimate.value, list(estimate.leave_out)
    reason = estimate.reason if value is None else None
    return {"value": value, "se": estimate.se, "bias": estimate.bias, "leave_out": leave_out, "reason": reason}


def _debiased(name: str, estimate: Estimate) -> float | None:
    biased = {metric.headline for metric in METRICS.values() if metric.biased}
    if estimate.value is None or estimate.bias is None or name.removeprefix(RANDOM) not in biased:
        return None
    return estimate.value - estimate.bias


def number(value: float | None, error: float | None = None) -> str:
    """Five significant digits; with an error, as many decimals as two digits of the error have."""
    if value is None:
        return ""
    significant = error is not None and math.isfinite(error) and error > 0
    decimals = max(0, 1 - math.floor(math.log10(error))) if significant and error else None
    text = f"{value:.5g}" if decimals is None else f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def literal(text: object) -> str:
    """Any text in Markdown as it is, on one line: neither HTML, links and images, nor a new cell."""
    return re.sub(r"[\\`\[\]|]", r"\\\g<0>", html.escape(printable(text), quote=False))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with aligned columns."""
    heading, *body = aligned([[literal(cell) for cell in cells] for cells in (columns, *rows)])
    rule = ["-" * len(cell) for cell in heading]
    return ["| " + " | ".join(cells) + " |" for cells in (heading, rule, *body)]


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> list[list[str]]:
    """The cells padded to the width of their column; `right` aligns all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.rjust(w) if right and i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]


def read_report(path: str | Path) -> dict[str, Any]:
    """The content of a `metrics.json`, or of the one in a folder. Raises UserError if it is not one."""
    path = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; pass the folder that svdit evaluate --output wrote")
    try:
        with reading(path):
            report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a readable metrics.json ({error}); run svdit evaluate --output again") from None
    valid = isinstance(report, dict) and report.get("schema") == SCHEMA
    if not valid or not all(isinstance(report.get(key), dict) for key in ("metrics", "protocol")):
        raise UserError(f"{path} is not a metrics.json of schema {SCHEMA}; run svdit evaluate --output again")
    if broken := [key for key, entry in report["metrics"].items() if not is_estimate(entry)]:
        raise UserError(f"{broken[0]} in {path} has no usable value; run svdit evaluate --output again")
    if report.get("sha256") not in (None, digest(report, {})):
        raise UserError(f"{path} does not match its checksum; restore it, or run svdit evaluate --output again")
    return report


def is_estimate(entry: object) -> bool:
    """Whether an entry of `metrics.json` has a value, leave-one-block-out values and a reason of the right types."""
    match entry:
        case {"value": int() | float() | None, "leave_out": list(values), "reason": str() | None}:
            return all(isinstance(value, int | float) for value in values)
    return False
