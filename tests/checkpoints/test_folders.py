"""Folders of other tools: the checkpoint in them is found, or the message says what they hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdit.checkpoints.convert import to_diffusers
from svdit.checkpoints.folders import DIFFUSERS, vae_beside
from svdit.checkpoints.store import load_model, locate, save_model
from svdit.cli import command
from svdit.errors import UserError
from svdit.model.dit import DiT

CONFIG = {"_class_name": "DiTTransformer2DModel", "sample_size": 4, "num_attention_heads": 2}


@pytest.fixture
def theirs(tiny: DiT) -> dict[str, torch.Tensor]:
    return to_diffusers(tiny.state_dict())


def folder_of(path: Path, state: dict[str, torch.Tensor], variant: str = "") -> Path:
    """A folder as diffusers writes it."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / f"{DIFFUSERS}{variant}.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def same(model: DiT, tiny: DiT) -> bool:
    state = tiny.state_dict()
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key != "pos_embed")


@pytest.mark.parametrize("variant", ["", ".fp16", ".ema", ".non_ema"])
@pytest.mark.parametrize("place", ["", "transformer"])
def test_variants_and_pipelines(
    tiny: DiT, theirs: dict[str, torch.Tensor], tmp_path: Path, variant: str, place: str
) -> None:
    folder_of(tmp_path / place, theirs, variant)
    assert same(load_model(tmp_path), tiny)
    command("inspect", [str(tmp_path), "--quiet"])


@pytest.mark.parametrize("place", ["", "transformer"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(tiny: DiT, theirs: dict[str, torch.Tensor], tmp_path: Path, place: str, variant: str) -> None:
    folder, where = folder_of(tmp_path / place, theirs), {}
    (folder / f"{DIFFUSERS}.safetensors").unlink()
    for i in (1, 2):
        file = f"{DIFFUSERS}{variant}-0000{i}-of-00002.safetensors"
        part = dict(list(theirs.items())[i - 1 :: 2])
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    with pytest.raises(UserError, match="has shards without their index"):
        load_model(tmp_path)
    (folder / f"{DIFFUSERS}.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": where}))
    assert same(load_model(tmp_path), tiny)


def test_the_cache_of_hugging_face(tiny: DiT, theirs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """snapshots/HASH/transformer/… are links into blobs/; refs/main names the snapshot."""
    cache = tmp_path / "models--facebook--DiT-XL-2-256"
    source = folder_of(tmp_path / "blobs", theirs)
    inner = cache / "snapshots" / "abc" / "transformer"
    inner.mkdir(parents=True)
    for file in source.iterdir():
        (inner / file.name).symlink_to(file)
    assert same(load_model(cache), tiny)
    (cache / "snapshots" / "def").mkdir()
    with pytest.raises(UserError, match="has 2 snapshots; pass the folder of one"):
        load_model(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert same(load_model(cache), tiny)


def test_results_of_training_and_folders_with_one_checkpoint(tiny: DiT, tmp_path: Path) -> None:
    torch.save({"ema": tiny.state_dict()}, tmp_path / "last.pt")
    (tmp_path / "loss.csv").touch()
    assert locate(tmp_path).name == "last.pt"
    save_model(tiny, tmp_path / "ema.safetensors")
    assert locate(tmp_path).name == "ema.safetensors"
    torch.save({}, tmp_path / "optimizer.bin")
    shutil.move(tmp_path / "ema.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "last.pt").unlink()
    torch.save(tiny.state_dict(), tmp_path / "model.bin")
    assert locate(tmp_path).name == "model.safetensors"


def test_other_folders_are_described(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty; pass a file"):
        locate(tmp_path)
    (tmp_path / "b\x1b[31m").touch()
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"other checkpoint, only 'b\\x1b\[31m', 'images/'; pass a file"):
        locate(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"has 2 checkpoints \('a\.pt', 'b\.pt'\); pass one of them"):
        locate(tmp_path)


CLASSES = {
    "UNet2DConditionModel": "down_blocks.0.resnets.0.norm1.weight",
    "SD3Transformer2DModel": "transformer_blocks.0.norm1.linear.weight",
    "PixArtTransformer2DModel": "transformer_blocks.0.scale_shift_table",
    "AutoencoderKL": "decoder.conv_in.weight",
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("as_file", [False, True])
def test_other_classes_of_diffusers_are_named(name: str, as_file: bool, tmp_path: Path) -> None:
    path = folder_of(tmp_path, {CLASSES[name]: torch.ones(2)})
    (path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=rf"contains a {name}, not a DiT; pass a published DiT or a DiTTransformer"):
        load_model(path / f"{DIFFUSERS}.safetensors" if as_file else path)


def test_classes_of_transformers_are_named(tmp_path: Path) -> None:
    save_file({"text_model.embeddings.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))
    with pytest.raises(UserError, match="contains a CLIPTextModel, not a DiT"):
        load_model(tmp_path)


@pytest.mark.parametrize("component", [None, ["diffusers", "SD3Transformer2DModel"]])
def test_other_pipelines_are_named(
    theirs: dict[str, torch.Tensor], tmp_path: Path, component: list[str] | None
) -> None:
    folder_of(tmp_path / "transformer", theirs)
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": component}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline of diffusers, which has no DiTTransformer2DM"):
        load_model(tmp_path)


def test_a_dit_of_diffusers_is_of_no_other_family(theirs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a DiT of diffusers, not of the family sit; omit it"):
        load_model(folder_of(tmp_path, theirs), family="sit")


def test_a_published_checkpoint_beside_another_config_loads(tiny: DiT, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "x.pt")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert same(load_model(tmp_path, num_heads=2, family="dit"), tiny)


def test_a_pipeline_has_its_autoencoder_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "transformer" / "x.safetensors"
    assert vae_beside(file) is None
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").touch()
    assert vae_beside(file) == tmp_path / "vae"
    assert vae_beside(tmp_path / "other" / "x.safetensors") is None


def test_the_published_pipeline_has_the_older_name_of_the_class(
    tiny: DiT, theirs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """facebook/DiT-XL-2-256 was saved before diffusers split DiTTransformer2DModel off."""
    folder_of(tmp_path / "transformer", theirs)
    old = "Transformer2DModel"
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**CONFIG, "_class_name": old}))
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", old]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert same(load_model(tmp_path), tiny)


def test_folders_named_like_checkpoints_are_none(tiny: DiT, tmp_path: Path) -> None:
    (tmp_path / "old.pt").mkdir()
    save_model(tiny, tmp_path / "new.safetensors")
    assert locate(tmp_path).name == "new.safetensors"


@pytest.mark.parametrize("size", [0, -4, 10**6])
def test_input_sizes_out_of_range_are_errors(theirs: dict[str, torch.Tensor], tmp_path: Path, size: int) -> None:
    (folder_of(tmp_path, theirs) / "config.json").write_text(json.dumps({**CONFIG, "sample_size": size}))
    with pytest.raises(UserError, match=rf"sample_size\) is {size}; it must be from 1 to 1024"):
        load_model(tmp_path)
