"""Checkpoints of every layout load exactly, and what does not fit its model ends in one sentence."""

import argparse
import re
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, Golden, relative
from safetensors.torch import load_file, save_file

from svdit.checkpoints import io, store
from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.errors import UserError
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.kernels.reference import quantize
from svdit.model.dit import DiT
from svdit.model.zoo import DiT_models
from svdit.quant.linear import LinearSpec, SVDLinear, layer_specs, linears, quantized_layers, rebuild_

SUFFIXES = (".safetensors", ".pt")
State = dict[str, Any]


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_saved_model_loads_bit_for_bit(tiny: DiT, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tiny{suffix}"
    save_model(tiny, path, name="DiT-tiny", provenance={"seed": 3})
    model = load_model(path)
    assert same(model.state_dict(), tiny.state_dict())
    assert model.config == tiny.config
    assert not model.training
    assert model.x_embedder.proj.weight.requires_grad
    assert not model.pos_embed.requires_grad
    header = read_header(path)
    assert header is not None
    assert (header["name"], header["config"], header["provenance"]) == ("DiT-tiny", asdict(tiny.config), {"seed": 3})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_weighs_what_its_tensors_imply(tiny: DiT, tmp_path: Path, suffix: str) -> None:
    rows = torch.randn(640, 64)
    tiny.blocks[0].attn.proj.weight = torch.nn.Parameter(rows[:64])  # a view must not bring its whole storage along
    path = tmp_path / f"tiny{suffix}"
    save_model(tiny, path)
    tensors = sum(tensor.nbytes for tensor in tiny.state_dict().values())
    overhead = path.stat().st_size - tensors
    if suffix == ".safetensors":
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert overhead == 8 + length
    assert 0 < overhead < 1000 + 400 * len(tiny.state_dict())
    assert load_model(path).blocks[0].attn.proj.weight.equal(rows[:64])


RESIDUALS = {
    **{name: LinearSpec(weight=form) for name, form in WEIGHT_FORMATS.items()},
    "everything": LinearSpec(8, None, "bfloat16", Format(4, 16), Format(8), scaled=True, shifted=True, hadamard=32),
}


def with_residuals(model: DiT, spec: LinearSpec) -> None:
    rebuild_(model, {name: asdict(spec) for name, _ in linears(model) if name.startswith("blocks")})
    for layer in quantized_layers(model).values():
        layer.store_residual(*quantize(torch.randn(layer.out_features, layer.in_features), layer.spec.weight))


def with_factors(model: DiT, bits: int) -> None:
    for name, linear in list(linears(model)):
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, SVDLinear.from_linear(linear, 0.3).quantize_parameters(bits))


