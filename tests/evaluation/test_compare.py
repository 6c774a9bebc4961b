"""Tables of several metrics.json, and the refusal to compare different protocols."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from svdit.errors import UserError
from svdit.evaluation.compare import compare, comparison
from svdit.evaluation.inputs import SAMPLE_FIELDS
from svdit.evaluation.protocol import disagreements


def report(path: Path, fid: float, leave_out: list[float], psnr: float | None = None, **protocol: Any) -> Path:
    fields = {
        "extractor": "inception",
        "n_fake": 50,
        "sample_steps": 20,
        "comparable": True,
        "sample_seed": 0,
    } | protocol
    metrics = {"fid": {"value": fid, "leave_out": leave_out, "reason": None}}
    metrics |= {name: {"value": None, "leave_out": [], "reason": "why"} for name in ("mind", "ssim")}
    if psnr is not None:
        metrics["psnr"] = {"value": psnr, "leave_out": [], "reason": None}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "metrics": metrics, "protocol": fields}))
    return path


def test_first_row_is_the_baseline_and_errors_are_paired(tmp_path: Path):
    a = report(tmp_path / "full" / "metrics.json", 10.0, [9.0, 10.0, 11.0])
    b = report(tmp_path / "w4.json", 12.0, [11.0, 12.0, 13.5])
    table = compare([a.parent, b])
    assert "| full | 10.0 ± 1.2 " in table
    assert "| w4   | 12.0 ± 1.5 (+2.00 ± 0.33) |" in table  # se of [2, 2, 2.5], not the root of two squares
    assert "errors of differences paired by seed" in table
    assert "ssim" not in table  # no file has it


@pytest.mark.parametrize(("key", "order"), [("fid", "abc"), ("psnr", "acb"), ("mind", "acb")])
def test_rows_below_the_baseline_are_sorted_best_first(tmp_path: Path, key: str, order: str):
    """Higher is better for some metrics; of equal or missing values the order stays."""
    values = {"a": (10.0, 30.0), "c": (12.0, 40.0), "b": (11.0, 35.0)}
    files = [report(tmp_path / f"{name}.json", fid, [], psnr) for name, (fid, psnr) in values.items()]
    table = compare(files, ["fid"], sort=key)
    assert "".join(line[2] for line in table.splitlines()[2:5]) == order
    with pytest.raises(UserError, match="a has no metric kid; it has"):
        compare(files, sort="kid")


def wide(folder: Path, name: str, shift: float, **protocol: Any) -> Path:
    """A report of twelve metrics."""
    keys = [f"metric_{i:02d}" for i in range(12)]
    values = {k: {"value": 40 + i + shift, "leave_out": [40.0, 40.5, 41 + shift], "reason": None}
              for i, k in enumerate(keys)}  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"schema": 1, "metrics": values, "protocol": {"comparable": True} | protocol}))
    return path


@pytest.mark.parametrize("names", ["ab", ["full", f"digits_{'long' * 20}_w4a4", f"digits_{'long' * 20}_w8a8"]])
def test_in_a_terminal_many_metrics_are_tables_below_each_other(tmp_path: Path, names: Sequence[str]):
    keys = [f"metric_{i:02d}" for i in range(12)]
    files = [wide(tmp_path, name, i) for i, name in enumerate(names)]
    text = comparison(files, keys).text()
    assert max(map(len, text.splitlines())) <= 100
    *tables, notes = text.split("\n\n")
    assert [key for table in tables for key in table.splitlines()[0].split()] == keys
    assert all(len(table.splitlines()) == 1 + len(names) for table in tables) and len(tables) > 2
    assert len({table.splitlines()[2].split()[0] for table in tables}) == 1
    cells = [cell for table in tables for cell in re.findall(r"[0-9.]+ ± [0-9.]+ \([^)]+\)", table.splitlines()[2])]
    assert cells == [str(cell) for cell in comparison(files, keys).cells(comparison(files, keys).rows[1]).values()]
    assert "In brackets: minus the first line" in notes


def test_a_table_states_its_protocol(tmp_path: Path):
    table = comparison([wide(tmp_path, "full", 0, n_fake=5, sample_sampler="ddim", sample_cfg_scale=1.5)])
    note = "Protocol of the first line: n_fake 5, sample_sampler ddim, sample_cfg_scale 1.5."
    assert note in table.markdown().replace("\\", "") and note in table.text() and f"% {note}" in table.latex()


def test_a_few_metrics_are_one_table(tmp_path: Path):
    files = [wide(tmp_path, name, i) for i, name in enumerate("abc")]
    head, *rows = comparison(files, ["metric_00", "metric_01"]).text().split("\n\n")[0].splitlines()
    assert head.split() == ["metric_00", "metric_01"] and [row[0] for row in rows] == ["a", "b", "c"]
    starts = [head.index(key) for key in ("metric_00", "metric_01")]
    assert all(re.match(r"4\d\.", row[start:]) for row in rows for start in starts)  # values are aligned


def test_latex_compiles_as_one_table_with_escaped_names(tmp_path: Path):
    files = [wide(tmp_path, name, -i, comparable=i == 0) for i, name in enumerate(["full", r"w4_a4 50%\x"])]
    latex = comparison(files, ["metric_00"], force=True).latex().splitlines()
    assert latex == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r" & metric\_00 \\",
        r"\midrule",
        r"full & 40.00 $\pm$ 0.58 \\",
        r"w4\_a4 50\%\textbackslash{}x * & 39.00 $\pm$ 0.33 ($-$1.00 $\pm$ 0.67) \\",
        r"\bottomrule",
        r"\end{tabular}",
        *latex[8:],
    ]
    assert latex[8:] and all(line.startswith("% ") for line in latex[8:])
    assert any("NOT comparable" in line for line in latex)


def test_different_seeds_are_not_paired(tmp_path: Path):
    a = report(tmp_path / "a.json", 10.0, [9.0, 10.0, 11.0])
    for seed in (1, None):
        b = report(tmp_path / "b.json", 12.0, [11.0, 12.0, 13.0], sample_seed=seed)
        table = compare([a, b])
        assert "12.0 ± 1.2 (+2.0 ± 1.6)" in table
        assert "not all paired by seed" in table


@pytest.mark.parametrize(
    ("field", "value"), [("sample_steps", 50), ("n_fake", 10), ("extractor", "random"), ("new", 1)]
)
def test_different_protocols_are_refused_by_field_and_marked_with_force(tmp_path: Path, field: str, value: Any):
    a = report(tmp_path / "a.json", 10.0, [9.0, 11.0])
    b = report(tmp_path / "b.json", 12.0, [11.0, 13.0], **{field: value})
    with pytest.raises(UserError, match=rf"a and b differ in {field}: .* against {value}; .*--force"):
        compare([a, b])
    table = compare([a, b], force=True)
    assert "| b *" in table
    assert f"* b differs in {field}: not comparable." in table


def test_psnr_against_different_counterparts_is_refused(tmp_path: Path):
    a = report(tmp_path / "a.json", 10.0, [], psnr=30.0, counterparts_sha256="1234" * 16)
    b = report(tmp_path / "b.json", 12.0, [], psnr=40.0, counterparts_sha256="other")
    with pytest.raises(UserError, match="a and b differ in counterparts_sha256: 123412341234… against other"):
        compare([a, b])
    assert "* b differs in counterparts_sha256: not comparable." in compare([a, b], force=True)
    assert "not comparable" not in compare([a, b], ["fid"])  # FID does not depend on the counterparts


def test_sets_with_and_without_counterparts_share_a_table(tmp_path: Path):
    full = report(tmp_path / "full.json", 10.0, [])
    a, b = (report(tmp_path / f"{name}.json", 12.0, [], psnr=30.0, counterparts_sha256="one") for name in ("a", "b"))
    for paths in ([full, a, b], [a, full, b]):
        assert "not comparable" not in compare(paths)


def test_named_metrics_and_random_features(tmp_path: Path):
    a = report(tmp_path / "a.json", 10.0, [], comparable=False)
    assert "–" in compare([a], ["fid", "mind"])
    assert "NOT comparable" in compare([a])
    with pytest.raises(UserError, match="a has no metric psnr; it has fid, mind, ssim"):
        compare([a], ["psnr"])


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}', '{"schema": 1}', '{"schema": 1, "metrics": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not a"):
        compare([tmp_path / "x.json"])
    with pytest.raises(UserError, match=r"there is no file .*missing\.json"):
        compare([tmp_path / "missing.json"])


def test_protocols_disagree_in_any_field_but_the_sampling_seed():
    a = {"n_fake": 1, "sample_seed": 0, "x": None}
    assert disagreements(a, dict(a)) == []
    assert disagreements(a, a | {"sample_seed": 1}) == []
    assert disagreements(a, a | {"n_fake": 2, "x": 1, "y": 0}) == ["n_fake", "x", "y"]


FLOW = {
    **{"sample_family": "sit", "sample_prediction": "velocity", "sample_uint8": "truncate", "sample_latents": "ab"},
    **{"sample_time_shift": 0.3, "sample_sde_form": "linear", "sample_last_step": "none", "sample_precision": "tf32"},
}


def test_reports_of_earlier_versions_are_of_dits():
    old = {"sample_sampler": "ddpm", "sample_steps": "250"}
    dit = {"family": "dit", "prediction": "epsilon", "time": "timesteps", "path": "ddpm", "noise_scale": 1.0}
    dit |= {"uint8": "half_up", "latents": None, "time_shift": 1.0, "sde_form": "sigma", "sde_norm": 1.0}
    dit |= {"last_step": "mean", "last_step_size": 0.04, "precision": "float32"}
    new = {f"sample_{name}": dit.get(name) for name in SAMPLE_FIELDS} | old
    assert disagreements(old, new) == disagreements(new, old) == []
    assert disagreements(old, new | {"sample_protocol": "dit-250"}) == []
    for field, value in FLOW.items():
        assert disagreements(old, new | {field: value}) == ([] if field == "sample_precision" else [field])
        assert disagreements(new, new | {field: value}) == [field]
    assert disagreements({}, new)  # without a manifest, nothing is known


def test_a_network_that_did_not_run_is_not_compared():
    new, network = {"extractor": None, "n_fake": 2}, {"precision": "float32", "resize": "bilinear"}
    assert disagreements(new | network, new) == disagreements(new, new | network) == []
    ours = new | network | {"extractor": "inception"}
    assert disagreements(ours, ours | {"resize": "bicubic"}) == ["resize"]
