"""Pipelines' folders: components, variants, shards, the cache of Hugging Face; what is copied, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdit.errors import UserError
from svdit.integrations.folders import INDEX, PipelineFolder, plain, variant_of

CONTENT = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}


def pipeline(folder: Path, files: list[str], **changes: Any) -> Path:
    """A folder with these files, whose content is their name."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else name)
    (folder / INDEX).write_text(json.dumps({**CONTENT, **changes}))
    return folder


W = "transformer/diffusion_pytorch_model"
FILES = [f"{W}.safetensors", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/config.json"]
FILES += ["scheduler/scheduler_config.json", "text_encoder/model.safetensors", "text_encoder/config.json"]


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("model.safetensors.index.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("pytorch_model.non_ema.bin", "non_ema"),
        ("config.json", None),
    ],
)
def test_variants_of_names(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant
    assert variant_of(plain(name, variant)) is None


def test_all_but_one_component_is_copied(tmp_path: Path) -> None:
    extra = ["flux1-dev.safetensors", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"]
    folder = PipelineFolder.at(pipeline(tmp_path / "a", [*FILES, *extra, "text_encoder/flax_model.msgpack"]))
    assert (folder.kind, folder.component(None), folder.variant("transformer")) == ("FluxPipeline", "transformer", None)
    folder.copy(tmp_path / "b", "transformer", None)
    assert names(tmp_path / "b") == sorted([INDEX, *(name for name in FILES if not name.startswith("transformer"))])
    (tmp_path / "b" / "vae" / "config.json").write_text("changed")
    assert (tmp_path / "a" / "vae" / "config.json").read_text() == "{}"  # no link


def test_variants_become_plain_weights(tmp_path: Path) -> None:
    own = [name.replace(".safetensors", ".fp16.safetensors") for name in FILES if not name.startswith("text")]
    shards = [
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
    ]
    path = pipeline(tmp_path / "a", [*own, *shards, "text_encoder/config.json"])
    index = {"metadata": {}, "weight_map": {"x": Path(shards[0]).name, "y": Path(shards[1]).name}}
    (path / "text_encoder" / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    folder = PipelineFolder.at(path)
    assert folder.variant("transformer") == "fp16"
    assert [file.name for file in folder.weights("transformer", "fp16")] == [f"{Path(W).name}.fp16.safetensors"]
    folder.copy(tmp_path / "b", "transformer", "fp16")
    text = tmp_path / "b" / "text_encoder"
    assert names(text) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    weights = json.loads((text / "model.safetensors.index.json").read_text())["weight_map"]
    assert all((text / name).read_text() == shard for name, shard in zip(weights.values(), shards, strict=True))


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    source, cache = pipeline(tmp_path / "blobs", FILES), tmp_path / "models--x--y"
    for name in [*FILES, INDEX]:
        link = cache / "snapshots" / "abc" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source / name)
    folder = PipelineFolder.at(cache)
    assert folder.path.name == "abc"
    folder.copy(tmp_path / "out", "transformer", None)
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "vae" / Path(FILES[2]).name).read_text() == FILES[2]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    def refused(match: str, files: list[str] = FILES, component: str | None = None, **changes: Any) -> None:
        folder = pipeline(tmp_path / "p", files, **changes)
        with pytest.raises(UserError, match=match) as error:
            PipelineFolder.at(folder).component(component)
        assert "\n" not in str(error.value)

    with pytest.raises(UserError, match="there is no folder"):
        PipelineFolder.at(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no model_index\.json; pass the folder of a whole pipeline"):
        PipelineFolder.at(tmp_path)
    refused(r"has the class \['x', 'Y'\]; pipelines with code of their own", _class_name=["x", "Y"])
    refused("has no component 'prior' that is a model .* choose --component from transformer, vae", component="prior")
    refused("has no component 'scheduler'", component="scheduler")
    refused("has no component 'text_encoder' that is a model of diffusers", component="text_encoder")
    refused("has neither a transformer nor a unet; choose --component from vae", transformer=[None, None])


def test_several_variants_and_quantized_components(tmp_path: Path) -> None:
    folder = PipelineFolder.at(pipeline(tmp_path, [f"{W}.fp16.safetensors", f"{W}.bf16.safetensors"]))
    with pytest.raises(UserError, match="has the variants bf16, fp16; pass one of them as --variant"):
        folder.variant("transformer")
    with pytest.raises(UserError, match="has no variant 'int8' but bf16, fp16; pass another"):
        folder.variant("transformer", "int8")
    assert folder.variant("transformer", "bf16") == "bf16"
    (tmp_path / "transformer" / "config.json").write_text('{"quantization_config": {"quant_method": "svdit"}}')
    with pytest.raises(UserError, match=r"is already quantized \(svdit\); pass the pipeline in full precision"):
        folder.component(None)
    for content in ("[]", "{", "[" * 100_000):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(UserError, match=r"model_index\.json .*JSON.*; download it again"):
            PipelineFolder.at(tmp_path)
