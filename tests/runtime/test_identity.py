"""What a quantized model computes for an image does not depend on the images beside it, bit for bit."""

import pytest
import torch
from conftest import randomize
from layers import CONFIGS, USABLE

from svdit.model.dit import DiT, DiTConfig
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling.batch import SamplingConfig, generate
from svdit.sampling.dataset import image_noise

N, CLASSES = 33, 5
BATCHES = (1, 3, 8, 32)


def model_of(config: str) -> DiT:
    """The smallest one whose float products round by their number of rows: 128 wide."""
    model = randomize(DiT(DiTConfig(8, 2, 4, 128, 2, 4, num_classes=CLASSES)))
    assert isinstance(model, DiT)
    x, t, y = inputs()
    quantize_(model, CONFIGS[config], lambda model: model(x, t, y))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, timesteps and labels, of which some pairs are equal."""
    g = torch.Generator().manual_seed(1)
    t = torch.randint(0, 1000, (N,), generator=g)
    t[N // 2 :] = 500
    return torch.randn(N, 4, 8, 8, generator=g), t, torch.randint(0, CLASSES, (N,), generator=g)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backend", USABLE)
def test_a_step_does_not_depend_on_the_batch(config: str, backend: str) -> None:
    fast, together = accelerate(model_of(config), backend), inputs()
    expected = fast(*together)
    assert expected.std() > 0.1
    for size in BATCHES:
        parts = zip(*(tensor.split(size) for tensor in together), strict=True)
        assert torch.equal(torch.cat([fast(*part) for part in parts]), expected), size


@pytest.mark.skipif("cpu" not in USABLE, reason="without a compiler there are no C kernels")
@pytest.mark.parametrize("config", ["w8a8", "w4a4", "w8a16", "w4a8-channel, adaLN left"])
def test_the_c_kernels_depend_on_no_number_of_threads(config: str) -> None:
    fast, expected = accelerate(model_of(config), "cpu"), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected.append(fast(*inputs()))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(other, expected[0]) for other in expected[1:])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_images_do_not_depend_on_the_batch(sampler: str) -> None:
    fast, walk = accelerate(model_of("w8a8")), SamplingConfig(sampler, "10", 1.5)

    def images(indices: range) -> torch.Tensor:
        noise = image_noise(0, indices, (4, 8, 8), torch.device("cpu"))
        return generate(fast, [i % CLASSES for i in indices], walk, noise=noise)

    together = images(range(8))
    assert together.std() > 0.1
    for size in (1, 3):
        parts = [images(range(first, min(first + size, 8))) for first in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), together), size
