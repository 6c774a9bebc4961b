"""Paths to sources: what is read, and the message for every kind of bad input."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdit.errors import UserError
from svdit.evaluation.inputs import open_set
from svdit.evaluation.opening import open_source
from svdit.evaluation.options import Options
from svdit.storage.manifest import EARLIER
from svdit.storage.tar import write_tar

from .conftest import make_images, write_folder


def test_folder_is_read_deep_in_natural_order(tmp_path: Path):
    names = ["b/10.png", "b/2.png", "a/1.jpg", "a/3.webp", "a/12.bmp"]
    source = open_source(write_folder(tmp_path, make_images(5), names))
    assert source.names == ("a/1", "a/3", "a/12", "b/2", "b/10")
    assert source.labels == (0, 0, 0, 1, 1)
    assert (source.kind, source.classes) == ("folder", ("a", "b"))
    np.testing.assert_array_equal(source.read(4), make_images(5)[0])


def test_flat_folder_has_labels_only_from_its_manifest(tmp_path: Path):
    write_folder(tmp_path, make_images(3))
    assert open_source(tmp_path).labels is None
    (tmp_path / "manifest.json").write_text(json.dumps({"tool": "svdit", "labels": [4, 4, 7], "steps": 20}))
    source = open_source(tmp_path)
    assert source.labels == (4, 4, 7)
    assert source.manifest["steps"] == 20


@pytest.mark.parametrize(
    "content", ["{", "[" * 10**5, "[]", '{"labels": [1, "x"]}', '{"name": "app", "icons": []}', "9" * 5000]
)
def test_a_foreign_manifest_is_ignored(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path, make_images(2))
    (tmp_path / "manifest.json").write_text(content)
    source = open_source(tmp_path)
    assert (source.manifest, source.labels) == ({}, None)
    assert "manifest.json is not a manifest of svdit and is ignored" in capsys.readouterr().err


def test_an_unfinished_set_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path, make_images(2))
    (tmp_path / "manifest.json").write_text(json.dumps({"tool": "svdit", "files": ["a.png", "b.png", "c.png"]}))
    open_source(tmp_path)
    assert f"{tmp_path} contains 2 of the 3 images in its manifest; generate the others" in capsys.readouterr().err


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_equals_its_images_however_it_is_stored(tmp_path: Path, save: Callable[..., None], order: str):
    images = make_images(4)
    save(tmp_path / "x.npz", np.array(images, order=order))
    (tmp_path / "x.json").write_text(json.dumps({"tool": "svdit", "seed": 3}))
    source = open_source(tmp_path / "x.npz")
    assert isinstance(source.array, np.memmap)
    assert (source.kind, len(source), source.manifest) == ("npz", 4, {**EARLIER, "tool": "svdit", "seed": 3})
    for i in range(4):
        np.testing.assert_array_equal(source.read(i), images[i])


def test_grey_npz_becomes_rgb(tmp_path: Path):
    grey = make_images(2)[..., :1]
    np.savez(tmp_path / "x.npz", grey)
    np.testing.assert_array_equal(open_source(tmp_path / "x.npz").read(1), grey[1].repeat(3, 2))


def described(path: Path, **fields: object) -> dict[str, object]:
    """Write a manifest; returns what is read of it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"tool": "svdit", **fields}))
    return {**EARLIER, "tool": "svdit", **fields}


def test_npz_has_the_manifest_of_its_folder(tmp_path: Path):
    np.savez(tmp_path / "x.npz", make_images(2))
    manifest = described(
        tmp_path / "x" / "manifest.json", num_images=2, labels=[4, 5], files=["000000.png", "000001.png"]
    )
    source = open_source(tmp_path / "x.npz")
    assert (source.manifest, source.labels, source.names) == (manifest, (4, 5), ("000000", "000001"))
    (tmp_path / "x.json").write_bytes((tmp_path / "x" / "manifest.json").read_bytes())
    assert open_source(tmp_path / "x.npz").manifest == manifest
    described(tmp_path / "x.json", num_images=2, seed=1)
    with pytest.raises(
        UserError, match=r"x\.json and .*x/manifest\.json both describe .*x\.npz, and differ; remove one"
    ):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize("fields", [{"num_images": 3}, {}])
