"""What the docs say is what was measured, and what they point to exists."""

import re
from pathlib import Path

import pytest

from benchmarks.tables import PAGES as TABLED
from benchmarks.tables import filled

ROOT = Path(__file__).parents[1]
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
