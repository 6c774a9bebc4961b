"""A batch of pictures, against published runs."""

import copy
import itertools

import pytest
import torch
from conftest import Golden, relative
from pixels import Squash, pixel_model
from torch import Tensor

from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import SAMPLERS
from svdit.errors import UserError
from svdit.sampling.batch import SamplingConfig, generate, pictures

CPU = torch.device("cpu")


PIXEL_MODEL = pixel_model()


def test_ddpm_from_recorded_noise_equals_published(golden: Golden) -> None:
    z = golden["z_10"]
    draws = itertools.chain([z], (noise[: len(z)] for noise in golden["ddpm_noise_10"]))
    seen: list[int] = []
    x = generate(
        golden.model,
        golden["y"][: len(z)],
        lambda: next(draws),
        SamplingConfig(steps="10", cfg_scale=4.0),
        callback=lambda done, _: seen.append(done),
    )
    assert relative(x, golden["ddpm_10"]) < 1e-4
    assert seen == list(range(1, 11))
    assert next(draws, None) is None
    assert not x.requires_grad


def test_ddim_from_recorded_noise_equals_published(golden: Golden) -> None:
    z = golden["z_10"]
    config = SamplingConfig("ddim", "10", cfg_scale=4.0)
    x = generate(golden.model, golden["y"][: len(z)], iter([z]).__next__, config)
    assert relative(x, golden["ddim_10"]) < 1e-4


@pytest.mark.gpu
def test_a_gpu_walks_the_same_way(golden_learned: Golden) -> None:
    z, device = golden_learned["z_10"], torch.device("cuda")
    draws = (noise[: len(z)].to(device) for noise in [z, *golden_learned["ddpm_noise_10"]])
    model = copy.deepcopy(golden_learned.model).to(device)
    x = generate(model, golden_learned["y"][: len(z)], draws.__next__, SamplingConfig(steps="10"))
    assert relative(x.cpu(), golden_learned["ddpm_10"]) < 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_of_every_sampler(sampler: str) -> None:
    def drawn(config: SamplingConfig) -> Tensor:
        noise = image_noise(0, range(3), (3, 8, 8), CPU)
        return torch.from_numpy(pictures(PIXEL_MODEL, Squash(), torch.tensor([0, 4, 2]), noise, config))  # type: ignore[arg-type]

    guided, all_guided = (drawn(SamplingConfig(sampler, "4", cfg_channels=k)) for k in (1, None))
    plain = drawn(SamplingConfig(sampler, "4", cfg_scale=1))
    assert plain.shape == (3, 8, 8, 3)
    assert plain.dtype == torch.uint8
    assert len({bytes(x.numpy()) for x in (plain, guided, all_guided)}) == 3


@pytest.mark.parametrize("label", [-1, 5, 1000])  # 5 is the null class
def test_an_unknown_class_is_named(label: int) -> None:
    with pytest.raises(UserError, match=rf"no class {label}; this model has the classes 0 to 4"):
        generate(PIXEL_MODEL, torch.tensor([0, label]), lambda: torch.zeros(2, 3, 8, 8), SamplingConfig(steps="2"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "euler"}, "'euler'; choose one of ddpm, ddim"),
        ({"steps": "0"}, "'0' is not a number of sampling steps"),
        ({"steps": "1001"}, "1001 sampling steps"),
        ({"cfg_scale": float("nan")}, "guidance scale cannot be nan"),
        ({"cfg_scale": -1.0}, "guidance scale cannot be -1"),
        ({"cfg_channels": 0}, "cannot act on 0 channels"),
        ({"cfg_interval": (500, 100)}, "cannot act from timestep 500 to 100"),
        ({"cfg_interval": (0, 1000)}, "cannot act from timestep 0 to 1000"),
    ],
)
def test_impossible_configurations_say_why(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SamplingConfig(**options)  # type: ignore[arg-type]
