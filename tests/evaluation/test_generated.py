"""Sets as `generate` writes them: every form has the same metrics, protocol, labels and counterparts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pixels import CONFIG, SEED, Squash, pixel_model

from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.opening import open_source
from svdit.evaluation.options import Options
from svdit.sampling import sinks
from svdit.sampling.dataset import generate_dataset
from svdit.sampling.sinks import SINKS

from .conftest import TinyNetwork

COUNT = 14


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "SHARD", 5)


def generated(folder: Path, form: str, change: float = 0) -> Path:
    """A set of one noise by a model whose weights are changed; returns what `evaluate` is called with."""
    model = pixel_model()
    with torch.no_grad():
        model.x_embedder.proj.weight.mul_(1 + change)
    npz = generate_dataset(model, folder, COUNT, CONFIG, autoencoder=Squash(), seed=SEED, sink=form)
    return Path(npz) if form == "npz" else folder


@pytest.mark.parametrize("form", SINKS)
def test_every_form_has_the_same_metrics_protocol_and_counterparts(
    tmp_path: Path, tiny_network: TinyNetwork, form: str
) -> None:
    """Counterparts are found in the other form without --paired_dir: both manifests record the same noise."""
    expected, of_fake, of_real = (
        evaluate(
            generated(tmp_path / f"{i}" / "full", real),
            generated(tmp_path / f"{i}" / "quantized", fake, change=0.1),
            network=tiny_network,
            options=Options(num_images=10),
        )
        for i, (real, fake) in enumerate((("png", "png"), ("png", form), (form, "png")))
    )
    assert 5 < (expected.metrics["psnr"].value or 0) < 60
    assert expected.protocol["sample_steps"] == CONFIG.steps
    assert of_fake.metrics == of_real.metrics == expected.metrics
    assert of_fake.protocol == expected.protocol
    assert of_real.protocol == expected.protocol or form == "npz"  # which has another content hash


@pytest.mark.parametrize("form", SINKS)
def test_a_set_has_its_labels_names_and_settings(tmp_path: Path, form: str) -> None:
    source, png = (open_source(generated(tmp_path / f"{one}.x", one)) for one in (form, "png"))
    assert source.labels == png.labels == tuple(png.manifest["labels"])
    assert source.names == png.names == tuple(f"{i:06d}" for i in range(COUNT))
    assert source.manifest == {**png.manifest, "storage": form}
    for i in range(COUNT):
        np.testing.assert_array_equal(source.read(i), png.read(i))


def test_an_unfinished_set_of_shards_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = open_source(generated(tmp_path / "x", "tar")).labels
    (tmp_path / "x" / "000001.tar").unlink()
    source = open_source(tmp_path / "x")
    assert f"{tmp_path / 'x'} contains 9 of the 14 images in its manifest" in capsys.readouterr().err
    assert labels is not None and source.labels == (*labels[:5], *labels[10:])
