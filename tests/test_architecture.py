"""Imports run down the house's floors: never up, never sideways, not inside functions either."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import structure

ROOT = Path(__file__).parents[1]
GROUND = {
    *("errors", "fields", "files", "holdout", "images", "distributed", "download", "peers"),
    *("extras", "pictures", "printing", "progress", "restarts", "sheet", "shims", "storage", "threads"),
}
MAY_IMPORT: dict[str, set[str]] = {
    "restarts": {"printing"},
    "errors": {"restarts"},
    "fields": {"errors"},
    "files": {"errors", "printing", "restarts"},
    "holdout": set(),
    "shims": set(),
    "threads": set(),
    "extras": {"errors", "shims"},
    "printing": set(),
    "progress": {"printing"},
    "download": {"errors", "files", "progress", "storage"},
    "storage": {"errors", "files"},
    "images": {"errors", "files"},
    "pictures": {"extras", "files", "printing"},
    "sheet": {"images", "printing"},
    "peers": {"files", "printing", "restarts"},
    "distributed": {"errors", "files", "peers", "restarts"},
    "kernels": GROUND,
    "model": GROUND,
    "diffusion": GROUND,
    "quant": GROUND | {"kernels"},
    "checkpoints": GROUND | {"quant", "model"},
    "sampling": GROUND | {"model", "diffusion"},
    "evaluation": GROUND,
    "training": GROUND | {"model", "diffusion"},
    "runtime": GROUND | {"model", "quant", "kernels"},
    "recovery": GROUND | {"model", "diffusion", "kernels", "quant", "sampling"},
    "report": GROUND | {"model", "diffusion", "kernels", "quant", "sampling", "evaluation"},
    "export": GROUND | {"kernels", "model", "quant"},
    "integrations": GROUND | {"kernels", "model", "quant", "checkpoints", "runtime"},
    "compat": {"quant", "model"},
}
MAY_IMPORT["api"] = set(MAY_IMPORT) - {"compat", "recovery", "training"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"api"}
DOORS = {path.name: ({"compat"} if path.name == "models.py" else {"cli"}) for path in ROOT.glob("*.py")}
del DOORS["setup.py"]  # which imports nothing of svdit


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module == "svdit":
            names = [f"svdit.{alias.name}" for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("svdit."))


def wrong_arrows(path: Path, room: str, allowed: set[str]) -> list[str]:
    return [f"{path}:{line} imports {to}" for line, to in imported_rooms(path) if to != room and to not in allowed]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_is_below_them(room: str) -> None:
    base = ROOT / "svdit" / room
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    assert files
    assert [arrow for file in files for arrow in wrong_arrows(file, room, MAY_IMPORT[room])] == []


def test_every_room_is_on_the_plan() -> None:
    rooms = {
        path.stem for path in (ROOT / "svdit").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__"} == set(MAY_IMPORT)


def test_doors_lead_to_one_room_and_are_small() -> None:
    for name, allowed in DOORS.items():
        assert wrong_arrows(ROOT / name, "", allowed) == []
        assert len((ROOT / name).read_text().splitlines()) <= 9, name


def test_a_wrong_arrow_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from svdit.cli import main\n    from svdit import quant\n    from . import x\n")
    assert wrong_arrows(file, "model", GROUND) == [
        f"{file}:2 imports cli", f"{file}:3 imports quant", f"{file}:4 imports a relative import"
    ]  # fmt: skip


def test_files_stay_readable() -> None:
    long = {p.name: n for p in (ROOT / "svdit").rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert long == {}


@pytest.mark.parametrize("check", [structure.without_docstring, structure.without_shapes, structure.silent_raises])
def test_docstrings_are_complete(check: Callable[[ast.Module], list[str]]) -> None:
    found = {
        path.name: names for path in (ROOT / "svdit").rglob("*.py") if (names := check(ast.parse(path.read_text())))
    }
    assert found == {}


def test_an_incomplete_docstring_is_seen() -> None:
    module = ast.parse(
        'def f(x: Tensor) -> None:\n    """Text."""\n    raise UserError("")\n\n\ndef g() -> None: ...\n'
    )
    assert structure.without_docstring(module) == ["g"]
    assert structure.without_shapes(module) == structure.silent_raises(module) == ["f"]
