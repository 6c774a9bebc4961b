"""Images in tar shards: keys as in WebDataset, labels, and the same set as in a folder."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from svdit.errors import UserError
from svdit.evaluation.features import cache_key
from svdit.evaluation.inputs import open_inputs, open_set
from svdit.evaluation.opening import open_source
from svdit.evaluation.options import Options
from svdit.evaluation.shards import open_shards, split
from svdit.storage.tar import write_tar

from .conftest import TinyNetwork, make_images


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, form)
    return content.getvalue()


def png(n: int = 0) -> bytes:
    return encoded(make_images(n + 1)[n])


def shard(path: Path, names: list[str], *others: tuple[str, bytes]) -> Path:
    """An archive of PNGs, whatever their names, and other files after them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, [*((name, png(i)) for i, name in enumerate(names)), *others])
    return path


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "a.b/c.seg.png", "a/b.c.d.JPEG", "./a.jpg", "x/.png", "noext"])
def test_keys_are_webdatasets(name: str) -> None:
    key, extension = webdataset.tariterators.base_plus_ext(name)
    assert split(name) == ((key, extension.lower()) if key else (name.removesuffix(".png"), name.partition(".")[2]))


def test_shards_are_one_set_in_natural_order(tmp_path: Path) -> None:
    shard(tmp_path / "10.tar", ["b/10.png", "b/9.png"])
    shard(tmp_path / "sub" / "9.tar", ["a/1.JPG", "./a/0.png"], ("a/0.json", b"{}"), ("a/0.cls", b"4\n"))
    source = open_source(tmp_path)
    assert (source.kind, source.names) == ("tar", ("a/0", "a/1", "b/9", "b/10"))
    assert (source.labels, source.classes) == ((0, 0, 1, 1), ("a", "b"))
    assert str(source.files[1]) == f"{tmp_path}/sub/9.tar/a/1.JPG"
    np.testing.assert_array_equal(source.read(1), make_images(1)[0])
    np.testing.assert_array_equal(open_source(tmp_path, 6).read(1), open_source(tmp_path / "sub/9.tar", 6).read(1))


@pytest.mark.parametrize(
    ("contents", "labels"),
    [([b"7", b"3\n"], (7, 3)), ([b"7"], None), ([b"7", b"cat"], None), ([b"7", b""], None), ([b"7", b"1" * 30], None)],
)
def test_labels_are_used_where_every_image_has_one(
    tmp_path: Path, contents: list[bytes], labels: tuple[int, ...] | None
) -> None:
    classes = [(f"{i}.cls", content) for i, content in enumerate(contents)]
    shard(tmp_path / "x.tar", ["0.png", "1.png"], *classes, ("2.cls", b"5"))
    assert open_shards([tmp_path / "x.tar"]).labels == labels


def test_hidden_files_links_and_other_formats_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("0.png", "._0.png", "../1.png", "/etc/2.png", "__MACOSX/0.png", "3.gif", "4.tar"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("5.png")
            info.type, info.linkname = kind, "0.png"
            archive.addfile(info)
    images, _, skipped = open_shards([tmp_path / "x.tar"])
    assert (list(images), skipped) == (["0", "/etc/2"], "1 .gif file, 1 .tar file, 3 special files")
    assert open_set(tmp_path, Options()).warnings == (f"{tmp_path}: skipped {skipped}",)


@pytest.mark.parametrize("names", [["a.png", "a.jpg"], ["a.png", "a.seg.png"], ["a.png", "./a.png"]])
def test_two_images_of_a_key_are_named(tmp_path: Path, names: list[str]) -> None:
    shard(tmp_path / "x.tar", names)
    shard(tmp_path / "y" / "1.tar", names[:1]), shard(tmp_path / "y" / "2.tar", names[:1])
    with pytest.raises(UserError, match=r"x\.tar/a\.png and .*x\.tar/a.* share the key a, "):
        open_source(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"1\.tar/a\.png and .*2\.tar/a\.png share the key a, "):
        open_source(tmp_path / "y")


def test_archives_have_the_content_and_warnings_of_a_folder(tmp_path: Path, tiny_network: TinyNetwork) -> None:
    """So that both share the feature cache."""
    files = [(f"{i}.png", png(i)) for i in range(12)] + [("12.jpg", encoded(make_images(13)[12], "JPEG"))]
    files.append(("13.png", encoded(make_images(14)[13][..., 0])))
    for name, content in files:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", files[7:])
    write_tar(tmp_path / "tars" / "b.tar", files[:7])
    options = Options(num_images=10, seed=1)
    a, b = open_set(tmp_path / "files", options), open_set(tmp_path / "tars", options)
    assert (a.content, a.size, a.lossy, a.copies) == (b.content, b.size, b.lossy, b.copies)
    assert cache_key(a, tiny_network) == cache_key(b, tiny_network)
    assert [w.replace("/files", "/tars") for w in a.warnings] == list(b.warnings)
    assert "1 images were converted to RGB (1 of mode L)" in open_set(tmp_path / "tars", Options()).warnings[0]
    assert open_set(tmp_path / "tars", Options()).lossy


DAMAGED = {
    "text": (b"hello", r"x\.tar/1\.png cannot be read as an image"),
    "empty": (b"", r"x\.tar/1\.png cannot be read as an image"),
    "cut": (png()[:20], r"x\.tar/1\.png cannot be read as an image"),
    "of another size": (encoded(make_images(1, 16)[0]), r"x\.tar/0\.png is 12×12 and .*x\.tar/1\.png is 16×16"),
    "flat": (b"P6 9000 9000 255\n\0\0\0", r"x\.tar/1\.png declares 324 MB in 20 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images_are_named_with_their_archive(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    shard(tmp_path / "x.tar", ["0.png"], ("1.png", content))
    with pytest.raises(UserError, match=message) as caught:
        open_set(tmp_path / "x.tar", Options())
    assert "\n" not in str(caught.value)


def test_damage_after_the_header_is_reported_when_the_image_is_read(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", ["0.png"], ("1.png", png()[:-60]))
    with pytest.raises(UserError, match=r"x\.tar/1\.png cannot be read as an image"):
        open_set(tmp_path, Options()).source.read(1)


def test_sets_that_share_an_archive_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", [f"{name}{i}.png" for i in range(3)])
    with pytest.raises(UserError, match=f"share the images in {tmp_path / 'a.tar'}; move one set out"):
        open_inputs(tmp_path, tmp_path / "a.tar", Options(("fid",)))
    assert open_inputs(tmp_path / "b.tar", tmp_path / "a.tar", Options(("fid",))).fake.count == 3
