"""What is published: the sdist has every file, the README leads somewhere, Dockerfile and workflow name what exists."""

import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest
from quoted import FENCED

ROOT = Path(__file__).parents[1]
TARGET = re.compile(r"\]\(([^()\s]*)\)")  # of a link or an image
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a clone")
def test_the_sdist_has_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    packed = (tmp_path / "svdit.egg-info" / "SOURCES.txt").read_text().splitlines()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(tracked.splitlines()) - set(packed) == set()


def described(tree: Path, urls: str) -> str:
    """README.md as an index shows it, built from a copy of the tree with these lines in pyproject.toml."""
    for name in ("README.md", "setup.py", "svdit/__init__.py", "svdit/kernels/cpu/sources.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    (tree / "pyproject.toml").write_text(f"{PROJECT}\n{urls}")
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=tree, check=True, capture_output=True)
    metadata = message_from_string((tree / "svdit.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    return str(metadata.get_payload())


def test_links_lead_from_an_index_to_files_of_this_version(tmp_path: Path) -> None:
    text, source = (ROOT / "README.md").read_text(), "https://example.org/svdit"
    shown = described(tmp_path, f'[project.urls]\nSource = "{source}/"\n')
    assert FENCED.findall(shown) == FENCED.findall(text)  # code is code
    links, places = TARGET.findall(FENCED.sub("", text)), TARGET.findall(FENCED.sub("", shown))
    assert len(links) == len(places) > 40
    for link, place in zip(links, places, strict=True):
        if "://" in link:
            assert place == link
            continue
        kind = "raw" if link.endswith(".png") else "blob"
        assert place == f"{source}/{kind}/v0.1.0/{link}"
        assert (ROOT / link.partition("#")[0]).exists()


def test_without_a_repository_the_index_shows_text(tmp_path: Path) -> None:
    shown = FENCED.sub("", described(tmp_path, ""))
    assert [place for place in TARGET.findall(shown) if "://" not in place] == []
    assert "![" not in shown and "\n[" not in shown
    assert "docs/performance.md has all measurements" in shown


def extras() -> set[str]:
    section = PROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def test_the_dockerfile_names_what_exists() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    stages = [words[3] for line in lines if (words := line.split())[:1] == ["FROM"]]
    for line in lines:
        words = line.split()
        if words[:1] == ["FROM"]:
            assert words[1] == "python:${PYTHON}-slim" or words[1] in stages
        elif words[:1] == ["COPY"] and words[1].startswith("--from="):
            assert words[1].removeprefix("--from=") in stages
        elif words[:1] == ["COPY"]:
            assert (ROOT / words[1]).exists()
    assert set(re.findall(r"--target (\w+)", "\n".join(lines))) < set(stages)
    assert set(re.findall(r"^ARG EXTRAS=(\w+)$", "\n".join(lines), re.MULTILINE)) <= extras()
    assert lines[-1].startswith("RUN") and stages[-1] == "cpu"  # without --target
    assert {"LICENSE", "README.md", "setup.py", "svdit"} & set((ROOT / ".dockerignore").read_text().split()) == set()


def test_the_workflow_runs_targets_on_every_version_of_python() -> None:
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    runs = re.findall(r"^ *- run: (.*)$", workflow, re.MULTILINE)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert runs and {run.removeprefix("make ") for run in runs} <= set(targets)
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert set(re.findall(r"python: (\[.*\])", workflow)) == {str(versions).replace("'", '"')}
    assert f'requires-python = ">={versions[0]}"' in PROJECT
