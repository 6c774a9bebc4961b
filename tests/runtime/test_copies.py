"""Quantized and accelerated models under casts, copies, pickling, autocast and inference mode."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from svdit.errors import UserError
from svdit.kernels.cpu import build
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, Rule, dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling.calibration import calibration_loop

INPUTS = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mlp() -> nn.Module:
    """Two quantized linears."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    with torch.no_grad():
        quantize_(model, QuantConfig((Rule("*", recipe_for("w4a8", rank=4)),)), lambda m: [m(x) for x in INPUTS])
    return model


def accelerated_dit(tiny: DiT) -> nn.Module:
    quantize_(tiny, dit_config(recipe_for("w8a8", rank=4)), calibration_loop(images=4, steps=3))
    return accelerate(tiny)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
@torch.no_grad()
def test_casts_keep_stored_types_and_results(mlp: nn.Module, cast: Callable[[nn.Module], nn.Module]) -> None:
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    expected = mlp(INPUTS)
    cast(mlp)
    for name, tensor in mlp.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert torch.equal(mlp(INPUTS), expected)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "state_dict": nn.Module.state_dict,
    "half": nn.Module.half,
    "meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("action", COPIES)
def test_accelerated_models_refuse_in_one_sentence(mlp: nn.Module, tiny: DiT, action: str) -> None:
    for model in (accelerate(mlp), accelerated_dit(tiny)):
        with pytest.raises(UserError, match=r"^(an )?accelerated [^\n]+; [^\n]+$"):
            COPIES[action](model)


@torch.no_grad()
def test_autocast_and_inference_mode_change_nothing(mlp: nn.Module) -> None:
    fast = accelerate(mlp)
    expected = fast(INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = fast(INPUTS)
    with torch.inference_mode():
        assert torch.equal(fast(INPUTS), expected)
    assert torch.equal(fast(INPUTS), expected)
    assert under_autocast.isfinite().all() and 0 <= float((under_autocast - expected).norm() / expected.norm()) < 2**-7


def test_debug_names_the_layer(mlp: nn.Module) -> None:
    fast = accelerate(mlp, debug=True)
    bad = INPUTS.clone()
    bad[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="layer 0 contains NaN or Inf"):
        fast(bad)


def test_a_failing_compiler_runs_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    calls: list[Any] = []

    def fail(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        raise build.MissingKernelsError("the kernels did not compile")

    monkeypatch.delenv("SVDIT_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_installed", lambda: None)
    monkeypatch.setattr(build, "compile_library", fail)
    build._attempt.cache_clear()
    for _ in range(3):
        with pytest.raises(build.MissingKernelsError, match="did not compile"):
            build.library()
    build._attempt.cache_clear()
    assert len(calls) == 1