def test_a_manifest_of_another_number_of_images_is_ignored(
    tmp_path: Path, fields: dict[str, object], capsys: pytest.CaptureFixture[str]
):
    np.savez(tmp_path / "x.npz", make_images(2))
    described(tmp_path / "x" / "manifest.json", seed=1, **fields)
    assert open_source(tmp_path / "x.npz").manifest == {}
    assert f"does not describe the 2 images of {tmp_path / 'x.npz'} and is ignored" in capsys.readouterr().err
    beside = described(tmp_path / "x.json", seed=2)
    assert open_source(tmp_path / "x.npz").manifest == beside


def test_adm_reference_has_images_and_statistics(tmp_path: Path):
    np.savez(
        tmp_path / "adm.npz", arr_0=make_images(3), mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(2), sigma_s=np.eye(2)
    )
    source = open_source(tmp_path / "adm.npz")
    assert (len(source), sorted(source.gaussians), source.extractor) == (3, ["pool", "spatial"], "inception")


# Malformed files, and the message for each.


def truncated_png(folder: Path) -> Path:
    write_folder(folder, make_images(3))
    (folder / "000001.png").write_bytes((folder / "000001.png").read_bytes()[:20])
    return folder


def text_as_png(folder: Path) -> Path:
    write_folder(folder, make_images(3))
    (folder / "000002.png").write_text("hello")
    return folder


def empty_png(folder: Path) -> Path:
    write_folder(folder, make_images(3))
    (folder / "000000.png").write_bytes(b"")
    return folder


def two_sizes(folder: Path) -> Path:
    write_folder(folder, make_images(3))
    Image.fromarray(make_images(1, 16)[0]).save(folder / "000002.png")
    return folder


