"""Tables of several metrics.json, and the refusal to put unlike things into one."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdit.errors import UserError
from svdit.evaluation.compare import compare
from svdit.evaluation.protocol import disagreements


def report(path: Path, fid: float, leave_out: list[float], **protocol: Any) -> Path:
    fields = {
        "extractor": "inception",
        "n_fake": 50,
        "sample_steps": 20,
        "comparable": True,
        "sample_seed": 0,
    } | protocol
    metrics = {"fid": {"value": fid, "leave_out": leave_out, "reason": None}}
    metrics |= {name: {"value": None, "leave_out": [], "reason": "why"} for name in ("mind", "ssim")}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "metrics": metrics, "protocol": fields}))
    return path


def test_first_line_is_the_baseline_and_pairs_share_their_error(tmp_path: Path):
    a = report(tmp_path / "full" / "metrics.json", 10.0, [9.0, 10.0, 11.0])
    b = report(tmp_path / "w4.json", 12.0, [11.0, 12.0, 13.5])
    table = compare([a.parent, b])
    assert "| full | 10.0 ± 1.2 " in table
    assert "| w4   | 12.0 ± 1.5 (+2.00 ± 0.33) |" in table  # se of [2, 2, 2.5], not the root of two squares
    assert "errors of differences paired by seed" in table
    assert "ssim" not in table  # nobody has it


def test_other_seeds_are_not_paired(tmp_path: Path):
    a = report(tmp_path / "a.json", 10.0, [9.0, 10.0, 11.0])
    for seed in (1, None):
        b = report(tmp_path / "b.json", 12.0, [11.0, 12.0, 13.0], sample_seed=seed)
        table = compare([a, b])
        assert "12.0 ± 1.2 (+2.0 ± 1.6)" in table
        assert "not all paired by seed" in table


@pytest.mark.parametrize(
    ("field", "value"), [("sample_steps", 50), ("n_fake", 10), ("extractor", "random"), ("new", 1)]
)
def test_unlike_protocols_are_refused_by_field_and_forced_ones_marked(tmp_path: Path, field: str, value: Any):
    a = report(tmp_path / "a.json", 10.0, [9.0, 11.0])
    b = report(tmp_path / "b.json", 12.0, [11.0, 13.0], **{field: value})
    with pytest.raises(UserError, match=rf"a and b differ in {field}: .* against {value}; .*--force"):
        compare([a, b])
    table = compare([a, b], force=True)
    assert "| b *" in table
    assert f"* b differs in {field}: not comparable." in table


def test_asked_metrics_and_random_features(tmp_path: Path):
    a = report(tmp_path / "a.json", 10.0, [], comparable=False)
    assert "–" in compare([a], ["fid", "mind"])
    assert "NOT comparable" in compare([a])
    with pytest.raises(UserError, match="a has no metric psnr; it has fid, mind, ssim"):
        compare([a], ["psnr"])


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}'])
def test_other_files_are_refused(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not a"):
        compare([tmp_path / "x.json"])
    with pytest.raises(UserError, match=r"missing\.json is not a readable"):
        compare([tmp_path / "missing.json"])


def test_protocols_disagree_in_any_field_but_the_seed():
    a = {"n_fake": 1, "sample_seed": 0, "x": None}
    assert disagreements(a, dict(a)) == []
    assert disagreements(a, a | {"sample_seed": 1}) == []
    assert disagreements(a, a | {"n_fake": 2, "x": 1, "y": 0}) == ["n_fake", "x", "y"]
