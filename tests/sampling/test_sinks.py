"""Every form of a set holds the same images; all resume, grow, and find damage and strays."""

import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from pixels import SEED, draw, interrupt_at
from worlds import in_world

from svdit import distributed, images
from svdit.errors import UserError
from svdit.sampling import sinks
from svdit.sampling.dataset import LABEL_POLICIES
from svdit.sampling.parts import Parts
from svdit.sampling.sinks import SINKS, PngFiles
from svdit.storage.tar import tar_members, write_tar

COUNT = 7
IN_PARTS = sorted(SINKS.keys() - {"png"})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "SHARD", 4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return arrays(draw(tmp_path_factory.mktemp("reference") / "set"))


def arrays(npz: Path) -> np.ndarray:
    with np.load(npz) as archive:
        return archive["arr_0"]


def visible(folder: Path) -> list[str]:
    """The files of the set, without locks."""
    everything = [path for path in folder.parent.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted(str(path.relative_to(folder.parent)) for path in everything)


def expected(form: str, count: int = COUNT) -> list[str]:
    """The files of a complete set."""
    files = {
        "png": [f"set/{i:06d}.png" for i in range(count)],
        "tar": [f"set/{k:06d}.tar" for k in range(-(-count // 4))],
        "npz": [],
    }
    return sorted([*files[form], "set/manifest.json", "set.npz"])


@pytest.mark.parametrize("form", SINKS)
def test_every_form_holds_the_same_images(tmp_path: Path, reference: np.ndarray, form: str) -> None:
    folder = tmp_path / "set"
    assert np.array_equal(arrays(draw(folder, sink=form)), reference)
    assert visible(folder) == expected(form)
    assert json.loads((folder / "manifest.json").read_text())["storage"] == form
    before = folder.with_suffix(".npz").stat().st_mtime_ns
    draw(folder, sink=form, progress=interrupt_at(0))  # nothing is left to do
    assert folder.with_suffix(".npz").stat().st_mtime_ns == before


@pytest.mark.parametrize("form", IN_PARTS)
def test_processes_share_a_set(tmp_path: Path, reference: np.ndarray, form: str) -> None:
    paths = in_world(3, lambda: draw(tmp_path / "set", sink=form, batch_size=2))
    assert paths == [tmp_path / "set.npz"] * 3
    assert np.abs(arrays(paths[0]).astype(int) - reference).max() <= 1
    assert visible(tmp_path / "set") == expected(form)


@pytest.mark.parametrize("form", SINKS)
def test_an_interrupted_set_keeps_its_batches(tmp_path: Path, reference: np.ndarray, form: str) -> None:
    """The second run draws the rest in batches of another size."""
    folder, drawn = tmp_path / "set", list[float]()
    with pytest.raises(KeyboardInterrupt):
        draw(folder, sink=form, progress=interrupt_at(4.5))
    assert not folder.with_suffix(".npz").exists()
    resumed = draw(folder, sink=form, batch_size=2, progress=lambda done, total: drawn.append(done))
    assert drawn[0] == 3.5  # three are there, and a quarter of the steps of two are done
    assert np.array_equal(arrays(resumed), reference)
    assert visible(folder) == expected(form)


@pytest.mark.parametrize("form", SINKS)
@pytest.mark.parametrize("interrupted", [True, False], ids=["interrupted", "complete"])
def test_images_without_a_manifest_are_not_taken_for_those_of_this_set(
    tmp_path: Path, reference: np.ndarray, form: str, interrupted: bool
) -> None:
    folder = tmp_path / "set"
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            draw(folder, sink=form, seed=SEED + 1, label_policy="balanced", progress=interrupt_at(4.5))
    else:
        draw(folder, sink=form, seed=SEED + 1, label_policy="balanced")
    (folder / "manifest.json").unlink()
    if form == "npz" and not interrupted:  # the folder is empty
        assert np.array_equal(arrays(draw(folder, sink=form)), reference)
        assert (tmp_path / "set.other.npz").exists()
        return
    with pytest.raises(UserError, match=r"contains .*00000\d\.\w+ but no manifest\.json; choose an empty folder"):
        draw(folder, sink=form)


def test_a_deleted_set_that_was_to_grow_is_not_taken_up(tmp_path: Path, reference: np.ndarray) -> None:
    folder = tmp_path / "set"
    draw(folder, count=3, sink="npz", seed=SEED + 1)
    with pytest.raises(KeyboardInterrupt):
        draw(folder, sink="npz", seed=SEED + 1, progress=interrupt_at(0))
    shutil.rmtree(folder)
    assert np.array_equal(arrays(draw(folder, sink="npz")), reference)
    assert len(arrays(tmp_path / "set.other.npz")) == 3


def test_damage_to_the_images_of_a_set_that_grows_is_repaired(tmp_path: Path, reference: np.ndarray) -> None:
    folder, earlier = tmp_path / "set", tmp_path / ".set.npz.earlier"
    draw(folder, count=3, sink="npz")
    with pytest.raises(KeyboardInterrupt):
        draw(folder, sink="npz", progress=interrupt_at(0))
    content = bytearray(earlier.read_bytes())
    content[500] ^= 1
    earlier.write_bytes(content)
    assert np.array_equal(arrays(draw(folder, sink="npz")), reference)
    assert visible(folder) == expected("npz")


@pytest.mark.parametrize("form", IN_PARTS)
def test_what_other_hosts_wrote_may_be_seen_late(
    tmp_path: Path, reference: np.ndarray, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS caches folders."""
    genuine, looks = Parts.paths, []

    def paths(parts: Parts) -> list[Path]:
        looks.append(genuine(parts))
        return looks[-1][1:] if len(looks) < 5 else looks[-1]

    monkeypatch.setattr(Parts, "paths", paths)
    assert np.array_equal(arrays(draw(tmp_path / "set", sink=form)), reference)
    assert len(looks) > 4
    looks.clear()
    monkeypatch.setattr(distributed, "LATE", 0)
    with pytest.raises(UserError, match="lacks 3 images that were drawn; choose a folder that all hosts share"):
        draw(tmp_path / "other", sink=form)


@pytest.mark.parametrize("form", SINKS)
def test_a_set_grows(tmp_path: Path, reference: np.ndarray, form: str) -> None:
    """Killed at the start and later; images are kept."""
    folder, drawn = tmp_path / "set", list[float]()
    draw(folder, sink=form, count=5)
    for stop in (0, 6.5):
        with pytest.raises(KeyboardInterrupt):
            draw(folder, sink=form, batch_size=1, progress=interrupt_at(stop, drawn))
        assert drawn[0] == 5.25
        drawn.clear()
        assert not folder.with_suffix(".npz").exists(), "it would be taken for the larger set"
    grown = draw(folder, sink=form, progress=lambda done, total: drawn.append(done))
    assert drawn[0] > 6
    assert np.array_equal(arrays(grown), reference)
    assert visible(folder) == expected(form)


@pytest.mark.parametrize("form", SINKS)
def test_a_set_that_stops_growing_can_be_completed_as_it_was(tmp_path: Path, reference: np.ndarray, form: str) -> None:
    """Killed after the .npz was set aside and before the manifest was written."""
    folder = tmp_path / "set"
    draw(folder, sink=form, count=5)
    manifest = (folder / "manifest.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        draw(folder, sink=form, progress=interrupt_at(5))
    (folder / "manifest.json").write_text(manifest)
    assert np.array_equal(arrays(draw(folder, sink=form, count=5)), reference[:5])
    assert visible(folder) == expected(form, 5)


@pytest.mark.parametrize(("form", "other"), list(permutations(SINKS, 2)))
def test_another_form_is_refused(tmp_path: Path, form: str, other: str) -> None:
    draw(tmp_path / "set", sink=form, count=1)
    with pytest.raises(UserError, match=f"belongs to a run with storage '{form}', not '{other}'"):
        draw(tmp_path / "set", sink=other, count=1)


def test_a_set_without_the_field_has_files(tmp_path: Path) -> None:
    """Of earlier versions."""
    folder = tmp_path / "set"
    draw(folder, count=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["storage"], manifest["manifest_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    draw(folder, count=2)
    with pytest.raises(UserError, match="storage"):
        draw(folder, count=2, sink="tar")


@pytest.mark.parametrize("sink", ["zip", "", None, 3, Path("png"), sinks.TarShards])
def test_an_unknown_sink_is_an_error(tmp_path: Path, sink: object) -> None:
    with pytest.raises(
        UserError, match=r"there is no sink .*; choose one of png, tar, npz, or pass an object like them"
    ):
        draw(tmp_path / "set", sink=sink)


class Means:
    """A sink of one's own: the mean colour of each image."""

    form, threaded = "means", True

    def open(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.count = folder, manifest["num_images"]

    def missing(self) -> list[int]:
        return [i for i in range(self.count) if not (self.folder / f"{i}.txt").exists()]

    def write(self, indices: Sequence[int], pixels: images.Pixels) -> None:
        for i, image in zip(indices, pixels, strict=True):
            (self.folder / f"{i}.txt").write_text(str(image.mean()))

    def finish(self) -> list[float]:
        return [float((self.folder / f"{i}.txt").read_text()) for i in range(self.count)]


def test_a_sink_of_ones_own_resumes_too(tmp_path: Path, reference: np.ndarray) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "set", sink=Means(), progress=interrupt_at(4.5))
    (tmp_path / "set" / "0.txt").write_text("7")
    assert draw(tmp_path / "set", sink=Means()) == [7, *(image.mean() for image in reference[1:])]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 4  # in the first image of an archive
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])  # within the second image


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("form", IN_PARTS)
def test_damaged_parts_are_drawn_again(
    tmp_path: Path, reference: np.ndarray, form: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        draw(folder, sink=form, progress=interrupt_at(6.5))
    first, _ = sorted((folder / ".parts").glob("*.tar"))
    damage(first)
    assert np.array_equal(arrays(draw(folder, sink=form)), reference)
    assert capsys.readouterr().err == f"warning: {first} is damaged; its images are generated again\n"
    assert visible(folder) == expected(form)


def test_a_damaged_shard_is_drawn_again(
    tmp_path: Path, reference: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, drawn = tmp_path / "set", list[float]()
    draw(folder, sink="tar")
    shard = (folder / "000001.tar").read_bytes()
    flip(folder / "000001.tar")
    resumed = draw(folder, sink="tar", progress=lambda done, total: drawn.append(done))
    assert drawn[0] == 4.75
    assert np.array_equal(arrays(resumed), reference)
    assert (folder / "000001.tar").read_bytes() == shard
    assert "000001.tar is damaged; its images are generated again" in capsys.readouterr().err


def test_a_wrong_label_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "set", sink="tar")
    path = tmp_path / "set" / "000000.tar"
    shard, place = path.read_bytes(), tar_members(path)["000002.cls"].offset
    path.write_bytes(shard[:place] + bytes([shard[place] ^ 1]) + shard[place + 1 :])
    draw(tmp_path / "set", sink="tar")
    assert path.read_bytes() == shard
    assert "000000.tar is damaged" in capsys.readouterr().err


def test_a_damaged_npz_without_files_is_drawn_again(
    tmp_path: Path, reference: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "set", sink="npz")
    flip(tmp_path / "set.npz")
    assert np.array_equal(arrays(draw(tmp_path / "set", sink="npz")), reference)
    assert capsys.readouterr().err == f"warning: {tmp_path}/set.npz is damaged and is written again\n"


def stray_image(folder: Path) -> None:
    images.write_png(
        folder / "000000.png" if (folder / "000000.tar").exists() else folder / "cat.png", np.zeros((8, 8, 3), np.uint8)
    )


def stray_archive(folder: Path) -> None:
    write_tar(folder / "000009.tar", [("x.txt", b"")])


@pytest.mark.parametrize("stray", [stray_image, stray_archive])
@pytest.mark.parametrize("form", SINKS)
def test_strays_are_refused(tmp_path: Path, form: str, stray: Callable[[Path], None]) -> None:
    draw(tmp_path / "set", sink=form)
    stray(tmp_path / "set")
    with pytest.raises(UserError, match="which is not an image of this set; move it out of the folder"):
        draw(tmp_path / "set", sink=form)


@pytest.mark.parametrize("form", SINKS)
def test_the_npz_of_another_set_is_kept(
    tmp_path: Path, reference: np.ndarray, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be overwritten, or its images taken for those of this set."""
    npz, kept = tmp_path / "set.npz", tmp_path / "set.other.npz"
    np.savez(npz, arr_0=np.zeros((COUNT, 8, 8, 3), np.uint8))
    assert np.array_equal(arrays(draw(tmp_path / "set", sink=form)), reference)
    assert capsys.readouterr().err == f"warning: {npz} was not of this set and is now {kept}\n"
    assert not arrays(kept).any()
    (tmp_path / "set").rename(tmp_path / "renamed")
    with pytest.raises(
        UserError, match=r"set\.npz is not of this set and .*set\.other\.npz exists; remove one of them"
    ):
        draw(tmp_path / "set", sink=form)


def test_webdataset_reads_the_shards(tmp_path: Path, reference: np.ndarray) -> None:
    draw(tmp_path / "set", sink="tar")
    shards = str(tmp_path / "set" / "{000000..000001}.tar")
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(COUNT)]
    assert [sample["cls"] for sample in samples] == LABEL_POLICIES["random"](SEED, range(COUNT), 5)
    assert np.array_equal(np.stack([sample["png"] for sample in samples]), reference)


def test_shards_do_not_depend_on_the_run(tmp_path: Path) -> None:
    for name, size in (("a", 2), ("b", 7)):
        draw(tmp_path / name, sink="tar", batch_size=size)
    for shard, first in (("000000.tar", "000000"), ("000001.tar", "000004")):
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
        assert list(tar_members(tmp_path / "a" / shard))[:2] == [f"{first}.png", f"{first}.cls"]


def test_numpy_maps_the_extracted_array(tmp_path: Path, reference: np.ndarray) -> None:
    with zipfile.ZipFile(draw(tmp_path / "set", sink="npz")) as archive:
        assert archive.namelist() == ["arr_0.npy"]
        archive.extractall(tmp_path)
    mapped = np.load(tmp_path / "arr_0.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, reference)


@pytest.mark.parametrize("threaded", [True, False])
def test_a_sink_chooses_where_it_stores(tmp_path: Path, threaded: bool) -> None:
    class Notes(PngFiles):
        def write(self, indices: Sequence[int], pixels: images.Pixels) -> None:
            threads.add(threading.current_thread())
            super().write(indices, pixels)

    threads, sink = set[threading.Thread](), Notes()
    sink.threaded = threaded
    draw(tmp_path / "set", sink=sink)
    assert (threads == {threading.main_thread()}) != threaded
