"""One pass: order, sums and rows; what is kept, and when it is not believed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from svdit.errors import UserError
from svdit.evaluation.features import Features, cache_key, extract, features_folder
from svdit.evaluation.sources import Source, open_source

from .conftest import TinyNetwork, pictures, write_folder

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(write_folder(tmp_path / "images", pictures(7)))


def run(
    source: Source, network: TinyNetwork, folder: Path, keep: tuple[str, ...] = ("pool",), batch: int = 3
) -> Features:
    indices = np.array([0, 2, 3, 5, 6])
    return extract(source, indices, network, keep, folder, CPU, batch)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_rows_and_sums_are_the_networks_in_order(source: Source, tiny_network: TinyNetwork, tmp_path: Path, batch: int):
    features = run(source, tiny_network, tmp_path / "f", ("pool", "logits"), batch)
    pixels = torch.from_numpy(pictures(7)[[0, 2, 3, 5, 6]]).permute(0, 3, 1, 2)
    expected = tiny_network(pixels)
    assert sorted(features.rows) == ["logits", "pool"]
    for name, rows in features.rows.items():
        np.testing.assert_allclose(rows, expected[name].numpy(), rtol=1e-5, atol=1e-5)
    for name, gaussian in features.gaussians.items():
        np.testing.assert_allclose(
            gaussian.covariance, np.cov(expected[name].double().numpy(), rowvar=False), atol=1e-5
        )
        assert gaussian.count == 5


def test_finished_features_are_used_again_and_unfinished_are_not(
    source: Source, tiny_network: TinyNetwork, tmp_path: Path
):
    first = run(source, tiny_network, tmp_path / "f")
    again = run(source, tiny_network, tmp_path / "f")
    assert tiny_network.pictures == 5
    np.testing.assert_array_equal(first.rows["pool"], again.rows["pool"])
    np.testing.assert_array_equal(first.gaussians["pool"].covariance, again.gaussians["pool"].covariance)
    run(source, tiny_network, tmp_path / "f", ("pool", "logits"))
    assert tiny_network.pictures == 10  # the logits were not there
    (tmp_path / "f" / "statistics.npz").unlink()
    run(source, tiny_network, tmp_path / "f")
    assert tiny_network.pictures == 15


def test_an_interrupted_pass_leaves_nothing_to_be_believed(source: Source, tmp_path: Path):
    class Breaks(TinyNetwork):
        def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.pictures:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(source, Breaks(), tmp_path / "f")
    assert not (tmp_path / "f").exists()
    whole = TinyNetwork()
    run(source, whole, tmp_path / "f")
    assert whole.pictures == 5


def test_key_changes_with_content_weights_choice_and_format(monkeypatch: pytest.MonkeyPatch):
    some, other = np.arange(3), np.arange(4)
    keys = {
        cache_key("a", TinyNetwork(), some),
        cache_key("b", TinyNetwork(), some),
        cache_key("a", TinyNetwork(digest="other"), some),
        cache_key("a", TinyNetwork(name="random"), some),
        cache_key("a", TinyNetwork(), other),
    }
    assert len(keys) == 5
    assert cache_key("a", TinyNetwork(), some) in keys
    monkeypatch.setattr("svdit.evaluation.features.FORMAT", "features 3")
    assert cache_key("a", TinyNetwork(), some) not in keys


def test_without_a_cache_nothing_stays(source: Source, tiny_network: TinyNetwork):
    with features_folder(None) as folder:
        features = run(source, tiny_network, folder / "x")
        assert (folder / "x").exists()
    assert not folder.exists()
    assert features.rows["pool"].shape == (5, 16)


def test_workers_change_nothing(
    source: Source, tiny_network: TinyNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = run(source, tiny_network, tmp_path / "a")
    monkeypatch.setattr("svdit.evaluation.features.WORKERS_FROM", 1)
    helped = run(source, tiny_network, tmp_path / "b")
    np.testing.assert_array_equal(alone.rows["pool"], helped.rows["pool"])


def test_a_workers_complaint_is_one_sentence(
    source: Source, tiny_network: TinyNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("svdit.evaluation.features.WORKERS_FROM", 1)
    source.files[3].write_text("hello")
    with pytest.raises(UserError, match=r"000003\.png cannot be read as an image") as caught:
        run(source, tiny_network, tmp_path / "f")
    assert "\n" not in str(caught.value)
