"""`save_quantized` and `load_quantized`: any module returns bit for bit, or is unchanged after one sentence."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdit
from svdit.checkpoints import io
from svdit.checkpoints.store import load_model, load_quantized, read_header, save_model, save_quantized
from svdit.errors import UserError
from svdit.extras import require
from svdit.kernels import ops
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, Recipe, Rule, recipe_for
from svdit.quant.linear import SVDLinear, layer_specs, quantized_layers
from svdit.quant.quantize import quantize_

PRESETS = ("w8a8", "w4a8", "w4a4", "w4a16", "fp8", "nvfp4", "mxfp4", "svdquant-w4a4")
FACTORS = Recipe(
    None, None, "factors", 5, centre=False, smoothing=0, hadamard=0, search_scales=False, rounding="nearest"
)


class Net(nn.Module):
    """A linear under two names, tied embeddings, a norm, a convolution, a linear without bias, an integer buffer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(width, width)
        self.second = self.first
        self.norm = nn.BatchNorm1d(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, width))
        self.register_buffer("order", torch.arange(width).flip(0))

    def forward(self, y: Tensor) -> Tensor:
        x = self.embed(y)[:, self.order]  # (N, D)
        x = x + self.first(x) + self.second(x.tanh())
        return self.head(x + self.mlp(self.norm(x)))


def built(width: int = 64) -> Net:
    model = randomize(Net(width))
    assert isinstance(model, Net)
    return model


def quantized(model: Net, *recipes: Recipe) -> Net:
    """The model with its three linears quantized by these recipes in turn."""
    names = ("first", "mlp.0", "mlp.2")
    rules = [Rule(name, recipes[i % len(recipes)]) for i, name in enumerate(names)]
    quantize_(model, QuantConfig((*rules, Rule("second", recipes[0]), Rule("*", None))), lambda m: m(Y))
    return model


