"""Quantized models of diffusers: saved and loaded bit by bit, on nine architectures; hostile files are sentences."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from layers import model_bound
from safetensors.torch import load_file, save_file
from tiny_diffusers import MODELS, generator, output
from torch import Tensor, nn

from svdit import accelerate
from svdit.errors import UserError
from svdit.integrations.diffusers import SvditConfig, attach_, published_timesteps_, rules_for
from svdit.kernels import ops
from svdit.quant.linear import quantized_layers
from svdit.quant.quantize import quantize_

import diffusers  # isort: skip

WEIGHTS = "diffusion_pytorch_model.safetensors"


def fresh(model: nn.Module, name: str) -> Tensor:
    """The output on inputs that nothing was fitted to."""
    return output(model, MODELS[name].inputs(4, generator(100)))


def quantized(name: str, preset: str, calls: int = 4) -> Any:
    """A tiny model, quantized by the default rules and ready to be saved."""
    model = MODELS[name].model()
    loop = lambda model: [output(model, MODELS[name].inputs(4, generator(i))) for i in range(calls)]  # noqa: E731
    quantize_(model, rules_for(model, preset), loop)
    attach_(model)
    return model


def sqnr(noisy: Tensor, clean: Tensor) -> float:
    """Of the model's output, in dB."""
    return -20 * float(torch.log10(torch.tensor(relative(noisy, clean))))


