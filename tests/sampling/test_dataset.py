"""Many pictures: the same for every batch size and number of processes, never half, never mixed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pixels
import pytest
from pixels import ROOT, SEED, draw

from svdit import images
from svdit.errors import UserError
from svdit.sampling import dataset
from svdit.sampling.dataset import LABEL_POLICIES

COUNT = 7
KEYS = {
    *("tool", "version", "model", "checkpoint", "checkpoint_sha256", "quantization", "precision", "image_size"),
    *("num_images", "num_classes", "label_policy", "labels", "seed", "sampler", "steps", "cfg_scale"),
    *("cfg_channels", "cfg_interval", "vae", "files"),
}


def arrays(npz: Path) -> np.ndarray:
    with np.load(npz) as archive:
        return archive["arr_0"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("reference") / "set", batch_size=COUNT)


def same_pictures(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to a float's last bits: no pixel is off by more than one grey level, and hardly any is."""
    off = np.abs(a.astype(int) - b.astype(int))
    return bool(off.max() <= 1 and (off > 0).mean() < 0.01)


def test_npz_holds_the_pngs_in_adms_layout(reference: Path) -> None:
    pictures = arrays(reference)
    assert pictures.shape == (COUNT, 8, 8, 3)
    assert pictures.dtype == np.uint8
    assert np.mean((pictures > 0) & (pictures < 255)) > 0.9, "a clipped picture hides differences"
    files = images.list_images(reference.with_suffix(""))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.array_equal(pictures, np.stack([images.read_image(file) for file in files]))
    assert len({picture.tobytes() for picture in pictures}) == COUNT


def test_manifest_says_how_the_pictures_came_about(reference: Path) -> None:
    manifest = json.loads((reference.with_suffix("") / "manifest.json").read_text())
    assert set(manifest) == KEYS
    assert manifest["labels"] == LABEL_POLICIES["random"](SEED, range(COUNT), 5)
    assert (manifest["image_size"], manifest["num_classes"], manifest["cfg_scale"]) == (8, 5, 1.5)


def test_three_processes_draw_what_one_does(reference: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    folder = tmp_path / "set"
    subprocess.run(
        [*torchrun, pixels.__file__, str(folder), str(COUNT), "2"],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    notes = [json.loads((folder / f"noise-{r}.json").read_text()) for r in range(3)]
    assert [list(map(int, note)) for note in notes] == [[0, 3, 6], [1, 4], [2, 5]]
    alone: dict[int, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "image_noise", pixels.noting(alone))
        draw(tmp_path / "alone", batch_size=4)
    assert {int(i): draws for note in notes for i, draws in note.items()} == alone  # bit for bit
    assert all(len(draws) == 5 for draws in alone.values())
    assert same_pictures(arrays(folder.with_suffix(".npz")), arrays(reference))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_changes_no_picture(reference: Path, tmp_path: Path, batch_size: int) -> None:
    assert same_pictures(arrays(draw(tmp_path / "set", batch_size=batch_size)), arrays(reference))


def test_another_seed_changes_every_picture(reference: Path, tmp_path: Path) -> None:
    other = arrays(draw(tmp_path / "set", seed=12))
    assert not any(same_pictures(a, b) for a, b in zip(other, arrays(reference), strict=True))


def test_a_stopped_run_continues_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, written = tmp_path / "set", []
    genuine = images.write_png

    def write_png(path: Path, pixels: images.Pixels) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path.name)
        genuine(path, pixels)

    monkeypatch.setattr(images, "write_png", write_png)
    with pytest.raises(KeyboardInterrupt):
        draw(folder)
    assert not folder.with_suffix(".npz").exists()
    monkeypatch.setattr(images, "write_png", genuine)
    kept = np.zeros((8, 8, 3), np.uint8)
    images.write_png(folder / "000001.png", kept)  # a mark: whoever draws it again removes it
    told: list[tuple[float, int]] = []
    pictures = arrays(draw(folder, progress=lambda done, total: told.append((done, total))))
    assert np.array_equal(pictures[1], kept)
    assert told[0] == (0.75, 3)
    assert told[-1] == (3, 3)


def test_a_set_can_grow_but_not_shrink(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert len(arrays(draw(folder, count=4))) == 4
    assert same_pictures(arrays(draw(folder, origin={"checkpoint": "moved.pt"})), arrays(reference))
    with pytest.raises(UserError, match="a run of 7 pictures, this one has 4"):
        draw(folder, count=4)


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    before = draw(tmp_path / "set").stat()
    after = draw(tmp_path / "set").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 12}, "seed 11, this one has 12"),
        ({"label_policy": "balanced"}, "label_policy 'random', this one has 'balanced'"),
        ({"origin": {"checkpoint_sha256": "ab"}}, "checkpoint_sha256 '', this one has 'ab'"),
        ({"origin": {"quantization": {"mode": "rtn"}}}, "quantization None, this one has {'mode': 'rtn'}"),
    ],
)
def test_another_runs_folder_is_refused(reference: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        draw(reference.with_suffix(""), **change)
    assert said in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_foreign_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is not a manifest of this tool"):
        draw(tmp_path)


def test_foreign_pictures_are_refused(tmp_path: Path) -> None:
    images.write_png(tmp_path / "cat.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"holds 1 pictures and no manifest\.json"):
        draw(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into the folder .*file"):
        draw(tmp_path / "file" / "set")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 0}, "the number of pictures cannot be 0"),
        ({"batch_size": 0}, "the batch size cannot be 0"),
        ({"seed": -1}, "the seed cannot be -1"),
        ({"label_policy": "odd"}, "no label policy 'odd'; choose one of random, balanced"),
    ],
)
def test_impossible_options_say_why(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        draw(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_balanced_labels_go_round() -> None:
    assert LABEL_POLICIES["balanced"](3, range(7), 3) == [0, 1, 2, 0, 1, 2, 0]
