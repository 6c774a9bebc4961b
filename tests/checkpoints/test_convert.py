"""Weights exchanged with diffusers' own DiT: same outputs, and back without a change."""

from pathlib import Path

import pytest
import torch
from conftest import randomize, relative

from svdit.checkpoints.convert import REPEATED, from_diffusers, to_diffusers
from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers import DiTTransformer2DModel  # noqa: E402
from diffusers.models.embeddings import Timesteps  # noqa: E402


@pytest.fixture(scope="module")
def theirs() -> DiTTransformer2DModel:
    """Every weight random; 3 heads, 6×6 inputs, and the published timestep frequencies."""
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
@pytest.mark.parametrize("below", ["", "transformer"])  # a model's folder, or a whole pipeline's
def test_outputs_equal_diffusers(theirs: DiTTransformer2DModel, tmp_path: Path, suffix: str, below: str) -> None:
    theirs.save_pretrained(tmp_path / below, safe_serialization=suffix == "safetensors")
    ours = load_model(tmp_path)
    assert ours.config.num_heads == 3
    x, t, y = torch.randn(4, 4, 6, 6), torch.tensor([0, 17, 500, 999]), torch.tensor([0, 4, 5, 2])
    expected = theirs(x, t, y).sample
    assert relative(ours(x, t, y), expected) < 2e-5
    assert expected.std() > 0.1
    loaded = load_model(next((tmp_path / below).glob(f"*.{suffix}")))  # the file alone, its config.json beside it
    assert torch.equal(loaded(x, t, y), ours(x, t, y))


def test_back_and_forth_changes_nothing(tiny: DiT, theirs: DiTTransformer2DModel) -> None:
    state = tiny.state_dict()
    again = from_diffusers(to_diffusers(state), 4)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    names = theirs.state_dict()
    there = to_diffusers(from_diffusers(names, 6))
    assert there.keys() == names.keys()
    assert all(torch.equal(there[key], names[key]) for key in names)


def test_what_cannot_be_converted_says_why(theirs: DiTTransformer2DModel, tmp_path: Path) -> None:
    state = theirs.state_dict()
    with pytest.raises(UserError, match=r"lacks 'proj_out_2\.bias'"):
        from_diffusers({key: tensor for key, tensor in state.items() if key != "proj_out_2.bias"}, 6)
    with pytest.raises(UserError, match="1 tensors a published one has no place for: more"):
        from_diffusers({**state, "more": torch.ones(1)}, 6)
    for name in REPEATED.values():
        with pytest.raises(UserError, match=f"differ in {name}"):
            from_diffusers({**state, f"transformer_blocks.1.{name}": state[f"transformer_blocks.0.{name}"] + 1}, 6)
    torch.save(state, tmp_path / "alone.bin")
    with pytest.raises(UserError, match=r"no config\.json beside it .* give input_size"):
        load_model(tmp_path / "alone.bin")
    assert load_model(tmp_path / "alone.bin", input_size=6, num_heads=3).config.num_heads == 3
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.safetensors"):
        load_model(tmp_path)
