"""Against torch-fidelity's extractor with the same weights, and against hooks on its layers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from svdit.errors import UserError
from svdit.evaluation.frechet import frechet_distance
from svdit.evaluation.inception import Extractor, load_extractor, resize, resize_fast
from svdit.evaluation.statistics import Moments


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    stream = np.random.RandomState(0)
    coarse = stream.randint(0, 256, (4, 3, 8, 8))
    return torch.from_numpy(coarse.repeat(5, 2).repeat(5, 3).astype(np.uint8))


@pytest.fixture(scope="module")
def stock(weights_file: Path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    network = FeatureExtractorInceptionV3("stock", ["2048", "logits_unbiased"], str(weights_file))
    with torch.inference_mode():
        return dict(zip(("pool", "logits"), network(pixels), strict=True))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_plain_network_is_bit_equal_to_torch_fidelitys(
    weights_file: Path, pixels: torch.Tensor, stock: dict[str, torch.Tensor]
):
    network = load_extractor(torch.load(weights_file), "digest", fast=False)
    with torch.inference_mode():
        features = network(pixels)
    for name, expected in stock.items():
        assert torch.equal(features[name], expected)
    assert {name: x.shape[1] for name, x in features.items()} == network.widths
    assert (network.name, network.digest, network.comparable) == ("inception", "digest", True)


def test_fast_network_differs_by_rounding_only(
    random_network: Extractor, pixels: torch.Tensor, stock: dict[str, torch.Tensor]
):
    with torch.inference_mode():
        features = random_network(pixels)
    for name, expected in stock.items():
        # About 100 layers in sequence, each rounding to 2⁻²⁴ of its output: at most 6e-6 if all errors add up.
        assert 0 < relative(features[name], expected) < 1e-5
    assert not random_network.comparable


def test_spatial_features_are_the_first_branch_of_mixed_6_after_its_relu_channel_last(
    plain_network: Extractor, pixels: torch.Tensor
):
    """`mixed_6/conv` of the TensorFlow graph is Mixed_6d.branch1x1, convolution, batch norm and ReLU."""
    seen: list[torch.Tensor] = []
    branch = plain_network.network.Mixed_6d.branch1x1
    handle = branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        spatial = plain_network(pixels)["spatial"]
    handle.remove()
    for n, h, w, c in ((0, 0, 0, 0), (1, 3, 5, 2), (3, 16, 16, 6)):
        assert spatial[n, (h * 17 + w) * 7 + c] == seen[0][n, c, h, w]
    assert torch.equal(spatial.view(4, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    assert spatial.min() == 0
    assert (spatial > 0).float().mean() > 0.1


def test_the_layout_of_spatial_features_matters():
    """Permuting both sides does not change the distance; permuting one side separates a set from itself."""
    x = torch.from_numpy(np.random.RandomState(0).randn(40, 3 * 3 * 7).cumsum(1).astype(np.float32))
    permuted = x.view(40, 3, 3, 7).permute(0, 3, 1, 2).flatten(1)
    a, b = (Moments(63).add(y).gaussian() for y in (x, permuted))
    assert abs(frechet_distance(a, a)) < 1e-6
    assert abs(frechet_distance(b, b)) < 1e-6
    assert frechet_distance(a, b) > 1


@pytest.mark.parametrize("size", [8, 64, 256, 299, 400])
@pytest.mark.parametrize("rule", [resize, resize_fast])
def test_resize_follows_tensorflow_1(size: int, rule: Callable[[torch.Tensor], torch.Tensor]):
    """Output i is the input at i · size / 299: no half-pixel offset, the last pixel repeated."""
    ramp = torch.arange(size, dtype=torch.float32).expand(1, 3, size, size)
    expected = (torch.arange(299) * (size / 299)).clamp(max=size - 1)
    torch.testing.assert_close(rule(ramp)[0, 0, 7], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rule(ramp.mT)[0, 2, :, 9], expected, atol=1e-4, rtol=0)


def test_random_weights_are_a_fixed_stream(plain_network: Extractor, random_network: Extractor):
    first = np.random.RandomState(0).standard_normal(864) * np.sqrt(2 / 27)
    np.testing.assert_allclose(plain_network.network.Conv2d_1a_3x3.conv.weight.flatten(), first, rtol=1e-6)
    assert plain_network.digest == random_network.digest
    assert (plain_network.name, plain_network.comparable) == ("random", False)


def test_other_weights_are_refused():
    with pytest.raises(UserError, match="not the 2015 Inception weights"):
        load_extractor({"a": torch.ones(1)}, "digest")