CHANGES: dict[str, Callable[[DiT], None]] = {
    **{name: partial(with_residuals, spec=spec) for name, spec in RESIDUALS.items()},
    **{f"factors of {bits} bits": partial(with_factors, bits=bits) for bits in range(2, 9)},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_quantized_model_loads_bit_for_bit_and_weighs_its_formats(
    tiny: DiT, tmp_path: Path, suffix: str, change: Callable[[DiT], None]
) -> None:
    path = tmp_path / f"quantized{suffix}"
    change(tiny)
    save_model(tiny, path)
    again = load_model(path)
    assert layer_specs(again) == layer_specs(tiny) != {}
    assert same(again.state_dict(), tiny.state_dict())
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.tensor([0, 5])
    assert torch.equal(again(x, t, y), tiny(x, t, y))
    layers = quantized_layers(tiny)
    inside = tuple(f"{name}." for name in layers)
    implied = sum(tensor.nbytes for key, tensor in tiny.state_dict().items() if not key.startswith(inside))
    implied += sum(layer.spec.nbytes(layer.out_features, layer.in_features) for layer in layers.values())
    assert 0 < path.stat().st_size - implied < 1000 + 400 * len(tiny.state_dict()) + 800 * len(layers)


def test_bare_published_weights_give_the_published_outputs(golden: Golden, tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    torch.save(golden.model.state_dict(), path)
    with pytest.raises(UserError, match="give num_heads"):
        load_model(path)
    model = load_model(path, num_heads=golden.model.config.num_heads, input_size=8, num_classes=10)
    assert model.config == golden.model.config
    assert relative(model(golden["x"], golden["t"], golden["y"]), golden["forward"]) < 2e-5
    assert read_header(path) is None


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-S/8"])
def test_a_named_size_needs_no_heads(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        published = DiT_models[name](input_size=16, num_classes=3)
    published.to_empty(device="cpu")
    torch.save(published.state_dict(), tmp_path / "bare.pt", _use_new_zipfile_serialization=False)  # the old layout
    assert load_model(tmp_path / "bare.pt").config == published.config
    assert load_model(tmp_path / "bare.pt", name=name, input_size=16).config == published.config


def test_of_a_training_checkpoint_the_average_wins() -> None:
    path = GOLDEN / "train_format_checkpoint.pt"
    model = load_model(path, num_heads=2)
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, weights_only=True)
    assert same(model.state_dict(), loaded["ema"])
    assert model.blocks[0].attn.qkv.weight.equal(loaded["model"]["blocks.0.attn.qkv.weight"] * 0.5)
    with pytest.raises(UserError, match=r"depth 1 and not 12.* so it is no DiT-S/2"):
        load_model(path, name="DiT-S/2")


def test_half_precision_published_weights_become_float32_but_our_own_file_stays(tiny: DiT, tmp_path: Path) -> None:
    torch.save(tiny.half().state_dict(), tmp_path / "bare.pt")
    save_model(tiny, tmp_path / "own.pt")
    assert load_model(tmp_path / "bare.pt", num_heads=2).pos_embed.dtype == torch.float32
    assert load_model(tmp_path / "own.pt").pos_embed.dtype == torch.float16


def test_what_the_caller_says_must_be_so_in_the_file(tiny: DiT, tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    save_model(tiny, path)
    assert load_model(path, num_classes=5, depth=2).config == tiny.config
    with pytest.raises(UserError, match="num_classes 5 and not 1000; ask"):
        load_model(path, num_classes=1000)
    with pytest.raises(UserError, match="no model called 'DiT-M/2'"):
        load_model(path, name="DiT-M/2")
    with pytest.raises(TypeError, match="no option qk_norm"):
        load_model(path, qk_norm=True)


def test_embedded_models_go_by_their_names(tiny: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "EMBEDDED", tmp_path)
    save_model(tiny, tmp_path / "letters.safetensors")
    assert same(load_model("letters").state_dict(), tiny.state_dict())
    with pytest.raises(UserError, match="no checkpoint nowhere; give a file or one of: letters"):
        load_model("nowhere")


def broken(path: Path, tiny: DiT, edit: Callable[[State, State], None]) -> None:
    """A file of ours, checksum and all, after `edit(tensors, header)`."""
    tensors: State = dict(tiny.state_dict())
    header: State = {"name": "", "config": asdict(tiny.config), "layers": {}, "provenance": {}}
    edit(tensors, header)
    io.write(path, tensors, header)


PROBLEMS: dict[str, tuple[Callable[[State, State], object], str]] = {
    "newer": (
        lambda t, h: h.update(format_version=2),
        r"in format 2, .* which reads format 1; upgrade",
    ),
    "missing": (lambda t, h: t.pop("pos_embed"), r"lacks 1 of its tensors \(first: pos_embed\)"),
    "extra": (lambda t, h: t.update(more=torch.ones(1)), r"has no place for 1 of its tensors \(first: more\)"),
    "shape": (
        lambda t, h: t.update(pos_embed=torch.ones(2)),
        r"pos_embed is \(2,\) torch.float32 and not \(1, 4",
    ),
    "type": (lambda t, h: t.update(pos_embed=torch.ones(1, 4, 64).int()), r"torch.int32 and not"),
    "no configuration": (lambda t, h: h.pop("config"), "header without a usable configuration"),
    "foreign configuration": (lambda t, h: h["config"].update(qk_norm=True), "header without a usable configuration"),
    "foreign layer": (lambda t, h: h["layers"].update({"blocks.9.mlp.fc1": {"rank": 2}}), "layer this cannot build"),
    "foreign format": (lambda t, h: h["layers"].update({"blocks.0.mlp.fc1": {"log": 2}}), "layer this cannot build"),
    "foreign version": (lambda t, h: h.update(format_version="new"), "damaged header"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_files_that_do_not_fit_say_so(tiny: DiT, tmp_path: Path, suffix: str, problem: str) -> None:
    edit, sentence = PROBLEMS[problem]
    path = tmp_path / f"tiny{suffix}"
    broken(path, tiny, edit)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert re.search(r"; (give|save|upgrade|copy)", str(error.value)), "no word on what to do"


def test_a_bare_file_that_lacks_a_tensor_says_which(golden_learned: Golden, tmp_path: Path) -> None:
    state = load_file(GOLDEN / "dit_learn_sigma.weights.safetensors")
    del state["blocks.1.mlp.fc2.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of its tensors \(first: blocks.1.mlp.fc2.bias\)"):
        load_model(tmp_path / "less.safetensors", num_heads=3)
