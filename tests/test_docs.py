"""The tables of the docs agree with the measurements; both READMEs show the same. test_quoted.py has the rest."""

import re
from pathlib import Path

import pytest
import torch
from quoted import blocks
from torch import nn

import svdit
from benchmarks.tables import MARKED, TABLES, filled, latest, listing, read
from benchmarks.tables import PAGES as TABLED
from svdit.model.config import FAMILIES
from svdit.sampling.protocols import JIT, PROTOCOLS

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


MARKS = [(page, match) for page in TABLED for match in MARKED.finditer(page.read_text())]
NAMES = [match[1] for _, match in MARKS]


def test_every_table_is_in_the_docs_once() -> None:
    assert sorted(NAMES) == sorted(TABLES)
    assert sum(page.read_text().count("<!-- table: ") for page in TABLED) == len(TABLES)  # none without a pin


@pytest.mark.parametrize(("page", "match"), MARKS, ids=NAMES)
def test_tables_are_made_from_the_rows_they_name(page: Path, match: re.Match[str]) -> None:
    assert int(match[2]) <= len(read())
    assert filled(match[0], read()) == match[0], f"edit no number in {page.name}; run python benchmarks/tables.py"


@pytest.mark.parametrize("match", [match for _, match in MARKS], ids=NAMES)
def test_a_changed_number_is_seen(match: re.Match[str]) -> None:
    edited = re.sub(r"\d\.\d", "8.8", match[0], count=1)
    assert edited != match[0] == filled(edited, read())


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"evaluation"}))  # which digits_evaluation.py writes itself
def test_new_rows_change_no_table_until_it_is_updated(name: str) -> None:
    text = next(match[0] for _, match in MARKS if match[1] == name)
    rows = read()
    new = [{**row, "value": "1234567"} for row in rows]  # every benchmark again, with other values
    assert filled(text, rows + new) == text
    updated = filled(text, rows + new, update=True)
    assert "1234567" in updated
    assert f"{name}, {2 * len(rows)} rows -->" in updated
    assert filled(text, rows, update=True) == text  # nothing new: the pin stays


def test_the_newest_row_of_a_name_wins() -> None:
    rows = [
        {"benchmark": "a", "name": f"{noun} a minute", "value": value}
        for noun, value in (("pictures", "1"), ("images", "2"))
    ]
    assert latest(rows, "a") == {"images a minute": rows[1]}
    assert latest(rows, "b") == {}


def test_processors_stand_side_by_side() -> None:
    machines = ["AMD EPYC", "AMD EPYC (Zen 4, family 25 model 17)", "Intel(R) Xeon(R) Processor"]
    same = {"benchmark": "a", "name": "W8A8", "unit": "×", "date": "2026-11-27", "commit": "", "versions": ""}
    own = [
        {"machine": f"{name}, 2 cores, 2 threads", "value": str(i), "note": f"{i} ms; rank 32, avx2"}
        for i, name in enumerate(machines)
    ]
    header, _, line, *_ = listing([same | row for row in own], "a", "a.py").splitlines()
    assert header == "| what | Zen 5 | Zen 4 | Intel Xeon | setting |"
    assert line == "| W8A8 | 0 × (0 ms) | 1 × (1 ms) | 2 × (2 ms) | rank 32 |"


def test_both_readmes_show_the_same_commands() -> None:
    def blocks(name: str) -> list[str]:
        text = re.sub(r"#.*", "", (ROOT / name).read_text().split("## ", 1)[1])
        return [" ".join(block.split()) for block in re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)]

    ours, theirs = blocks("README.md"), blocks("README.zh.md")
    assert theirs == [block for block in ours if block in theirs]
    assert len(theirs) >= 4


def table(page: str, name: str) -> list[str]:
    """The lines of a generated table of a page in docs/."""
    text = re.split(rf"<!-- table: {name}\b", (ROOT / "docs" / page).read_text())[1].partition("<!-- end")[0]
    return [line for line in text.splitlines() if line[:2] == "| "]


