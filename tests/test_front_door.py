"""`import svdit`: every name of the front door, imported on first use."""

import subprocess
import sys

import pytest

import svdit


def test_importing_svdit_imports_no_torch() -> None:
    code = "import sys, svdit; dir(svdit); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


@pytest.mark.parametrize("name", svdit.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(svdit, name) is not None
    assert name in dir(svdit)


def test_the_documented_names_are_the_front_door() -> None:
    documented = "quantize_ QuantConfig Rule recipe_for Format load_model save_model load_quantized save_quantized"
    documented += " held_out accelerate generate generate_dataset evaluate compare DiT DiT_models"
    assert set(svdit.__all__) == set(documented.split())


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        _ = svdit.quantise  # type: ignore[attr-defined]
