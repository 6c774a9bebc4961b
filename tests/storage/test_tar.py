"""Archives compared with Python's tarfile and WebDataset, and damaged ones."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from svdit.errors import UserError
from svdit.images import write_png
from svdit.storage.tar import read_member, tar_members, write_tar

FILES = {"000007.png": b"seven" * 300, "000007.cls": b"3", "empty.cls": b"", "block.png": bytes(512)}


def test_members_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, FILES.items())
    members = tar_members(path)
    assert {name: read_member(path, member) for name, member in members.items()} == FILES
    with tarfile.open(path) as archive:
        assert {info.name: archive.extractfile(info).read() for info in archive} == FILES  # type: ignore[union-attr]


def test_equal_files_make_equal_archives(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, FILES.items())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_webdataset_reads_images_and_labels(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    for i, image in enumerate(pixels):
        write_png(tmp_path / f"{i}.png", image)
    files = [(f"{i:06d}.png", (tmp_path / f"{i}.png").read_bytes()) for i in range(2)]
    write_tar(tmp_path / "0.tar", [files[0], ("000000.cls", b"4"), files[1], ("000001.cls", b"2")])
    samples = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode("rgb8"))
    assert [(sample["__key__"], sample["cls"]) for sample in samples] == [("000000", 4), ("000001", 2)]
    assert np.array_equal(np.stack([sample["png"] for sample in samples]), pixels)


def test_folders_and_links_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.png").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "folder", "folder")
    assert tar_members(tmp_path / "x.tar") == {}


@pytest.mark.parametrize("kept", [0, 100, 600, 2000, 3000, -10240, "text", "a folder", "missing"])
def test_damaged_archives_are_errors(tmp_path: Path, kept: int | str) -> None:
    path = tmp_path / "x.tar"
    if kept == "a folder":
        path.mkdir()
    elif kept == "text":
        path.write_text("no archive " * 1000)
    elif kept != "missing":
        write_tar(path, ((f"{i}.png", b"x" * 1000) for i in range(9)))
        path.write_bytes(path.read_bytes()[: int(kept)])
    with pytest.raises(UserError, match=r"x\.tar"):
        tar_members(path)
