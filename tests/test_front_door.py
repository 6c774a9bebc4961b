"""`import svdit`: every name of the front door, imported on first use."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import svdit

ROOT = Path(__file__).parents[1]
RESULTS = ("QuantReport", "LayerReport", "Report")


def test_importing_svdit_imports_no_torch() -> None:
    code = "import sys, svdit; dir(svdit); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


@pytest.mark.parametrize("name", svdit.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(svdit, name) is not None
    assert name in dir(svdit)


def test_the_documented_names_are_the_front_door() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^### `(\w+)", page, re.MULTILINE)) == {
        *svdit.__all__,
        "QuantReport",
        "LayerReport",
        "Report",
    }


def test_the_page_is_what_the_docstrings_say() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "generate_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == written, "edit the docstring; run python docs/generate_api.py"


def test_the_table_for_type_checkers_is_the_one_that_is_used() -> None:
    tree = ast.parse(Path(svdit.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found = {alias.name: node.module for node in imports for alias in node.names if node.module.startswith("svdit.")}
    assert found == {name: f"svdit.{module}" for name, module in svdit._MODULES.items()}
    assert sorted(found) == sorted(svdit.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        _ = svdit.quantise  # type: ignore[attr-defined]
