"""Quantized and accelerated models under casts, copies, pickling, autocast and inference mode."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.cpu import build
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, Rule, dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling.calibration import calibration_loop
from svdit.shims import allow_cpu_torchvision

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
    "load_state_dict": lambda model: model.load_state_dict({"y_embedder.table": torch.zeros(1)}, strict=False),
    "half": nn.Module.half,
    "meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("action", COPIES)
def test_accelerated_models_refuse_in_one_sentence(mlp: nn.Module, tiny: DiT, action: str) -> None:
    for model in (accelerate(mlp), accelerated_dit(tiny)):
        with pytest.raises(UserError, match=r"^(an )?accelerated [^\n]+; [^\n]+$"):
            COPIES[action](model)


def test_what_is_refused_is_not_loaded_in_part(tiny: DiT) -> None:
    fast = accelerated_dit(tiny)
    before = {name: parameter.clone() for name, parameter in fast.named_parameters()}
    with pytest.raises(UserError, match="cannot load a state dict"):
        fast.load_state_dict({name: parameter + 1 for name, parameter in before.items()}, strict=False)
    assert before
    assert all(torch.equal(parameter, before[name]) for name, parameter in fast.named_parameters())


class Outer(nn.Module):
    """An accelerated model within a larger one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_saving_a_part_of_a_model_that_is_accelerated_is_refused(mlp: nn.Module, tmp_path: Path) -> None:
    outer, path = Outer(accelerate(mlp)), tmp_path / "file"
    for save in (lambda: outer.state_dict(), lambda: torch.save(outer, path), lambda: save_model(outer, path)):
        with pytest.raises(UserError, match="an accelerated model cannot be"):
            save()


def test_a_refused_cast_changes_nothing(mlp: nn.Module) -> None:
    model = nn.Sequential(nn.LayerNorm(64), mlp)
    for refused in (nn.Module.half, nn.Module.double, lambda m: m.to("meta"), lambda m: m.to(torch.bfloat16)):
        fast = accelerate(copy.deepcopy(model))
        with pytest.raises(UserError, match="move the model before accelerating it"):
            refused(fast)
        assert {(p.dtype, p.device.type) for p in fast.parameters()} == {(torch.float32, "cpu")}
        assert fast.float().to("cpu") is fast


@pytest.mark.parametrize("backend", [name for name, reason in ops.reasons().items() if not reason])
@torch.no_grad()
def test_packed_layers_pass_for_linears(mlp: nn.Module, backend: str) -> None:
    mlp.bfloat16()
    stored = mlp[0].layer().nbytes
    fast = accelerate(mlp, backend)[0]
    assert (fast.in_features, fast.out_features, fast.bias.shape) == (64, 128, (128,))
    assert (fast.weight.shape, fast.weight.dtype, fast.weight.device.type) == ((128, 64), torch.bfloat16, "cpu")
    assert INPUTS.to(fast.weight.dtype).dtype == torch.bfloat16 and "PackedWeight" in repr(fast.weight)
    with pytest.raises(UserError, match="packed weights only"):
        fast.weight + 1
    packed = sum(tensor.nbytes for tensor in fast.buffers())
    assert stored / 2 < packed < (5 * 128 * 64 if backend == "dequant" else 4 * stored)


@torch.no_grad()
def test_a_diffusers_model_in_bfloat16_reads_types_of_quantized_and_packed_layers(tmp_path: Path) -> None:
    allow_cpu_torchvision()
    from diffusers import SanaTransformer2DModel

    heads = dict.fromkeys(("num_attention_heads", "num_cross_attention_heads"), 2)
    widths = dict.fromkeys(("attention_head_dim", "cross_attention_head_dim"), 8) | {"cross_attention_dim": 16}
    small = {"num_layers": 1, "sample_size": 4, "patch_size": 1, "caption_channels": 8, "in_channels": 4}
    torch.manual_seed(0)
    model = SanaTransformer2DModel(out_channels=4, **heads, **widths, **small).bfloat16().eval()

    def run(model: nn.Module) -> torch.Tensor:
        x, caption = torch.ones(2, 4, 4, 4).bfloat16(), torch.linspace(-1, 1, 48).view(2, 3, 8).bfloat16()
        return model(x, encoder_hidden_states=caption, timestep=torch.tensor([3, 500])).sample

    before = run(model)
    quantize_(model, QuantConfig((Rule("*", recipe_for("rtn")),)), run)
    for other in (model, accelerate(model)):
        y = run(other)
        assert y.dtype == torch.bfloat16 and 0 < float((y - before).norm() / before.norm()) < 0.05
    with pytest.raises(UserError, match="an accelerated model cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


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
