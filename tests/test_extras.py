"""Optional packages: a missing one is one sentence with the command that installs it."""

import sys
from pathlib import Path

import pytest

from svdit.errors import UserError
from svdit.extras import EXTRAS, require

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}  # where the names differ


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_one_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's way of making an import fail
    with pytest.raises(
        UserError, match=rf"^cannot import {package} .*; run: pip install 'svdit\[{EXTRAS[package]}\]'$"
    ):
        require(package)


def test_an_installed_package_is_imported() -> None:
    assert require("scipy.linalg").sqrtm([[4.0]]) == 2


@pytest.mark.parametrize("package", EXTRAS)
def test_every_extra_installs_its_package(package: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name = DISTRIBUTIONS.get(package, package)
    assert [line for line in extras[EXTRAS[package]] if line.startswith(f"{name}>=")]