def cells(page: str, name: str) -> dict[str, list[str]]:
    """The other cells of each row of such a table by its first."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table(page, name)]
    return {first: rest for first, *rest in rows}


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
def test_quality_in_the_readme_is_the_measured_one(readme: Path) -> None:
    text = readme.read_text()
    rows = [
        line.replace("full precision", "全精度") if "zh" in readme.name else line
        for line in table("quantization.md", "two models")[2:]
    ]
    assert len(rows) == 14
    assert "\n".join(rows) in text
    for preset in ("svdquant", "svdquant-w4a4"):
        decibels = cells("quantization.md", "digits")[f"`{preset}`"][1].split(" ±")[0]
        assert f"{decibels} dB" in text


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4"])
def test_speed_in_the_readme_is_the_measured_one(readme: Path, scheme: str) -> None:
    rows = cells("performance.md", "cpu")
    column = rows["what"].index("Zen 5")
    measured = {name: float(row[column].split()[0]) for name, row in rows.items() if row[column][0].isdigit()}
    eager = measured[f"{scheme}, over fp32 eager, batch 2"]
    compiled = measured[f"{scheme}, over bf16 compile + freezing, batch 2"]
    memory = measured["fp32, memory added"] / measured[f"{scheme}, memory added"]
    row = rf"^\| {scheme} \| {eager:.1f}×.* \| {compiled:.1f}×.* \| {memory:.1f}×.*\|$"
    assert re.search(row, readme.read_text(), re.MULTILINE)


def example(readme: Path, part: str) -> str:
    """The Python block of a README that contains this."""
    return next(code for code in blocks(readme.read_text(), "python") if part in code)


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
def test_the_python_example_keeps_the_head_and_quantizes_the_rest(readme: Path) -> None:
    model = nn.Sequential()
    model.body, model.head = nn.Linear(64, 64), nn.Linear(64, 8)
    given = {"svdit": svdit, "model": model, "batches": [torch.randn(64, 64) for _ in range(4)]}
    exec(example(readme, 'skip=["head"]'), given)
    assert type(model.head) is nn.Linear
    assert type(model.body).__name__ == "SVDLinear"


def test_the_python_example_of_a_dit_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("svdit.api.calibration_size", lambda model: (4, 4))
    exec(example(READMES[0], 'svdit.load("digits")'), {})
    assert 40 < float(capsys.readouterr().out) < 100


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
def test_what_it_needs_is_what_was_measured(readme: Path) -> None:
    """Every number of the table is in the measurement that the row links to."""
    cost, sampling = cells("quantization.md", "cost"), cells("performance.md", "sampling")
    cpu, speed = cells("performance.md", "cpu"), cells("evaluation.md", "evaluation speed")
    zen5 = cost["what"].index("Zen 5")
    quantize, full, small, evaluate = re.findall(
        r"^\| `(?:quantize|sample|evaluate)`.*$", readme.read_text(), re.MULTILINE
    )
    for name in ("9 images calibration", "w8a8 solving", "w8a8 peak memory so far", "w8a8 file"):
        assert cost[f"DiT-XL/2 {name}"][zen5].split()[0] in quantize
    for line, name in ((full, "fp32"), (small, "W8A8")):
        assert sampling[f"{name}, first image"][0].split()[0] in line
        assert sampling[f"{name}, images a minute"][0].split()[0] in line
        mebibytes = float(cpu[f"{name}, memory added"][zen5].split()[0])
        assert f"{mebibytes / 1024:.1f} GiB" in line
    assert speed["job_ours"][0].split()[0] in evaluate
    assert "1951 MB" in evaluate and "1951 MB" in (ROOT / "docs" / "scale.md").read_text()


def test_the_table_of_protocols_is_that_of_the_code() -> None:
    lines = (ROOT / "docs" / "protocols.md").read_text().splitlines()
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line[:3] == "| `"}
    assert rows.keys() == PROTOCOLS.keys()
    for name, (_, sampler, guidance, channels, interval, labels, _, uint8, reference) in rows.items():
        protocol = PROTOCOLS[name]
        options = protocol.sampling
        scales = [options["cfg_scale"]] if "cfg_scale" in options else list(protocol.scales.values())[:3]
        assert [float(number) for number in re.findall(r"[\d.]+", guidance)] == scales
        assert options["sampler"] == "dopri5" or options["steps"] in sampler
        assert channels == str(options["cfg_channels"] or "all")
        assert interval == ("{:g}–{:g}".format(*options["cfg_interval"]) if "cfg_interval" in options else "–")
        assert labels == protocol.label_policy
        assert uint8.replace(" ", "_") == FAMILIES[protocol.family].get("uint8", "half_up")
        assert reference == ("JiT" if protocol.references is JIT else "ADM")