@pytest.mark.parametrize("name", MODELS)
def test_nine_models_save_load_and_accelerate(name: str, tmp_path: Path) -> None:
    model = quantized(name, "w8a8")
    clean, noisy = fresh(MODELS[name].model(), name), fresh(model, name)
    assert 25 < sqnr(noisy, clean) < 80 and clean.std() > 0.1
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(fresh(loaded, name), noisy) and loaded.dtype == MODELS[name].model().dtype
    assert {key: (x.dtype, x.shape) for key, x in loaded.state_dict().items()} == {
        key: (x.dtype, x.shape) for key, x in model.state_dict().items()
    }
    assert 0 < relative(fresh(accelerate(loaded), name), noisy) < model_bound(ops.choose(torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a8", "w4a4", "nvfp4", "mxfp4", "fp8", "svdquant-w4a4", "w4a8-channel"])
@pytest.mark.parametrize("name", MODELS)
def test_other_presets_too(name: str, preset: str, tmp_path: Path) -> None:
    model = quantized(name, preset)
    clean, noisy = fresh(MODELS[name].model(), name), fresh(model, name)
    assert 8 < sqnr(noisy, clean) < 80
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh(type(model).from_pretrained(tmp_path), name), noisy)


@pytest.fixture(scope="module")
def dit() -> Any:
    return quantized("DiT", "w4a4")


@pytest.fixture
def folder(dit: Any, tmp_path: Path) -> Path:
    dit.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def load(folder: Path, **options: Any) -> Any:
    return diffusers.DiTTransformer2DModel.from_pretrained(folder, **options)


def test_the_configuration_names_the_layers(dit: Any, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (content["quant_method"], content["version"]) == ("svdit", 1)
    assert content["layers"].keys() == quantized_layers(dit).keys()
    load(folder).save_pretrained(folder.with_name("again"))  # what is loaded is saved as it was
    again = json.loads((folder.with_name("again") / "config.json").read_text())["quantization_config"]
    first, second = (load_file(path / WEIGHTS) for path in (folder, folder.with_name("again")))
    assert again == content and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_dtype_is_for_all_other_tensors(dit: Any, folder: Path, dtype: torch.dtype) -> None:
    model, inside = load(folder, torch_dtype=dtype), tuple(f"{name}." for name in quantized_layers(dit))
    before = dit.state_dict()
    for key, tensor in model.state_dict().items():
        quantized = key.startswith(inside)
        assert tensor.dtype == (before[key].dtype if quantized else dtype), key
        assert torch.equal(tensor, before[key] if quantized else before[key].to(dtype)), key
    assert model.dtype == dtype and all(layer.weight.dtype == dtype for layer in quantized_layers(model).values())
    inputs = MODELS["DiT"].inputs(4, generator(100))
    half = output(model, {**inputs, "hidden_states": inputs["hidden_states"].to(dtype)})
    assert half.dtype == dtype and 0 < relative(half.float(), fresh(dit, "DiT")) < 0.2


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_maps(dit: Any, folder: Path, device_map: Any) -> None:
    assert torch.equal(fresh(load(folder, device_map=device_map), "DiT"), fresh(dit, "DiT"))
    with pytest.raises(UserError, match="cannot be offloaded to a disk; choose another device_map"):
        load(folder, device_map={"": "disk"}, offload_folder=folder)


def test_an_automatic_device_map(tmp_path: Path) -> None:
    model = quantized("Flux", "rtn")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(fresh(loaded, "Flux"), fresh(model, "Flux"))


def test_an_accelerated_model_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = accelerate(load(folder))
    with pytest.raises(UserError, match="an accelerated model cannot be saved; save the quantized model before"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_copies_and_pickles(dit: Any, tmp_path: Path) -> None:
    for model in (copy.deepcopy(dit), pickle.loads(pickle.dumps(dit))):
        model.save_pretrained(tmp_path)
        assert torch.equal(fresh(load(tmp_path), "DiT"), fresh(dit, "DiT"))


def test_a_config_with_a_preset_quantizes_while_loading(tmp_path: Path) -> None:
    model = MODELS["DiT"].model()
    model.save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float", quantization_config=SvditConfig(preset="w8a8", skip=["*.to_q"]))
    assert len(quantized_layers(loaded)) == 12
    assert 20 < sqnr(fresh(loaded, "DiT"), fresh(model, "DiT")) < 80
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(fresh(load(tmp_path / "out"), "DiT"), fresh(loaded, "DiT"))
    with pytest.raises(UserError, match="there is no preset 'w3'"):
        SvditConfig(preset="w3")


def test_a_pipeline_quantizes_its_transformer(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    model = MODELS["DiT"].model()
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "float")
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": SvditConfig(preset="w8a8")})
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=mapping)
    assert quantized_layers(loaded.transformer) and not quantized_layers(loaded.vae)
    loaded.save_pretrained(tmp_path / "out")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(fresh(again.transformer, "DiT"), fresh(loaded.transformer, "DiT"))


def test_a_model_that_is_not_quantized_is_not_attached() -> None:
    for model in (MODELS["DiT"].model(), nn.Linear(2, 2)):
        with pytest.raises(UserError, match="is no quantized model of diffusers; call quantize_"):
            attach_(model)


LAYER = "transformer_blocks.0.attn1.to_q"
Change = Callable[[dict[str, Any]], object]
CONFIGS: dict[str, tuple[Change, str]] = {
    "version": (lambda c: c.update(version=2), "has version 2, and svdit reads 1; upgrade svdit"),
    "no version": (lambda c: c.update(version="1"), "has version '1'"),
    "field": (lambda c: c.update(more=1), "has a field 'more'; pass an unchanged one, or upgrade svdit"),
    "list": (lambda c: c.update(layers=[1]), "the layers of the quantization_config are a list; pass names"),
    "nothing": (lambda c: c.pop("layers"), "has either layers or a preset"),
    "both": (lambda c: c.update(preset="w8a8"), "has either layers or a preset"),
    "timesteps": (lambda c: c.update(timesteps="x"), "timesteps is 'x'; choose"),
    "spec": (lambda c: c["layers"].update({LAYER: 3}), f"a quantized layer that is not supported, {LAYER}"),
    "spec field": (lambda c: c["layers"][LAYER].update(x=3), "LinearSpec has no field 'x'"),
    "rank": (lambda c: c["layers"][LAYER].update(rank=-1), "rank -1 and weight INT4 g64 store no weight"),
    "huge rank": (lambda c: c["layers"][LAYER].update(rank=10**9), r"l1 is \(128, 32\) and not \(128, 1000000000\)"),
    "bits": (lambda c: c["layers"][LAYER]["weight"].update(bits=77), "77 bits cannot be stored"),
    "group": (lambda c: c["layers"][LAYER]["weight"].update(group=24), "cannot be cut into groups of 24"),
    "unknown layer": (lambda c: c["layers"].update(x=c["layers"][LAYER]), "'x' of the model is a NoneType"),
    "no linear": (lambda c: c["layers"].update({"pos_embed.proj": c["layers"][LAYER]}), "is a Conv2d, not a Linear"),
    "missing layer": (lambda c: c["layers"].pop(LAYER), r"the weights lack 1 tensors \(first: .*to_q.weight\)"),
    "other format": (lambda c: c["layers"][LAYER].update(scaled=False), "the weights have unknown 1 tensors"),
    "too many": (lambda c: c["layers"].update({"proj_out_1": c["layers"][LAYER]}), "the weights lack .* proj_out_1"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configurations_are_sentences(case: str, folder: Path) -> None:
    change, message = CONFIGS[case]
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


TENSORS: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(f"{LAYER}.residual_codes"), "the weights lack 1 tensors"),
    "extra": (lambda t: t.update({f"{LAYER}.weight": torch.ones(2)}), "the weights have unknown 1 tensors"),
    "shape": (lambda t: t.update({f"{LAYER}.bias": torch.ones(127)}), r"bias is \(127,\) and not \(128,\)"),
    "type": (
        lambda t: t.update({f"{LAYER}.bias": torch.ones(128).half()}),
        r"bias is torch\.float16 and not torch\.fl",
    ),
    "NaN": (lambda t: t[f"{LAYER}.bias"].fill_(torch.nan), f"a layer {LAYER} with damaged weights .*NaN"),
    "scale": (lambda t: t[f"{LAYER}.in_scale"].fill_(0), "in_scale contains numbers that are not positive"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_weights_are_sentences(case: str, folder: Path) -> None:
    change, message = TENSORS[case]
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_published_timesteps(folder: Path, dit: Any) -> None:
    """A published DiT's frequencies are powers of 10000^(1/128); diffusers has 10000^(1/127)."""
    model = copy.deepcopy(dit)
    attach_(model, timesteps="published")
    model.save_pretrained(folder)
    loaded = load(folder)
    wave = loaded.transformer_blocks[0].norm1.emb.time_proj(torch.tensor([1.0]))
    assert torch.allclose(wave[0, :128], torch.cos(10000.0 ** -(torch.arange(128) / 128)), atol=1e-6)
    assert not torch.equal(fresh(loaded, "DiT"), fresh(dit, "DiT"))
    published_timesteps_(model)
    assert torch.equal(fresh(loaded, "DiT"), fresh(model, "DiT"))
    with pytest.raises(UserError, match="is for a DiTTransformer2DModel, not for a Flux"):
        published_timesteps_(MODELS["Flux"].model())
