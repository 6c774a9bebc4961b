"""Checkpoints of every layout load exactly; files that do not fit their model are errors of one sentence."""

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
from svdit.fields import from_json
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.kernels.reference import quantize
from svdit.model.dit import DiT, DiTConfig
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
    assert (header["name"], header["provenance"]) == ("DiT-tiny", {"seed": 3})
    assert from_json(DiTConfig, header["config"]) == tiny.config


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_class_names_are_kept_and_checked(tiny: DiT, tmp_path: Path, suffix: str) -> None:
    path, names = tmp_path / f"tiny{suffix}", ("cat", "1", "ä, b", "\udce9", "")
    save_model(tiny, path)
    assert load_model(path).class_names == ()
    tiny.class_names = names
    save_model(tiny, path)
    assert load_model(path).class_names == names
    for wrong, message in (
        (("cat",), "1 class names and 5 classes"),
        ((1, 2, 3, 4, 5), "class names that are no text"),
    ):
        tiny.class_names = wrong  # type: ignore[assignment]
        save_model(tiny, path)
        with pytest.raises(UserError, match=message):
            load_model(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_size_is_that_of_its_tensors(tiny: DiT, tmp_path: Path, suffix: str) -> None:
    rows = torch.randn(640, 64)
    tiny.blocks[0].attn.proj.weight = torch.nn.Parameter(rows[:64])  # a view must not be saved with its whole storage
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
def test_a_quantized_model_loads_bit_for_bit_and_has_the_size_of_its_formats(
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


def test_published_weights_reproduce_the_published_outputs(golden: Golden, tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    torch.save(golden.model.state_dict(), path)
    with pytest.raises(UserError, match="pass num_heads"):
        load_model(path, family="dit")
    model = load_model(path, family="dit", num_heads=golden.model.config.num_heads, input_size=8, num_classes=10)
    assert model.config == golden.model.config
    assert relative(model(golden["x"], golden["t"], golden["y"]), golden["forward"]) < 2e-5
    assert read_header(path) is None


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-S/8"])
def test_named_sizes_need_no_num_heads(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        published = DiT_models[name](input_size=16, num_classes=3)
    published.to_empty(device="cpu")
    published.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in published.state_dict().items()})
    torch.save(published.state_dict(), tmp_path / "bare.pt", _use_new_zipfile_serialization=False)  # the legacy layout
    assert load_model(tmp_path / "bare.pt", family="dit").config == published.config
    assert load_model(tmp_path / "bare.pt", name=name, input_size=16).config == published.config


def test_training_checkpoints_load_their_ema() -> None:
    path = GOLDEN / "train_format_checkpoint.pt"
    model = load_model(path, num_heads=2, family="dit")
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, weights_only=True)
    assert same(model.state_dict(), loaded["ema"])
    assert model.blocks[0].attn.qkv.weight.equal(loaded["model"]["blocks.0.attn.qkv.weight"] * 0.5)
    with pytest.raises(UserError, match=r"depth 1 and not 12.* so it is not DiT-S/2"):
        load_model(path, name="DiT-S/2")


def test_half_precision_is_kept_in_own_files_and_becomes_fp32_in_published_ones(tiny: DiT, tmp_path: Path) -> None:
    torch.save(tiny.half().state_dict(), tmp_path / "bare.pt")
    save_model(tiny, tmp_path / "own.pt")
    assert load_model(tmp_path / "bare.pt", num_heads=2, family="dit").pos_embed.dtype == torch.float32
    assert load_model(tmp_path / "own.pt").pos_embed.dtype == torch.float16


def test_options_that_differ_from_the_file_are_errors(tiny: DiT, tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    save_model(tiny, path)
    assert load_model(path, num_classes=5, depth=2).config == tiny.config
    with pytest.raises(UserError, match="num_classes 5 and not 1000; pass"):
        load_model(path, num_classes=1000)
    with pytest.raises(UserError, match="there is no model 'DiT-M/2'"):
        load_model(path, name="DiT-M/2")
    with pytest.raises(UserError, match="no option of a DiT 'pooling'"):
        load_model(path, pooling=True)


def test_embedded_models_load_by_name(tiny: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "EMBEDDED", tmp_path)
    save_model(tiny, tmp_path / "letters.safetensors")
    assert same(load_model("letters").state_dict(), tiny.state_dict())
    with pytest.raises(UserError, match="no checkpoint nowhere; pass a file or one of: letters"):
        load_model("nowhere")


def test_embedded_models_may_be_stored_in_half_precision(
    tiny: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "EMBEDDED", tmp_path)
    save_model(tiny.half(), tmp_path / "letters.safetensors")
    state = load_model("letters").state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert same(state, {name: tensor.float() for name, tensor in tiny.state_dict().items()})


def broken(path: Path, tiny: DiT, edit: Callable[[State, State], None]) -> None:
    """Write a file with a valid checksum after `edit(tensors, header)`."""
    tensors: State = dict(tiny.state_dict())
    header: State = {"name": "", "config": asdict(tiny.config), "layers": {}, "provenance": {}}
    edit(tensors, header)
    io.write(path, tensors, header)


PROBLEMS: dict[str, tuple[Callable[[State, State], object], str]] = {
    "newer": (
        lambda t, h: h.update(format_version=2),
        r"has format 2 .* reads up to format 1; upgrade",
    ),
    "missing": (lambda t, h: t.pop("pos_embed"), r"lacks 1 tensors \(first: pos_embed\)"),
    "extra": (lambda t, h: t.update(more=torch.ones(1)), r"has unknown 1 tensors \(first: more\)"),
    "shape": (
        lambda t, h: t.update(pos_embed=torch.ones(2)),
        r"pos_embed is \(2,\) torch.float32 and not \(1, 4",
    ),
    "type": (lambda t, h: t.update(pos_embed=torch.ones(1, 4, 64).int()), r"torch.int32 and not"),
    "no configuration": (lambda t, h: h.pop("config"), "header without a usable configuration"),
    "foreign configuration": (lambda t, h: h["config"].update(qk_norm=True), "header without a usable configuration"),
    "foreign layer": (
        lambda t, h: h["layers"].update({"blocks.9.mlp.fc1": {"rank": 2}}),
        "layers that cannot be built",
    ),
    "foreign format": (
        lambda t, h: h["layers"].update({"blocks.0.mlp.fc1": {"log": 2}}),
        "layer that is not supported",
    ),
    "foreign version": (lambda t, h: h.update(format_version="new"), "damaged header"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_files_that_do_not_fit_are_errors(tiny: DiT, tmp_path: Path, suffix: str, problem: str) -> None:
    edit, sentence = PROBLEMS[problem]
    path = tmp_path / f"tiny{suffix}"
    broken(path, tiny, edit)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert re.search(r"; (pass|save|quantize|upgrade|copy)", str(error.value))
    assert str(path) in str(error.value)


LAYER = {"rank": 4, "weight": asdict(Format(4, 64, "int8", "full")), "act": asdict(Format(8)), "hadamard": 32}
BAD_CONFIGS: list[State] = [
    {"depth": "2"}, {"depth": 2.5}, {"depth": True}, {"depth": -1}, {"depth": None}, {"hidden_size": [64]},
    {"patch_size": 0}, {"num_heads": 0}, {"num_heads": 3}, {"in_channels": -4}, {"num_classes": -9},
    {"learn_sigma": "no"}, {"mlp_ratio": float("inf")}, {"mlp_ratio": float("nan")}, {"mlp_ratio": "4"},
]  # fmt: skip
BAD_LAYERS: list[State] = [
    {"rank": "4"}, {"rank": 4.0}, {"rank": -1}, {"factor_dtype": "float23"}, {"factor_dtype": 32},
    {"scaled": "yes"}, {"hadamard": 48}, {"hadamard": 128}, {"hadamard": "32"}, {"weight": "int4"}, {"weight": 4},
    {"weight": {"bits": "8"}}, {"weight": {"bits": 8.0}}, {"weight": {"bits": 9}}, {"weight": {"group": 48}},
    {"weight": {"scale": "fp23"}}, {"weight": {"span": None}}, {"weight": {"element": ["int"]}}, {"weight": {"log": 2}},
    {"act": {"group": 48}}, {"act": []}, {"factors": {"scale": "int8"}}, {"rank_ratio": "half"}, {"shifted": 1},
]  # fmt: skip
BAD_HEADERS: list[State] = [
    *({"config": value} for value in (None, [], "DiT-S/2", 3)),
    *({"layers": value} for value in (None, [1], "all", {"blocks.0.mlp.fc1": None}, {"blocks.0": LAYER})),
]


def with_header(path: Path, tiny: DiT, config: State, layer: State, header: State) -> None:
    """Write a valid quantized file, but with other values in its header."""
    rebuild_(tiny, {"blocks.0.mlp.fc1": LAYER})
    config = {**asdict(tiny.config), **config}
    io.write(path, tiny.state_dict(), {"config": config, "layers": {"blocks.0.mlp.fc1": {**LAYER, **layer}}, **header})


CASES = [
    *((config, {}, {}) for config in BAD_CONFIGS),
    *(({}, layer, {}) for layer in BAD_LAYERS),
    *(({}, {}, header) for header in BAD_HEADERS),
]


@pytest.mark.parametrize(("config", "layer", "header"), CASES, ids=str)
def test_bad_headers_are_errors_that_name_the_file(
    tiny: DiT, tmp_path: Path, config: State, layer: State, header: State
) -> None:
    path = tmp_path / "bad.safetensors"
    with_header(path, tiny, config, layer, header)
    with pytest.raises(UserError) as error:
        load_model(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(re.findall(r"; (pass|save|quantize|copy)", message)) == message.count(";") == 1


@pytest.mark.parametrize(("config", "layer"), [({"absorbed": True}, {}), ({}, {"out_scaled": True})])
def test_files_with_folded_smoothing_must_be_quantized_again(
    tiny: DiT, tmp_path: Path, config: State, layer: State
) -> None:
    with_header(tmp_path / "old.safetensors", tiny, config, layer, {})
    with pytest.raises(UserError, match=r"written by an earlier version, .*; .*quantize the model again"):
        load_model(tmp_path / "old.safetensors")


def test_first_version_files_without_folding_load(tiny: DiT, tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    with_header(path, tiny, {"absorbed": False}, {"out_scaled": False}, {})
    model = load_model(path)
    assert model.config == tiny.config
    assert layer_specs(model) == layer_specs(tiny)
    assert same(model.state_dict(), tiny.state_dict())


def test_missing_tensors_of_published_files_are_named(golden_learned: Golden, tmp_path: Path) -> None:
    state = load_file(GOLDEN / "dit_learn_sigma.weights.safetensors")
    del state["blocks.1.mlp.fc2.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors \(first: blocks.1.mlp.fc2.bias\)"):
        load_model(tmp_path / "less.safetensors", num_heads=3, family="dit")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tiny: DiT, tmp_path: Path, suffix: str, value: float) -> None:
    with torch.no_grad():
        tiny.blocks[1].mlp.fc1.weight[0, 0] = value
    save_model(tiny, tmp_path / f"own{suffix}")
    torch.save(tiny.state_dict(), tmp_path / "bare.pt")
    for path in (tmp_path / f"own{suffix}", tmp_path / "bare.pt"):
        with pytest.raises(UserError, match=r"has 1 NaN or Inf among the 16384 values of blocks\.1\.mlp\.fc1\.weight"):
            load_model(path, num_heads=2, family="dit")


def test_doubles_that_no_float_holds_are_named(tiny: DiT, tmp_path: Path) -> None:
    state = {key: tensor.double() for key, tensor in tiny.state_dict().items()}
    state["blocks.0.mlp.fc1.bias"][3] = 1e300
    torch.save(state, tmp_path / "double.pt")
    with pytest.raises(UserError, match=r"1 NaN or Inf among the 256 values of blocks\.0\.mlp\.fc1\.bias"):
        load_model(tmp_path / "double.pt", num_heads=2, family="dit")
