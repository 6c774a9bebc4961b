"""Measuring images on a GPU: features, every metric, pairs; the CPU's numbers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from devices.fake_cuda import FakeCuda, value
from PIL import Image
from torch import Tensor

from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.inception import random_extractor
from svdit.evaluation.neighbours import neighbour_metrics
from svdit.evaluation.options import METRICS, Options
from svdit.evaluation.paired import LPIPS_URLS, load_lpips
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
import torchvision  # noqa: E402
from torch_fidelity import sample_similarity_lpips  # noqa: E402


class Network(torch.nn.Module):
    """Three random layers of the image's 4 × 4 mean."""

    widths = {"pool": 16, "spatial": 12, "logits": 5}  # noqa: RUF012
    name, digest, comparable = "inception", "tiny", True

    def __init__(self) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(0)
        for name, width in self.widths.items():
            self.register_buffer(name, torch.randn(48, width, generator=stream))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 64 - 2, 4).flatten(1)
        return {name: torch.relu(small @ self.get_buffer(name)) for name in self.widths}


def folder(path: Path, seed: int) -> Path:
    """40 images of 12 × 12, which the seed changes a little."""
    path.mkdir()
    base = np.random.RandomState(0).randint(0, 256, (40, 4, 4, 3)).repeat(3, 1).repeat(3, 2)
    noise = np.random.RandomState(seed).randn(40, 12, 12, 3) * 4
    for i, image in enumerate(np.clip(base + noise, 0, 255).astype(np.uint8)):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


def test_every_metric(tmp_path: Path) -> None:
    """But LPIPS, below, and FID∞, which needs 4000 images and is computed by NumPy."""
    real, fake, pair = (folder(tmp_path / name, seed) for seed, name in enumerate(("real", "fake", "pair")))
    metrics = tuple(name for name in METRICS if name not in ("lpips", "fid_inf"))

    def options(device: torch.device) -> Options:
        return Options(metrics, paired=pair, compare=pair, device=device, batch_size=16)

    expected = evaluate(real, fake, Network(), options(torch.device("cpu")))
    with FakeCuda():
        report = evaluate(real, fake, Network(), options(torch.device("cuda", 0)))
    assert report.failed == expected.failed == ()
    values, expected_values = ({name: e.value for name, e in each.metrics.items()} for each in (report, expected))
    assert values == pytest.approx(expected_values, rel=1e-6)
    assert len(values) > 12


def test_the_inception_network() -> None:
    network, pixels = random_extractor(), torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(pixels)
    with FakeCuda():
        found = network.to("cuda")(pixels.to("cuda"))
        assert all(x.is_cuda for x in found.values())
    for name, x in expected.items():
        assert torch.allclose(value(found[name]), x, rtol=1e-4, atol=1e-5 * float(x.abs().max())), name


def test_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity's network, with random weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    for url in LPIPS_URLS:
        torch.save({}, tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    features = torchvision.models.vgg.make_layers(plan).eval()
    state = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    monkeypatch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *args, **kwargs: state)
    vgg = SimpleNamespace(features=features)
    monkeypatch.setattr(sample_similarity_lpips, "torchvision_load_pretrained_vgg16", lambda: vgg)
    a, b = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    expected = load_lpips(torch.device("cpu"))(a, b)
    with FakeCuda():
        assert load_lpips(torch.device("cuda", 0))(a, b) == pytest.approx(expected, rel=1e-6)


def test_neighbours_in_tiles() -> None:
    real, fake = torch.randn(40, 8), torch.randn(30, 8)
    blocks = np.arange(30) % 5
    expected = neighbour_metrics(real, fake, blocks, rows=16, columns=7)
    with FakeCuda():
        found = neighbour_metrics(real.to("cuda"), fake.to("cuda"), blocks, rows=16, columns=7)
    assert {k: (e.value, e.leave_out) for k, e in found.items()} == {
        k: (e.value, e.leave_out) for k, e in expected.items()
    }
