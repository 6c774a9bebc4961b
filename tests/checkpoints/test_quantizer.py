"""A quantized DiT in diffusers' layout: written from a published one, loaded by both, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from safetensors.torch import load_file, save_file

from svdit.checkpoints.store import load_model
from svdit.cli import command
from svdit.errors import UserError
from svdit.integrations.dit import WEIGHTS, write_folder
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.linear import layer_specs, quantized_layers
from svdit.quant.quantize import quantize_

import diffusers  # isort: skip

X, T, Y = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1)), [0, 17, 999], [0, 4, 5]


@pytest.fixture
def folder(tiny: DiT, tmp_path: Path) -> Path:
    """A quantized DiT of svdit in diffusers' layout, with the published timesteps."""
    quantize_(tiny, dit_config(recipe_for("w4a8", rank=4)), lambda m: m(X, torch.tensor(T), torch.tensor(Y)))
    write_folder(tiny, tmp_path)
    return tmp_path


@torch.no_grad()
def test_diffusers_computes_what_svdit_does(tiny: DiT, folder: Path) -> None:
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    t, y = torch.tensor(T), torch.tensor(Y)
    expected = tiny(X, t, y)
    assert relative(theirs(X, t, y).sample, expected) < 2e-3  # products in another order can tip codes
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1  # diffusers' own
    assert relative(theirs(X, t, y).sample, expected) > 0.02
    ours = load_model(folder)
    assert torch.equal(ours(X, t, y), expected) and ours.config == tiny.config
    state = tiny.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    theirs.save_pretrained(folder / "again")  # what diffusers saves is read, too
    assert torch.equal(load_model(folder / "again")(X, t, y), expected)


def test_queries_quantized_apart_are_refused(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["transformer_blocks.0.attn1.to_q.in_shift"] += 1
    save_file(state, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"were quantized separately \(their in_shift differ\)"):
        load_model(folder)


CHANGES: dict[str, tuple[Any, str]] = {
    "quantizer": (lambda c: c["quantization_config"].update(quant_method="quanto"), "as other tools quantize"),
    "no layers": (lambda c: c["quantization_config"].pop("layers"), "'layers'"),
    "layers": (lambda c: c["quantization_config"].update(layers=3), "not iterable"),
    "text": (lambda c: c.update(quantization_config="x"), "as other tools quantize"),
    "size": (lambda c: c.update(sample_size="6"), "unusable configuration"),
    "depth": (lambda c: c.update(num_layers=10**9), "depth is 1000000000, but there are 2 blocks"),
    "heads": (lambda c: c.pop("num_attention_heads"), "'num_attention_heads'"),
    "classes": (lambda c: c.update(num_embeds_ada_norm=7), "does not fit its model"),
    "width": (lambda c: c.update(attention_head_dim=16), "does not fit its model|cannot be built"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_unusable_configurations_are_sentences(case: str, folder: Path) -> None:
    change, message = CHANGES[case]
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_inspect_lists_its_layers(tiny: DiT, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", [str(folder), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert sorted(line["name"] for line in data["layers"]) == sorted(layer_specs(tiny))
    assert data["config"]["hidden_size"] == tiny.config.hidden_size


def test_other_timesteps_are_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantized_layers(load_model(folder))
    assert "frequencies" not in capsys.readouterr().err
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]["timesteps"]
    (folder / "config.json").write_text(json.dumps(content))
    load_model(folder)
    assert "spaces the timestep frequencies of this DiT by 1/127" in capsys.readouterr().err
