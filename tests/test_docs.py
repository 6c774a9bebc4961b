"""What the docs say is what was measured, and what they point to exists."""

import re
from pathlib import Path

import pytest

from benchmarks.tables import PAGES as TABLED
from benchmarks.tables import filled

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "svdit").rglob("*.md")])


@pytest.mark.parametrize("page", TABLED, ids=lambda page: page.name)
def test_tables_are_made_from_the_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table: " in text
    assert filled(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_both_readmes_show_the_same_commands() -> None:
    def blocks(name: str) -> list[str]:
        text = re.sub(r"#.*", "", (ROOT / name).read_text().split("## ", 1)[1])
        return [" ".join(block.split()) for block in re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)]

    ours, theirs = blocks("README.md"), blocks("README.zh.md")
    assert theirs == [block for block in ours if block in theirs]
    assert len(theirs) >= 4


def cells(page: str, table: str) -> dict[str, list[str]]:
    """The generated table of a page in docs/: the other cells of each row by its first."""
    text = re.split(rf"<!-- table: {table}\b", (ROOT / "docs" / page).read_text())[1].partition("<!-- end")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {first: rest for first, *rest in rows}


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a4", "svdquant", "svdquant-w4a4"])
def test_quality_in_the_readme_is_the_measured_one(readme: Path, preset: str) -> None:
    size, psnr, *_ = cells("quantization.md", "digits")[f"`{preset}`"]
    assert re.search(rf"^\| `{preset}`.* \| {size} \| {psnr} \|$", readme.read_text(), re.MULTILINE)


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4"])
def test_speed_in_the_readme_is_the_measured_one(readme: Path, scheme: str) -> None:
    rows = cells("performance.md", "cpu").items()
    measured = {name: float(value.split()[0]) for name, (value, *_) in rows if value[:1].isdigit()}
    eager = measured[f"{scheme}, over fp32 eager, batch 2"]
    compiled = measured[f"{scheme}, over bf16 compile + freezing, batch 2"]
    memory = measured["fp32, memory added"] / measured[f"{scheme}, memory added"]
    row = rf"^\| {scheme} \| {eager:.1f}×.* \| {compiled:.1f}×.* \| {memory:.1f}×.*\|$"
    assert re.search(row, readme.read_text(), re.MULTILINE)
