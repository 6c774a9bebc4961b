"""What an evaluation found, with all that is needed to judge and repeat it: numbers, errors, protocol, warnings.

`metrics.json` has the keys schema, metrics, second, difference, protocol, inputs, versions, warnings, seconds. A
metric is {value, se, bias, leave_out, reason}; by its leave-one-block-out values `svdit compare` pairs two files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdit.errors import UserError
from svdit.evaluation.jackknife import Estimate
from svdit.files import atomic_path
from svdit.images import Pixels, write_png

SCHEMA = 1
NOT_COMPARABLE = "random features: NOT comparable with any published number, nor with Inception's"


@dataclass(frozen=True)
class Report:
    """Metrics by name; where a second set was measured too, its metrics and the `difference`, first minus second.

    `failed` names the metrics that were asked for by name and could not be had.
    """

    metrics: dict[str, Estimate]
    protocol: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    second: dict[str, Estimate] = field(default_factory=dict)
    difference: dict[str, Estimate] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    pictures: dict[str, Pixels] = field(default_factory=dict, repr=False)

    @property
    def comparable(self) -> bool:
        return bool(self.protocol["comparable"])

    def to_json(self) -> dict[str, Any]:
        sets = {"metrics": self.metrics, "second": self.second, "difference": self.difference}
        return {
            "schema": SCHEMA,
            **{key: {name: _plain(estimate) for name, estimate in each.items()} for key, each in sets.items()},
            "protocol": self.protocol,
            "inputs": self.inputs,
            "versions": self.versions,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Name, value, standard error, value without its bias; with a second set also its value, difference, error."""
        return [self._row(name, estimate) for name, estimate in self.metrics.items()]

    def _row(self, name: str, estimate: Estimate) -> tuple[str, ...]:
        value, se, debiased = estimate.value, estimate.se, _debiased(name, estimate)
        row = (name, number(value, se) or "–", number(se, se), number(debiased, se))
        if not self.second:
            return row
        difference = self.difference[name]
        value, se = self.second[name].value, difference.se
        return (*row, number(value, self.second[name].se), number(difference.value, se), number(se, se))

    def notes(self) -> list[str]:
        """Why numbers are missing, and the warnings."""
        missing = [f"no {name}: {each.reason}" for name, each in self.metrics.items() if each.value is None]
        return [*missing, *(f"warning: {warning}" for warning in self.warnings)]

    def columns(self) -> tuple[str, ...]:
        second = ("second", "difference", "± se") if self.second else ()
        return ("metric", "value", "± se", "debiased", *second)

    def markdown(self) -> str:
        """The table, its protocol and its warnings."""
        lines = [f"**{NOT_COMPARABLE}**", ""] if not self.comparable else []
        lines += markdown_table(self.columns(), self.rows())
        lines += ["", *(f"- {key}: {value}" for key, value in self.protocol.items() if value is not None)]
        lines += [f"- {note}" for note in self.notes()]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Write `metrics.json`, `metrics.md` and the pictures."""
        plain = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        one_line = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), plain)
        texts = {"metrics.json": one_line + "\n", "metrics.md": self.markdown()}
        for name, text in texts.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_text(text)
        for name, picture in self.pictures.items():
            write_png(folder / f"{name}.png", picture)


def _plain(estimate: Estimate) -> dict[str, Any]:
    value, leave_out = estimate.value, list(estimate.leave_out)
    reason = estimate.reason if value is None else None
    return {"value": value, "se": estimate.se, "bias": estimate.bias, "leave_out": leave_out, "reason": reason}


def _debiased(name: str, estimate: Estimate) -> float | None:
    """Only Fréchet distances and the Inception Score carry a bias worth showing."""
    if estimate.value is None or estimate.bias is None or not name.removeprefix("random_").endswith(("fid", "is")):
        return None
    return estimate.value - estimate.bias


def number(value: float | None, error: float | None = None) -> str:
    """Five digits, or as many as the error leaves meaning to: two of the error's own."""
    if value is None:
        return ""
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else None
    text = f"{value:.5g}" if decimals is None else f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return ["| " + " | ".join(line) + " |" for line in padded]


def read_report(path: str | Path) -> dict[str, Any]:
    """A `metrics.json`, or the one in a folder."""
    path = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable metrics.json ({error}); run svdit evaluate --output again") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a metrics.json of schema {SCHEMA}; run svdit evaluate --output again")
    return report
