"""What is written: JSON with every number, tables with the significant digits, images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdit.errors import UserError
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.report import Report, markdown_table, number, read_report

ESTIMATES = {
    "fid": Estimate(12.3456, (12.0, 12.5, 12.6)),
    "mind": Estimate(None, reason="too few"),
    "psnr": Estimate(30.0),
}


def report(**more: object) -> Report:
    protocol = {"comparable": True, "n_fake": 3, "sample_steps": None}
    fake = {"images": 3, "path": "x"}
    return Report(ESTIMATES, protocol, {"fake": fake}, {"torch": "2"}, ("look",), **more)  # type: ignore[arg-type]


def test_json_keeps_every_number(tmp_path: Path):
    picture = np.zeros((4, 4, 3), np.uint8)
    report(images={"grid_fake": picture}).save(str(tmp_path / "new"))
    content = read_report(tmp_path / "new")
    fid = content["metrics"]["fid"]
    assert (fid["value"], fid["leave_out"]) == (12.3456, [12.0, 12.5, 12.6])
    assert fid["se"] == ESTIMATES["fid"].se
    assert fid["bias"] == ESTIMATES["fid"].bias
    assert content["metrics"]["mind"] == {"value": None, "se": None, "bias": None, "leave_out": [], "reason": "too few"}
    assert (content["warnings"], content["protocol"]["n_fake"]) == (["look"], 3)
    assert Image.open(tmp_path / "new" / "grid_fake.png").size == (4, 4)
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == content
    assert len((tmp_path / "new" / "metrics.json").read_text().splitlines()) < 60  # lists stay on one line


@pytest.mark.parametrize("name", ["run  1", "画像\u3000集", "[1,  2]", 'a "[  ]" b', "\\\\  [\\"])
def test_names_stay_as_they_are(tmp_path: Path, name: str):
    inputs = {"fake": {"images": 3, "path": f"/sets/{name}"}}
    Report(ESTIMATES, {"comparable": True}, inputs, {}, (f"{name} has 3 images",)).save(tmp_path)
    content = read_report(tmp_path)
    assert (content["inputs"], content["warnings"]) == (inputs, [f"{name} has 3 images"])


def test_table_and_notes():
    table = report().markdown()
    assert "| fid    | 12.35 | 0.37 | 12.30    |" in table
    assert "- no mind: too few" in table
    assert "- warning: look" in table
    assert "NOT comparable" not in table
    second = report(second=ESTIMATES, difference={name: each.minus(each) for name, each in ESTIMATES.items()})
    assert second.columns() == ("metric", "value", "± se", "debiased", "second", "difference", "± se")
    assert {len(row) for row in second.rows()} == {7}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(12.3456, None, "12.346"), (12.3456, 0.37, "12.35"), (12.3456, 0.0, "12.346"), (1234.5, 21.0, "1234"),
     (0.0123421, 0.00098, "0.01234"), (None, None, ""), (-1e-9, 2.1, "0.0"),
     (1.0, math.nan, "1"), (1.0, math.inf, "1"), (math.nan, 0.1, "nan")],
)  # fmt: skip
def test_digits_follow_the_error(value: float | None, error: float | None, text: str):
    assert number(value, error) == text


def test_columns_are_aligned():
    lines = markdown_table(("a", "bb"), [("long", "1")])
    assert lines == ["| a    | bb |", "| ---- | -- |", "| long | 1  |"]


@pytest.mark.parametrize("entry", [3, "x", None, [], {}, {"value": "x"}, {"leave_out": 3}, {"leave_out": ["a"]}])
def test_reports_with_other_values_are_one_sentence(tmp_path: Path, entry: object):
    report().save(tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    del content["sha256"]
    content["metrics"]["fid"] = content["metrics"]["fid"] | entry if entry and isinstance(entry, dict) else entry
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"fid in .*metrics\.json has no usable value; run svdit evaluate"):
        read_report(tmp_path)