Y = torch.arange(11).repeat(40)
SMALL: dict[str, Any] = {"rank": 4, "smoothing": 0, "rounding": "nearest", "search_scales": False, "iterations": 1}
EIGHT = recipe_for("w8a8", **SMALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a quantized Net."""
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    save_quantized(quantized(built(), EIGHT), path)
    return path


@given(
    presets=st.lists(st.sampled_from(PRESETS), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    suffix=st.sampled_from([".safetensors", ".pt"]),
    meta=st.booleans(),
)
@settings(max_examples=5, deadline=None)
def test_any_module_returns_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, presets: list[str], dtype: torch.dtype, suffix: str, meta: bool
) -> None:
    model = quantized(built(), *(recipe_for(preset, **SMALL) for preset in presets)).to(dtype)
    path = tmp_path_factory.mktemp("any") / f"net{suffix}"
    save_quantized(model, path)
    with torch.device("meta" if meta else "cpu"):
        empty = Net().eval()
    again = load_quantized(empty, path)
    assert again is empty and layer_specs(again) == layer_specs(model) != {}
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[key].dtype == want.dtype and torch.equal(state[key], want) for key, want in expected.items())
    assert again.second is again.first and again.head.weight is again.embed.weight
    assert again.embed.weight.dtype == again.first.weight.dtype == dtype
    assert torch.equal(again(Y), model(Y)) and again(Y).abs().max() > 0


def test_a_shared_tensor_is_stored_once(saved: Path) -> None:
    keys = set(load_file(saved))
    assert "embed.weight" in keys and not any(key.startswith(("second.", "head.")) for key in keys)
    header = read_header(saved)
    assert header is not None and header["name"] == "Net" and header["shared"]["head.weight"] == "embed.weight"


def test_separate_linears_become_shared_as_in_the_file(saved: Path) -> None:
    model = built()
    model.second = nn.Linear(64, 64)
    load_quantized(model, saved)
    assert model.second is model.first


def test_a_layer_of_two_factors_and_one_in_training_mode(tmp_path: Path) -> None:
    model = quantized(built(), FACTORS)
    save_quantized(model, tmp_path / "net.pt")
    again = load_quantized(built().train(), tmp_path / "net.pt")
    assert all(module.training for module in again.modules())
    assert torch.equal(again.eval()(Y), model(Y))


def test_a_transformer_of_diffusers(tmp_path: Path) -> None:
    diffusers = require("diffusers")
    options = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 16, "use_additional_conditions": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = randomize(diffusers.PixArtTransformer2DModel(**options))
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    inputs = {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.tensor([10, 500])}
    inputs |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    rules = (Rule("transformer_blocks.*", recipe_for("w8a8", hadamard=32, **SMALL)), Rule("*", None))
    quantize_(model, QuantConfig(rules), lambda m: m(**inputs))
    save_quantized(model, tmp_path / "pixart.safetensors")
    again = load_quantized(diffusers.PixArtTransformer2DModel(**options).eval(), tmp_path / "pixart.safetensors")
    assert len(quantized_layers(again)) == len(quantized_layers(model)) > 10
    with torch.no_grad():
        assert torch.equal(again(**inputs).sample, model(**inputs).sample)


def test_the_file_of_a_dit_loads_both_ways(tiny: DiT, tmp_path: Path) -> None:
    path, empty = tmp_path / "tiny.safetensors", DiT(tiny.config).eval()
    rules = (Rule("blocks.*.mlp.*", recipe_for("w4a16", **SMALL)), Rule("*", None))
    inputs = torch.randn(8, 4, 4, 4), torch.arange(8), torch.arange(8) % 5
    quantize_(tiny, QuantConfig(rules), lambda m: m(*inputs))
    for save in (save_model, save_quantized):
        save(tiny, path)
        for model in (load_quantized(empty, path), load_model(path)):
            assert torch.equal(model(*inputs), tiny(*inputs))
        empty = DiT(tiny.config).eval()
    other = DiT(type(tiny.config)(**{**tiny.config.__dict__, "num_heads": 4}))
    with pytest.raises(UserError, match="num_heads 2 and not 4; pass"):
        load_quantized(other, path)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed(**modules: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = built()
        for name, module in modules.items():
            setattr(model, name, module)
        return model

    return build


def with_first(module: nn.Module) -> Callable[[], nn.Module]:
    return changed(first=module, second=module)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantized": (lambda: quantized(built(), EIGHT), "'first' of the model is a SVDLinear, not a Linear"),
    "accelerated": (
        lambda: svdit.accelerate(quantized(built(), EIGHT), "dequant"),
        "'first' of the model is a FastLinear, not a Linear",
    ),
    "subclass": (with_first(Own(64, 64)), "'first' of the model is a Own, not a Linear"),
    "no layer": (changed(mlp=nn.Identity()), "'mlp.0' of the model is a NoneType"),
    "no linear": (with_first(nn.Identity()), "'first' of the model is a Identity"),
    "other width": (lambda: built(128), r"first: .* is \(64,.* and not \(128,"),
    "more parameters": (changed(more=nn.LayerNorm(3)), r"lacks 2 tensors \(first: more.weight\)"),
    "fewer parameters": (changed(norm=nn.Identity()), r"unknown 5 tensors \(first: norm\."),
    "other buffer": (lambda: with_buffer(torch.arange(64.0)), r"order is \(64,\) torch.int64 and not"),
}  # fmt: skip


def with_buffer(order: Tensor) -> nn.Module:
    model = built()
    model.order = order
    return model


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_does_not_fit_is_unchanged(saved: Path, case: str) -> None:
    build, message = MODELS[case]
    model = build()
    modules = dict(model.named_modules())
    state = {} if case == "accelerated" else copy.copy(model.state_dict(keep_vars=True))
    with pytest.raises(UserError, match=message) as error:
        load_quantized(model, saved)
    assert str(error.value).startswith(str(saved)) and "\n" not in str(error.value)
    assert dict(model.named_modules()) == modules
    assert case == "accelerated" or all(model.state_dict(keep_vars=True)[key] is t for key, t in state.items())


def test_biases_and_shared_layers_must_agree(tmp_path: Path) -> None:
    model = built()
    model.second = nn.Linear(64, 64)
    save_quantized(quantized(model, FACTORS), tmp_path / "net.pt")
    with pytest.raises(UserError, match="second is shared with another layer of the model, but not in the file"):
        load_quantized(built(), tmp_path / "net.pt")
    save_quantized(quantized(built(), FACTORS), tmp_path / "net.pt")
    for name, bias in (("0", True), ("2", False)):
        model = built()
        setattr(model.mlp, name, nn.Linear(*((64, 128) if bias else (128, 64)), bias=bias))
        with pytest.raises(UserError, match=rf"mlp.{name} has {'no' if bias else 'a'} bias, unlike the model"):
            load_quantized(model, tmp_path / "net.pt")


def test_files_that_are_none_of_ours_or_damaged(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"was not written by svdit; pass"):
        load_quantized(built(), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_quantized(built(), tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"it is not a DiT's; pass the file of a DiT, or call .*load\(path, module\)"):
        load_model(saved)
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        load_quantized(built(), tmp_path / "flipped.safetensors")


def test_shared_names_of_the_header_are_checked(saved: Path, tmp_path: Path) -> None:
    with io.verified(saved) as contents:
        tensors, header, _ = contents
    assert header is not None
    for shared in ({}, {"head.weight": "nothing"}, {**header["shared"], "second.bias": "first.residual_scales"}):
        kept: dict[str, Any] = {key: value for key, value in header.items() if key not in ("sha256", "shared")}
        io.write(tmp_path / "other.pt", tensors, {**kept, "shared": shared})
        with pytest.raises(UserError, match=r"other.pt .*; "):
            load_quantized(built(), tmp_path / "other.pt")


def test_what_cannot_be_saved_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model = quantized(built(), EIGHT)
    svdit.accelerate(model, "dequant")
    with pytest.raises(UserError, match="accelerat"):
        save_quantized(model, path)
    with pytest.raises(UserError, match=r"save nn\.Sequential\(layer\)"):
        save_quantized(SVDLinear(8, 8), path)
    with pytest.raises(UserError, match="has no data"):
        save_quantized(built().to("meta"), path)
    with pytest.raises(UserError, match=r"ends in \.safetensors or \.pt"):
        save_quantized(built(), tmp_path / "net.bin")
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_can_be_accelerated(saved: Path) -> None:
    model = load_quantized(built(), saved)
    expected = model(Y)
    fast = svdit.accelerate(model, ops.choose("cpu"))
    assert 0 < (fast(Y) - expected).norm() < 0.02 * expected.norm()
