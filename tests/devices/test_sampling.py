"""Sampling on a GPU: every sampler with every kind of guidance, the noise, the autoencoder, and accelerated models."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize, relative
from devices.fake_cuda import FakeCuda, value
from families import small
from layers import model_bound
from pixels import CONFIG, SEED, Squash, draw, pixel_model
from torch import nn

from svdit.checkpoints.store import load_model, save_model
from svdit.diffusion.flow_samplers import FLOW_SAMPLERS
from svdit.diffusion.noise import batch_noise
from svdit.diffusion.samplers import SAMPLERS
from svdit.model.autoencoder import Autoencoder
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, rank_ratio_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.runtime.dit import FastDiT
from svdit.sampling import calibration
from svdit.sampling.batch import SamplingConfig, generate
from svdit.sampling.calibration import calibration_loop
from svdit.sampling.dataset import generate_dataset
from svdit.shims import allow_cpu_torchvision

LABELS, SHAPE = torch.tensor([0, 3, 4]), (3, 8, 8)
GUIDANCE: dict[str, dict[str, Any]] = {
    "none": {"cfg_scale": 1.0},
    "all steps": {"cfg_scale": 2.0},
    "some steps": {"cfg_scale": 2.0, "cfg_interval": (200, 800)},
    "all channels": {"cfg_scale": 2.0, "cfg_channels": None},
}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_every_guidance(sampler: str, guidance: str) -> None:
    config, model = SamplingConfig(sampler, "4", **GUIDANCE[guidance]), pixel_model()
    expected = generate(model, LABELS, config)
    with FakeCuda():
        found = generate(model.to("cuda"), LABELS, config)
        assert found.is_cuda
    assert torch.equal(value(found), expected)


@pytest.mark.parametrize(
    ("family", "sampler"),
    [*(("repa", sampler) for sampler in FLOW_SAMPLERS), ("sit", "sde"), ("lightningdit", "euler"), ("jit", "heun")],
)
def test_every_sampler_of_flows(sampler: str, family: str) -> None:
    model = small(family, depth=2)
    config = SamplingConfig(sampler, "4", 2.0, cfg_interval=None if sampler == "dopri5" else (0.2, 0.9))
    expected = generate(model, LABELS, config)
    with FakeCuda():
        found = generate(model.to("cuda"), LABELS, config)
        assert found.is_cuda
    assert torch.equal(value(found), expected)


def test_the_published_order_of_noise() -> None:
    """`svdit sample` draws with a generator of the device."""
    with FakeCuda():
        noise = batch_noise(0, (3, *SHAPE), torch.device("cuda"), doubled=True)
        found = [noise(), noise()]
        assert all(x.is_cuda and x.shape == (3, *SHAPE) for x in found)
        x = generate(pixel_model().to("cuda"), LABELS, SamplingConfig("ddpm", "4"), noise=noise)
        assert x.is_cuda
    draw = batch_noise(0, (3, *SHAPE), torch.device("cpu"), doubled=True)
    assert all(torch.equal(value(x), draw()) for x in found)


def test_a_folder_of_images(tmp_path: Path) -> None:
    with FakeCuda():
        model = pixel_model().to("cuda")
        npz = generate_dataset(model, tmp_path / "gpu", 7, CONFIG, autoencoder=Squash(), batch_size=3, seed=SEED)  # type: ignore[arg-type]
    with np.load(npz) as found, np.load(draw(tmp_path / "cpu")) as expected:
        assert np.array_equal(found["arr_0"], expected["arr_0"])


def test_calibration_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer of the model, adaLN too, sees the CPU's inputs."""
    monkeypatch.setattr(calibration, "CONDITIONS", 64)

    def sums(model: nn.Module) -> dict[str, list[float]]:
        seen: dict[str, list[float]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0].double().sum().item())
                )
        calibration_loop(images=2, steps=2)(model)
        return seen

    model = pixel_model()
    expected = sums(copy.deepcopy(model))
    with FakeCuda():
        assert sums(model.to("cuda")) == expected


def quantized(preset: str) -> DiT:
    model = pixel_model()
    config = rank_ratio_config(0.5, 8) if preset == "rank ratio" else dit_config(recipe_for(preset, smoothing=0))
    quantize_(model, config, calibration_loop(images=2, steps=2))
    return model


@pytest.mark.parametrize("backend", ["dequant", "reference"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "nvfp4", "rank ratio"])
def test_quantized_and_accelerated_models(preset: str, backend: str) -> None:
    """As on the CPU, but for rounding: the GPU computes the conditioning of every image, the CPU of different ones."""
    model = quantized(preset)
    inputs = (torch.randn(3, *SHAPE), torch.tensor([9, 500, 500]), LABELS)
    with torch.no_grad():
        expected = model(*inputs)
    with FakeCuda():
        model.to("cuda")
        on_gpu = [x.to("cuda") for x in inputs]
        assert torch.equal(value(model(*on_gpu)), expected)
        fast = accelerate(model, backend, debug=True)
        found = fast(*on_gpu)
        assert found.is_cuda
    assert isinstance(fast, FastDiT)
    assert relative(value(found), expected) < model_bound(backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_checkpoints_of_any_float_type_are_accelerated(dtype: torch.dtype) -> None:
    model, inputs = quantized("w8a8").to(dtype), (torch.randn(3, *SHAPE), torch.tensor([9, 500, 500]), LABELS)
    expected = copy.deepcopy(model).float()(*inputs)
    with FakeCuda():
        found = accelerate(model.to("cuda"), "dequant", debug=True)(*(x.to("cuda") for x in inputs))
        assert found.is_cuda and found.dtype == torch.float32
    assert relative(value(found), expected) < model_bound("dequant")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # safetensors looks for shared memory
def test_a_checkpoint_is_loaded_onto_the_device(tmp_path: Path) -> None:
    model = quantized("w4a8")
    save_model(model, tmp_path / "q.safetensors")
    with FakeCuda():
        loaded = load_model(tmp_path / "q.safetensors", device="cuda")
        assert {x.device.type for x in loaded.state_dict().values()} == {"cuda"}
        save_model(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_the_autoencoder() -> None:
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    parts = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = randomize(AutoencoderKL(**parts, **kinds))
    x, z, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    ours = Autoencoder("tiny", vae)
    encoded, decoded = ours.encode(x, noise), ours.decode(z)  # one image at a time, and both together on a GPU
    with FakeCuda():
        ours = Autoencoder("tiny", vae.to("cuda"))
        found = [ours.encode(x.to("cuda"), noise.to("cuda")), ours.decode(z.to("cuda"))]
        assert all(y.is_cuda for y in found)
    assert relative(value(found[0]), encoded) < 1e-6 and relative(value(found[1]), decoded) < 1e-6
