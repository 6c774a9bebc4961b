"""Image folders, a tiny network in place of Inception, and Inception with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from svdit.evaluation.inception import Extractor, random_extractor
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()  # the tests import torch_fidelity as an oracle


class TinyNetwork:
    """Three seeded random layers of the image's 4 × 4 means: the interface that `extract` needs, in microseconds.

    Computed in float64, so that the float32 features do not depend on the batch size, whatever the processor.
    """

    widths = {"pool": 16, "spatial": 12, "logits": 5}  # noqa: RUF012

    def __init__(self, seed: int = 0, name: str = "inception", digest: str = "tiny") -> None:
        self.name, self.digest, self.comparable = name, digest, name == "inception"
        stream = torch.Generator().manual_seed(seed)
        self.layers = {key: torch.randn(48, width, generator=stream).double() for key, width in self.widths.items()}
        self.seen = 0  # number of images

    def to(self, device: torch.device) -> "TinyNetwork":
        self.layers = {key: layer.to(device) for key, layer in self.layers.items()}
        return self

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        self.seen += len(pixels)
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.double() / 64 - 2, 4).flatten(1)
        return {key: torch.relu(small @ layer).float() for key, layer in self.layers.items()}


class Overflowing(TinyNetwork):
    """Bright images have features that are not finite."""

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        features = super().__call__(pixels)
        features["spatial"][pixels.double().mean((1, 2, 3)) > 250, 3] = torch.inf
        return features


def make_images(n: int, size: int = 12, seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """uint8 (n, size, size, 3) with structure that repeats by index and, on top, noise that does not."""
    base = np.random.RandomState(seed).randint(0, 256, (n, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    grain = np.random.RandomState(seed + 1000).randn(n, size, size, 3) * noise
    return np.clip(base + grain, 0, 255).astype(np.uint8)


def write_folder(folder: Path, images: np.ndarray, names: list[str] | None = None) -> Path:
    for i, image in enumerate(images):
        path = folder / (names[i] if names else f"{i:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.fixture
def tiny_network() -> TinyNetwork:
    return TinyNetwork()


@pytest.fixture(scope="session")
def random_network() -> Extractor:
    return random_extractor()


@pytest.fixture(scope="session")
def plain_network() -> Extractor:
    return random_extractor(fast=False)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory, plain_network: Extractor) -> Path:
    """The random weights as a file of the published layout."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(plain_network.network.state_dict(), path)
    return path
