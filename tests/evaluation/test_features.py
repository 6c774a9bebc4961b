"""One pass over the images: order, sums, rows, the cache, and interrupted passes."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from svdit.errors import UserError
from svdit.evaluation import features as extraction
from svdit.evaluation.features import Extraction, Features, cache_key, extract, features_folder
from svdit.evaluation.inputs import open_set
from svdit.evaluation.opening import open_source
from svdit.evaluation.options import Options
from svdit.evaluation.sources import ImageSet

from .conftest import TinyNetwork, make_images, write_folder

CPU = torch.device("cpu")
CHOICE = [0, 2, 3, 5, 6]


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    source = open_source(write_folder(tmp_path / "images", make_images(7)))
    return ImageSet(source, np.array(CHOICE), (12, 12), "content")


def run(
    images: ImageSet, network: TinyNetwork, folder: Path, layers: tuple[str, ...] = ("pool",), batch: int = 3
) -> Features:
    return extract(images, network, layers, Extraction(folder, CPU, batch))


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_rows_are_in_the_order_of_the_source(images: ImageSet, tiny_network: TinyNetwork, tmp_path: Path, batch: int):
    features = run(images, tiny_network, tmp_path / "f", ("pool", "logits"), batch)
    pixels = torch.from_numpy(make_images(7)[CHOICE]).permute(0, 3, 1, 2)
    expected = tiny_network(pixels)
    assert sorted(features.rows) == ["logits", "pool"]
    for name, rows in features.rows.items():
        np.testing.assert_allclose(rows, expected[name].numpy(), rtol=1e-5, atol=1e-5)
    for name, gaussian in features.gaussians.items():
        np.testing.assert_allclose(
            gaussian.covariance, np.cov(expected[name].double().numpy(), rowvar=False), atol=1e-5
        )
        assert gaussian.count == 5


def test_complete_features_are_cached_and_incomplete_ones_are_not(
    images: ImageSet, tiny_network: TinyNetwork, tmp_path: Path
):
    first = run(images, tiny_network, tmp_path / "f")
    again = run(images, tiny_network, tmp_path / "f")
    assert tiny_network.seen == 5
    np.testing.assert_array_equal(first.rows["pool"], again.rows["pool"])
    np.testing.assert_array_equal(first.gaussians["pool"].covariance, again.gaussians["pool"].covariance)
    run(images, tiny_network, tmp_path / "f", ("pool", "logits"))
    assert tiny_network.seen == 10  # the logits were not cached
    (tmp_path / "f" / cache_key(images, tiny_network) / "statistics.npz").unlink()
    run(images, tiny_network, tmp_path / "f")
    assert tiny_network.seen == 15


def test_a_cache_that_cannot_be_written_is_read(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def read_only(folder: Path) -> Path:
        raise UserError(f"cannot write into the folder {folder} (Read-only file system); choose another folder")

    first, network = run(images, TinyNetwork(), tmp_path / "f"), TinyNetwork()
    monkeypatch.setattr("svdit.evaluation.features.writable_folder", read_only)
    kept = set((tmp_path / "f").rglob("*"))
    np.testing.assert_array_equal(run(images, network, tmp_path / "f").rows["pool"], first.rows["pool"])
    assert (network.seen, capsys.readouterr().err) == (0, "")
    more = run(images, network, tmp_path / "f", ("pool", "logits"))
    assert sorted(more.rows) == ["logits", "pool"]
    np.testing.assert_array_equal(more.rows["pool"], first.rows["pool"])
    assert "f (Read-only file system); the features of these images are not kept" in capsys.readouterr().err
    assert set((tmp_path / "f").rglob("*")) == kept


def test_an_interrupted_pass_caches_nothing(images: ImageSet, tmp_path: Path):
    class Breaks(TinyNetwork):
        def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.seen:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(images, Breaks(), tmp_path / "f")
    assert not (tmp_path / "f" / cache_key(images, TinyNetwork())).exists()
    whole = TinyNetwork()
    run(images, whole, tmp_path / "f")
    assert whole.seen == 5


@pytest.mark.parametrize("killed", [False, True])
def test_two_runs_with_one_cache_do_not_meet(images: ImageSet, tmp_path: Path, killed: bool):
    """The second run begins in the middle of the first, and is complete or killed before the first continues."""

    class Killed(TinyNetwork):
        def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            if killed and self.seen:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    class Meets(TinyNetwork):
        def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.seen == 3:
                with suppress(KeyboardInterrupt):
                    run(images, Killed(), tmp_path / "f")
            return super().__call__(pixels)

    truth = run(images, TinyNetwork(), tmp_path / "alone")
    first = run(images, Meets(), tmp_path / "f")
    later = run(images, TinyNetwork(), tmp_path / "f")
    for features in (first, later):
        np.testing.assert_array_equal(features.rows["pool"], truth.rows["pool"])
        np.testing.assert_array_equal(features.gaussians["pool"].mean, truth.gaussians["pool"].mean)
    assert [path.name for path in (tmp_path / "f").iterdir()] == [cache_key(images, TinyNetwork())]


def test_rows_of_other_images_are_computed_again(images: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    truth = run(images, TinyNetwork(), tmp_path)
    path = tmp_path / cache_key(images, TinyNetwork()) / "pool.npy"
    truth_rows = truth.rows["pool"].copy()
    np.save(path, truth_rows[::-1])
    again = run(images, TinyNetwork(), tmp_path)
    np.testing.assert_array_equal(again.rows["pool"], truth_rows)
    assert capsys.readouterr().err.count("damaged (pool.npy does not match its checksum); they are computed again") == 1
    network = TinyNetwork()
    run(images, network, tmp_path)
    assert network.seen == 0


def test_key_changes_with_content_weights_choice_and_format(images: ImageSet, monkeypatch: pytest.MonkeyPatch):
    keys = {
        cache_key(images, TinyNetwork()),
        cache_key(replace(images, content="other"), TinyNetwork()),
        cache_key(images, TinyNetwork(digest="other")),
        cache_key(images, TinyNetwork(name="random")),
        cache_key(replace(images, indices=np.arange(4)), TinyNetwork()),
    }
    assert len(keys) == 5
    assert cache_key(images, TinyNetwork()) in keys
    monkeypatch.setattr("svdit.evaluation.features.FORMAT", "another")
    assert cache_key(images, TinyNetwork()) not in keys


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_features_of_images_that_change_meanwhile_are_not_kept(tiny_network: TinyNetwork, tmp_path: Path, form: str):
    def write(first: int) -> Path:
        if form == "npz":
            np.savez(tmp_path / "images.npz", arr_0=make_images(7)[::first])
            return tmp_path / "images.npz"
        return write_folder(tmp_path / "images", make_images(7)[::first])

    images = open_set(write(1), Options(device=CPU))
    write(-1)
    with pytest.raises(UserError, match=r"images.* changed while it was read; run this again"):
        run(images, tiny_network, tmp_path / "f")
    assert not list((tmp_path / "f").iterdir())
    run(open_set(tmp_path / images.source.path.name, Options(device=CPU)), tiny_network, tmp_path / "f")


def test_without_a_cache_the_files_are_removed(images: ImageSet, tiny_network: TinyNetwork):
    with features_folder(None) as folder:
        features = run(images, tiny_network, folder)
        assert list(folder.iterdir())
    assert not folder.exists()
    assert features.rows["pool"].shape == (5, 16)


def test_workers_do_not_change_the_features(
    images: ImageSet, tiny_network: TinyNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = run(images, tiny_network, tmp_path / "a")
    monkeypatch.setattr("svdit.evaluation.features.WORKERS_FROM", 1)
    parallel = run(images, tiny_network, tmp_path / "b")
    np.testing.assert_array_equal(alone.rows["pool"], parallel.rows["pool"])


@pytest.mark.parametrize(("batches", "workers"), [(0, 0), (2, 0), (3, 1), (8, 2), (1000, 3)])
def test_workers_leave_space_in_shared_memory(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, batches: int, workers: int
):
    """Docker gives 64 MB; a worker has two batches waiting and one in use."""
    monkeypatch.setattr(extraction, "WORKERS_FROM", 1)
    monkeypatch.setattr(extraction, "SHARED", Path("/"))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    pixels, how = extraction._Pixels(images), Extraction(Path("/"), torch.device("cuda"), 7)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=batches * 7 * pixels[0][1].nbytes))
    assert extraction._workers(pixels, how) == workers


def test_an_error_in_a_worker_is_one_sentence(
    images: ImageSet, tiny_network: TinyNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("svdit.evaluation.features.WORKERS_FROM", 1)
    images.source.files[3].write_text("hello")
    with pytest.raises(UserError, match=r"000003\.png cannot be read as an image") as caught:
        run(images, tiny_network, tmp_path / "f")
    assert "\n" not in str(caught.value)


def test_full_precision_is_for_features_only(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`generate` allows TF32 for its model in the same process."""

    def precision() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    class Notes(TinyNetwork):
        def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.add(precision())
            return super().__call__(pixels)

    seen, earlier = set[tuple[str, bool]](), precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        run(images, Notes(), tmp_path)
        assert seen == {("highest", False)}
        assert precision() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(earlier[0])
