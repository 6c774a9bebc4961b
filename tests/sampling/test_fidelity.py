"""PSNR of generated images to those of another model, and the numbers of the images that each purpose uses."""

import math

import numpy as np
import pytest
import torch
from conftest import relative
from pixels import pixel_model
from skimage.metrics import peak_signal_noise_ratio

from svdit.diffusion.noise import image_labels, image_noise
from svdit.model.config import FLOW
from svdit.model.dit import DiT
from svdit.sampling import numbers
from svdit.sampling.batch import generate
from svdit.sampling.config import SamplingConfig
from svdit.sampling.fidelity import CAP, Fidelity, images

WALK = SamplingConfig("ddim", "3", 1.5)
FIRST, COUNT = numbers.COMPARED, 5


def other_than(model: DiT) -> DiT:
    """The same model with slightly larger weights."""
    other = DiT(model.config).eval()
    other.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()})
    return other


def drawn(model: DiT, walk: SamplingConfig = WALK) -> torch.Tensor:
    """The images, all at once."""
    indices = range(FIRST, FIRST + COUNT)
    noise = image_noise(7, indices, model.input_shape, torch.device("cpu"))
    return generate(model, image_labels(7, indices, model.config.num_classes), walk, noise=noise).detach()


def test_it_is_the_psnr_of_pixels() -> None:
    model, other = pixel_model(in_channels=3), other_than(pixel_model(in_channels=3))
    measured = Fidelity(model, WALK, FIRST, images=COUNT, batch_size=2, seed=7)(other)
    one, two = (drawn(each).clamp(-1, 1).double().numpy() for each in (model, other))
    assert measured.pooled == pytest.approx(peak_signal_noise_ratio(one, two, data_range=2), abs=1e-3)
    with np.errstate(divide="ignore"):  # of equal images
        each = [min(CAP, peak_signal_noise_ratio(a, b, data_range=2)) for a, b in zip(one, two, strict=True)]
    assert measured.psnr == pytest.approx(np.mean(each), abs=1e-3)
    assert measured.psnr > measured.pooled


def test_that_of_latents_is_a_signal_to_noise_ratio() -> None:
    model, other = pixel_model(in_channels=4), other_than(pixel_model(in_channels=4))
    measured = Fidelity(model, WALK, FIRST, images=COUNT, seed=7)(other)
    one, two = drawn(model).double(), drawn(other).double()
    expected = 10 * math.log10(float(one.square().sum() / (one - two).square().sum()))
    assert measured.pooled == pytest.approx(expected, abs=1e-3)


def test_equal_images_have_the_cap_and_steps_are_counted() -> None:
    model, ticks = pixel_model(in_channels=3), []
    fidelity = Fidelity(model, WALK, FIRST, images=COUNT, batch_size=2, progress=lambda *tick: ticks.append(tick))
    assert ticks == [(done, 9) for done in range(1, 10)]
    assert fidelity(model) == (CAP, CAP)


def test_the_images_are_those_of_their_numbers() -> None:
    model, walk = pixel_model(in_channels=4, family="sit", **FLOW), SamplingConfig("euler", "4", 1.5)
    parts = [images(model, walk, range(FIRST + i, FIRST + i + 1), seed=7) for i in range(COUNT)]
    assert relative(torch.cat(parts), drawn(model, walk)) < 1e-5


def test_no_two_purposes_share_images() -> None:
    firsts = sorted(value for name, value in vars(numbers).items() if name.isupper())
    assert len(firsts) == 7
    assert all(later - earlier >= 2**32 for earlier, later in zip([0, *firsts], firsts, strict=False))
