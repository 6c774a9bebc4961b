"""Conversion from and to diffusers' DiT: equal outputs, and an exact round trip."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import randomize, relative

from svdit.checkpoints.convert import (
    REPEATED,
    from_diffusers,
    specs_from_diffusers,
    specs_to_diffusers,
    to_diffusers,
)
from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.kernels.formats import Format
from svdit.model.dit import DiT
from svdit.model.embeddings import sinusoids
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.linear import LinearSpec, SVDLinear, layer_specs, quantized_layers
from svdit.quant.quantize import quantize_
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers import DiTTransformer2DModel  # noqa: E402
from diffusers.models.embeddings import Timesteps  # noqa: E402


@pytest.fixture(scope="module")
def theirs() -> DiTTransformer2DModel:
    """Random weights, 3 heads, 6×6 inputs, and the published timestep frequencies."""
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=6,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    )
    randomize(model)
    first, second = model.transformer_blocks
    second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("folder", ["", "transformer"])  # a model's folder, or a pipeline's
def test_outputs_equal_diffusers(theirs: DiTTransformer2DModel, tmp_path: Path, suffix: str, folder: str) -> None:
    theirs.save_pretrained(tmp_path / folder, safe_serialization=suffix == "safetensors")
    ours = load_model(tmp_path)
    assert ours.config.num_heads == 3
    x, t, y = torch.randn(4, 4, 6, 6), torch.tensor([0, 17, 500, 999]), torch.tensor([0, 4, 5, 2])
    expected = theirs(x, t, y).sample
    assert relative(ours(x, t, y), expected) < 2e-5
    assert expected.std() > 0.1
    loaded = load_model(next((tmp_path / folder).glob(f"*.{suffix}")))  # the file, with config.json beside it
    assert torch.equal(loaded(x, t, y), ours(x, t, y))


def test_round_trip_is_exact(tiny: DiT, theirs: DiTTransformer2DModel) -> None:
    state = tiny.state_dict()
    again = from_diffusers(to_diffusers(state), 4)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    names = theirs.state_dict()
    there = to_diffusers(from_diffusers(names, 6))
    assert there.keys() == names.keys()
    assert all(torch.equal(there[key], names[key]) for key in names)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["w8a8", "w4a8-channel", "svdquant"])
@pytest.mark.parametrize("factors", [None, Format(8)])
def test_quantized_layers_round_trip(tiny: DiT, preset: str, factors: Format | None) -> None:
    """Split into queries, keys and values and joined again; each part computes its rows of the fused layer."""
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([1, 2])
    quantize_(tiny, dit_config(recipe_for(preset, rank=4, factors=factors)), lambda model: model(x, t, y))
    state, specs = tiny.state_dict(), layer_specs(tiny)
    there, their_specs = to_diffusers(state), specs_to_diffusers(specs)
    again = from_diffusers(there, 4)
    assert again.keys() == state.keys() and specs_from_diffusers(their_specs) == specs
    assert all(torch.equal(again[key], state[key]) for key in state)
    qkv, D = quantized_layers(tiny)["blocks.1.attn.qkv"], tiny.config.hidden_size
    rows = torch.randn(5, D)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        prefix = f"transformer_blocks.1.attn1.{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in there.items() if key.startswith(prefix)}
        spec = LinearSpec.from_dict(their_specs[prefix[:-1]])
        part = SVDLinear.from_tensors(spec, D, D, own)
        assert torch.allclose(part(rows), qkv(rows)[:, i * D : (i + 1) * D], rtol=1e-5, atol=1e-6)


def test_separately_quantized_queries_have_no_published_layer(tiny: DiT) -> None:
    quantize_(tiny, dit_config(recipe_for("rtn")))
    state, specs = to_diffusers(tiny.state_dict()), specs_to_diffusers(layer_specs(tiny))
    q = "transformer_blocks.0.attn1.to_q"
    with pytest.raises(UserError, match=r"to_q, .*to_k, .*to_v have different formats"):
        specs_from_diffusers({**specs, q: {**specs[q], "act": None}})
    with pytest.raises(UserError, match="no layer other"):
        specs_from_diffusers({**specs, "other": {}})
    shift = {
        f"transformer_blocks.0.attn1.{part}.in_shift": torch.ones(32) * i
        for i, part in enumerate(("to_q", "to_k", "to_v"))
    }
    with pytest.raises(UserError, match=r"were quantized separately \(their in_shift differ\)"):
        from_diffusers({**state, **shift}, 4)


def test_the_documented_difference_of_the_timesteps() -> None:
    page = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    header, decibels = re.search(r"^\| t \|(.*)\|\n.*\n\| dB \|(.*)\|$", page, re.MULTILINE).groups()
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
    for t, expected in zip(map(float, header.split("|")), decibels.replace("−", "-").split("|"), strict=True):
        error = relative(theirs(torch.tensor([t])), sinusoids(torch.tensor([t])))
        assert -20 * math.log10(error) == pytest.approx(float(expected), abs=0.06)


def test_unusable_diffusers_models_are_errors(theirs: DiTTransformer2DModel, tmp_path: Path) -> None:
    state = theirs.state_dict()
    with pytest.raises(UserError, match=r"lacks 'proj_out_2\.bias'"):
        from_diffusers({key: tensor for key, tensor in state.items() if key != "proj_out_2.bias"}, 6)
    with pytest.raises(UserError, match=r"1 tensors that a published one lacks \(more, …\); pass"):
        from_diffusers({**state, "more": torch.ones(1)}, 6)
    for layer in REPEATED.values():
        name = f"{layer}.weight"
        with pytest.raises(UserError, match=f"differ in {name}"):
            from_diffusers({**state, f"transformer_blocks.1.{name}": state[f"transformer_blocks.0.{name}"] + 1}, 6)
    for name in ("pos_embed.proj.weight", "transformer_blocks.0.attn1.to_k.bias"):
        with pytest.raises(UserError, match="tensors of other shapes"):
            from_diffusers({**state, name: torch.ones(())}, 6)
    torch.save(state, tmp_path / "alone.bin")
    with pytest.raises(UserError, match=r"no config\.json beside it, .* pass input_size"):
        load_model(tmp_path / "alone.bin")
    assert load_model(tmp_path / "alone.bin", input_size=6, num_heads=3).config.num_heads == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sample_size": "6", "num_attention_heads": 3}'])
def test_unusable_config_json_is_an_error(theirs: DiTTransformer2DModel, tmp_path: Path, content: str) -> None:
    torch.save(theirs.state_dict(), tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UserError,
        match=r"config\.json has (no usable sample_size|an unusable configuration) .* again",
    ):
        load_model(tmp_path / "model.bin")