def npz(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return make


def truncated_npz(folder: Path) -> Path:
    path = npz(arr_0=make_images(20))(folder)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def npz_of_objects(folder: Path) -> Path:
    return npz(arr_0=np.array([{}], object))(folder)


def npz_with_a_lying_header(folder: Path) -> Path:
    """Announces a thousand images and holds three."""
    body = io.BytesIO()
    np.lib.format.write_array_header_1_0(body, {"descr": "|u1", "fortran_order": False, "shape": (1000, 12, 12, 3)})
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", body.getvalue() + make_images(3).tobytes())
    return folder / "x.npz"


def npz_with_text_inside(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    return folder / "x.npz"


def text_as_npz(folder: Path) -> Path:
    (folder / "x.npz").write_text("hello")
    return folder / "x.npz"


def bare_npy(folder: Path) -> Path:
    np.save(folder / "x.npy", make_images(3))
    return folder / "x.npy"


def bare_npy_called_npz(folder: Path) -> Path:
    bare_npy(folder).rename(folder / "x.npz")
    return folder / "x.npz"


def mixed(folder: Path) -> Path:
    write_tar(write_folder(folder, make_images(2)) / "more.tar", [])
    return folder


def tar(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            write_tar(folder / name, [("a.txt", b""), ("a.gif", b"")])
            if not name.endswith(".tar"):
                (folder / name).write_bytes(gzip.compress((folder / name).read_bytes()))
        return folder if len(names) > 1 else folder / names[0]

    return make


def text_as_tar(folder: Path) -> Path:
    (folder / "x.tar").write_text("hello" * 1000)
    return folder / "x.tar"


def stored_as(form: str, images: int = 0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "manifest.json").write_text(json.dumps({"tool": "svdit", "storage": form}))
        return write_folder(folder, make_images(images), ["grid_fake.png", "grid_pairs.png"][:images])

    return make


MALFORMED = {
    "a missing path": (lambda folder: folder / "missing", r"no folder or file .*missing"),
    "an empty folder": (lambda folder: folder, r"contain no images"),
    "a folder without images": (lambda folder: (folder / "a.txt").write_text("x") and folder, r"contain no images"),
    "one image": (lambda folder: write_folder(folder, make_images(1)), r"contains 1 images; at least 2 images"),
    "a truncated image": (truncated_png, r"000001\.png cannot be read as an image"),
    "text called PNG": (text_as_png, r"000002\.png cannot be read as an image"),
    "an empty file": (empty_png, r"000000\.png cannot be read as an image"),
    "two sizes": (two_sizes, r"000000\.png is 12×12 and .*000002\.png is 16×16.*--resize-to"),
    "an .npz of nothing": (npz(), r"the arrays in .*x\.npz are none; expected images under arr_0"),
    "an .npz of other things": (npz(images=make_images(3)), "are 'images'; expected images under arr_0"),
    "float images": (npz(arr_0=make_images(3) / 255), r"arr_0 in .* is float64; expected uint8 in 0 … 255"),
    "int64 images": (npz(arr_0=make_images(3).astype(np.int64)), r"is int64; expected uint8"),
    "channels first": (npz(arr_0=make_images(3).transpose(0, 3, 1, 2)), r"\(3, 3, 12, 12\).*move the channels last"),
    "one image without N": (npz(arr_0=make_images(1)[0]), r"has the shape \(12, 12, 3\); expected \(N, H, W, 3\)"),
    "four channels": (npz(arr_0=np.zeros((3, 8, 8, 4), np.uint8)), r"\(3, 8, 8, 4\); expected \(N, H, W, 3\)"),
    "no pixels": (npz(arr_0=np.zeros((3, 0, 8, 3), np.uint8)), r"\(3, 0, 8, 3\); expected \(N, H, W, 3\)"),
    "an .npz of one image": (npz(arr_0=make_images(1)), r"contains 1 images; at least 2 images"),
    "an .npz of no image": (npz(arr_0=make_images(3)[:0]), r"contains 0 images; at least 2 images"),
    "a truncated .npz": (truncated_npz, r"cannot be read as an \.npz"),
    "an .npz with code": (npz_of_objects, r"cannot be read as an \.npz.*objects"),
    "a lying header": (npz_with_a_lying_header, r"cannot be read as an \.npz"),
    "text in an .npz": (npz_with_text_inside, r"cannot be read as an \.npz"),
    "text called .npz": (text_as_npz, r"cannot be read as an \.npz"),
    "an .npy": (bare_npy, r"x\.npy is no folder, \.npz or \.tar"),
    "an .npy called .npz": (bare_npy_called_npz, r"cannot be read as an \.npz"),
    "images and archives": (mixed, r"contains images, such as .*000000\.png, and archives, such as .*more\.tar; "),
    "a .tar without images": (tar("x.tar"), r"x\.tar contains no images \(only 1 \.gif file\); pass an archive of PNG"),
    "archives without images": (
        tar("x.tar", "y.tar"),
        r"contains no images \(only 2 \.gif files\); pass an archive of",
    ),
    "a .tar.gz": (tar("x.tar.gz"), r"x\.tar\.gz is compressed; decompress it first"),
    "a .tgz": (tar("x.tgz"), r"x\.tgz is compressed; decompress it first"),
    "a folder of .tgz": (tar("x.tgz", "y.tgz"), r"contains no images, but x\.tgz, which is compressed; decompress it"),
    "text called .tar": (text_as_tar, r"x\.tar cannot be read as a tar archive"),
    "a set in an .npz": (stored_as("npz"), r"does not contain its images: they are in .*\.npz; pass that file"),
    "a set of metrics": (
        stored_as("features", 2),
        r"does not contain its images: none were stored, only metrics; see .*/metrics\.json",
    ),
    "a set of no shards": (stored_as("tar"), r"contain no images"),
    "statistics that do not fit": (npz(mu=np.zeros(3), sigma=np.eye(4)), r"\(3,\) and \(4, 4\)"),
    "statistics with NaN": (npz(mu=np.full(3, np.nan), sigma=np.eye(3)), r"contains NaN or Inf"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_input_gets_one_sentence_with_its_path(tmp_path: Path, what: str):
    make, sentence = MALFORMED[what]
    with pytest.raises(UserError, match=sentence) as caught:
        open_set(make(tmp_path), Options())
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_after_the_header_is_reported_when_the_image_is_read(tmp_path: Path):
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    write_folder(tmp_path, np.stack([image, image]))
    whole = (tmp_path / "000001.png").read_bytes()
    (tmp_path / "000001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"000001\.png cannot be read as an image"):
        open_set(tmp_path, Options()).source.read(1)
