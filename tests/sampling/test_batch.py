"""One batch of images, against published runs."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Golden, relative
from pixels import Squash, pixel_model
from torch import Tensor

from svdit.diffusion.noise import image_noise
from svdit.diffusion.prediction import PREDICTIONS
from svdit.diffusion.samplers import SAMPLERS
from svdit.errors import UserError
from svdit.images import UINT8, to_uint8
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, generate, generate_images

CPU = torch.device("cpu")


PIXEL_MODEL = pixel_model()


def test_ddpm_from_recorded_noise_equals_published(golden: Golden) -> None:
    z = golden["z_10"]
    draws = itertools.chain([z], (noise[: len(z)] for noise in golden["ddpm_noise_10"]))
    steps: list[int] = []
    x = generate(
        golden.model,
        golden["y"][: len(z)],
        SamplingConfig(steps="10", cfg_scale=4.0),
        noise=lambda: next(draws),
        callback=lambda done, _: steps.append(done),
    )
    assert relative(x, golden["ddpm_10"]) < 1e-4
    assert steps == list(range(1, 11))
    assert next(draws, None) is None
    assert not x.requires_grad


def test_ddim_from_recorded_noise_equals_published(golden: Golden) -> None:
    z = golden["z_10"]
    config = SamplingConfig("ddim", "10", cfg_scale=4.0)
    x = generate(golden.model, golden["y"][: len(z)], config, noise=iter([z]).__next__)
    assert relative(x, golden["ddim_10"]) < 1e-4


@pytest.mark.gpu
def test_a_gpu_generates_the_same_images(golden_learned: Golden) -> None:
    z, device = golden_learned["z_10"], torch.device("cuda")
    draws = (noise[: len(z)].to(device) for noise in [z, *golden_learned["ddpm_noise_10"]])
    model = copy.deepcopy(golden_learned.model).to(device)
    x = generate(model, golden_learned["y"][: len(z)], SamplingConfig(steps="10"), noise=draws.__next__)
    assert relative(x.cpu(), golden_learned["ddpm_10"]) < 1e-3


@pytest.mark.parametrize("rule", UINT8)
def test_grey_levels_follow_the_models_rule(rule: str) -> None:
    model, config = pixel_model(uint8=rule), SamplingConfig("ddim", "2")
    images = generate_images(model, [0, 1], config, autoencoder=Squash())  # type: ignore[arg-type]
    np.testing.assert_array_equal(images, to_uint8(Squash().decode(generate(model, [0, 1], config)), rule))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_every_sampler(sampler: str) -> None:
    def images(config: SamplingConfig) -> Tensor:
        return torch.from_numpy(generate_images(PIXEL_MODEL, [0, 4, 2], config, autoencoder=Squash()))  # type: ignore[arg-type]

    guided, all_guided = (images(SamplingConfig(sampler, "4", cfg_channels=k)) for k in (1, None))
    plain = images(SamplingConfig(sampler, "4", cfg_scale=1))
    assert plain.shape == (3, 8, 8, 3)
    assert plain.dtype == torch.uint8
    assert len({bytes(x.numpy()) for x in (plain, guided, all_guided)}) == 3


@pytest.mark.parametrize("label", [-1, 5, 1000])  # 5 is the null class
def test_an_unknown_class_is_named(label: int) -> None:
    with pytest.raises(UserError, match=rf"no class {label}; this model has the classes 0 to 4"):
        generate(PIXEL_MODEL, [0, label], SamplingConfig(steps="2"))


def test_the_noise_is_that_of_the_seed_and_the_image() -> None:
    config = SamplingConfig("ddim", "2")
    both = generate(PIXEL_MODEL, torch.tensor([1, 2]), config, seed=3)
    noise = image_noise(3, [1], (3, 8, 8), CPU)
    assert relative(generate(PIXEL_MODEL, [2], config, noise=noise), both[1:]) < 1e-5
    assert relative(generate(PIXEL_MODEL, [1, 2], config), both) > 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_models_prediction_decides_how_its_output_is_read(prediction: str) -> None:
    model = pixel_model(prediction=prediction)
    x = generate(model, [0, 1], SamplingConfig("ddim", "1", cfg_scale=1), seed=1)
    z = image_noise(1, range(2), (3, 8, 8), CPU)()
    with torch.no_grad():
        output = model(z, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]))[:, :3]
    abar = 1 - 1e-4  # of the only timestep, 0; one DDIM step ends at x_0
    x0 = {
        "epsilon": (z - (1 - abar) ** 0.5 * output) / abar**0.5,
        "velocity": abar**0.5 * z - (1 - abar) ** 0.5 * output,
        "x0": output,
    }[prediction]
    assert relative(x, x0) < 1e-5


def test_a_latent_model_needs_its_autoencoder(tiny: DiT) -> None:
    with pytest.raises(UserError, match=r"generates 4-channel latents; pass autoencoder=load_autoencoder\('ema'\)"):
        generate_images(tiny, [0])
    sdxl = SimpleNamespace(name="vae", channels=16)
    with pytest.raises(UserError, match="the model has 4 channels, the autoencoder vae 16"):
        generate_images(tiny, [0], autoencoder=sdxl)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "eular"}, "no sampler 'eular'; choose one of ddpm, ddim, dpm.*, euler"),
        ({"sde_form": "sbdm"}, "no SDE form 'sbdm'; choose one of sigma, linear, SBDM"),
        ({"last_step": "heun"}, "no last step 'heun'; choose one of mean, euler, tweedie, none"),
        ({"last_step_size": 1.0}, "last_step_size is 1.0; choose a number between"),
        ({"time_shift": 0.0}, "time_shift is 0.0; choose a number above 0"),
        ({"sde_norm": float("inf")}, "sde_norm is inf; choose a number above 0"),
        ({"sampler": "euler", "steps": "ddim50"}, "'ddim50' is not a number of sampling steps of a flow"),
        ({"sampler": "heun", "cfg_interval": (0.5, 999)}, "cfg_interval is 0.5 to 999; choose two ascending times"),
        ({"sampler": "sde", "time_shift": 0.3}, "time_shift is 0.3 and the sampler sde; choose an ODE"),
        ({"steps": "0"}, "'0' is not a number of sampling steps"),
        ({"steps": "1001"}, "1001 sampling steps"),
        ({"cfg_scale": float("nan")}, "guidance scale is nan"),
        ({"cfg_scale": -1.0}, "guidance scale is -1"),
        ({"cfg_channels": 0}, "cfg_channels is 0"),
        ({"cfg_interval": (500, 100)}, "cfg_interval is 500 to 100"),
        ({"cfg_interval": (0, 1000)}, "cfg_interval is 0 to 1000"),
    ],
)
def test_invalid_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_an_error(value: float) -> None:
    model = pixel_model()
    config = SamplingConfig("ddim", "2")
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[3] = value
    assert generate(model, [0, 1], config).isfinite().all()
    with pytest.raises(UserError, match=r"image 1 of the batch \(class 3\) has NaN or Inf; choose a smaller guidance"):
        generate(model, [0, 3], config)


def test_a_decoder_that_returns_nan_is_an_error() -> None:
    decoder = Squash()
    decoder.decode = lambda x: x / 0 * 0  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"image 0 .* has NaN or Inf after the autoencoder none; choose"):
        generate_images(pixel_model(), [0], SamplingConfig("ddim", "2"), autoencoder=decoder)  # type: ignore[arg-type]


def test_guidance_needs_a_null_class() -> None:
    model = pixel_model(has_null_class=False)
    assert generate(model, [4], SamplingConfig("ddim", "2", cfg_scale=1)).isfinite().all()
    with pytest.raises(UserError, match="no null class, so it cannot be guided, and the guidance scale is 4; choose 1"):
        generate(model, [4], SamplingConfig("ddim", "2", cfg_scale=4))
