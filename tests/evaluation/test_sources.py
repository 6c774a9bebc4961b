"""Image sources: what is read, which images are chosen, and the message for every kind of bad input."""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svdit.errors import UserError
from svdit.evaluation.inputs import open_inputs, open_set
from svdit.evaluation.options import Options
from svdit.evaluation.protocol import input_warnings
from svdit.evaluation.report import Report
from svdit.evaluation.sources import Source, choose, open_source

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
    assert (source.kind, len(source), source.manifest) == ("npz", 4, {"tool": "svdit", "seed": 3})
    for i in range(4):
        np.testing.assert_array_equal(source.read(i), images[i])


def test_grey_npz_becomes_rgb(tmp_path: Path):
    grey = make_images(2)[..., :1]
    np.savez(tmp_path / "x.npz", grey)
    np.testing.assert_array_equal(open_source(tmp_path / "x.npz").read(1), grey[1].repeat(3, 2))


def test_adm_reference_has_images_and_statistics(tmp_path: Path):
    np.savez(
        tmp_path / "adm.npz", arr_0=make_images(3), mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(2), sigma_s=np.eye(2)
    )
    source = open_source(tmp_path / "adm.npz")
    assert (len(source), sorted(source.gaussians), source.extractor) == (3, ["pool", "spatial"], "inception")


def test_conversions_are_counted(tmp_path: Path):
    write_folder(tmp_path, make_images(3))
    Image.fromarray(make_images(1)[0]).convert("L").save(tmp_path / "000001.png")
    Image.fromarray(make_images(1)[0]).convert("RGBA").save(tmp_path / "000002.png")
    image_set = open_set(tmp_path, Options())
    assert image_set.warnings == (f"{tmp_path}: 2 images were converted to RGB (1 of mode L, 1 of mode RGBA)",)


def test_grey_of_16_bits_is_measured_as_its_8_bits(tmp_path: Path):
    deep = np.random.RandomState(0).randint(0, 65536, (3, 12, 12)).astype(np.uint16)
    write_folder(tmp_path / "deep", deep)
    write_folder(tmp_path / "plain", (deep >> 8).astype(np.uint8))
    for i in range(3):
        read = (open_set(tmp_path / name, Options()).read(i) for name in ("deep", "plain"))
        np.testing.assert_array_equal(*read)


def test_modes_without_a_range_are_refused_before_anything_is_computed(tmp_path: Path):
    write_folder(tmp_path, make_images(2))
    Image.fromarray(np.linspace(0, 1, 144, dtype=np.float32).reshape(12, 12)).save(tmp_path / "000002.tif")
    with pytest.raises(UserError, match=r"000002\.tif has mode F with values from 0\.0 to 1\.0"):
        open_set(tmp_path, Options())


@pytest.mark.parametrize(
    ("extension", "stored_as", "lossy"),
    [("png", "JPEG", True), ("jpg", "PNG", False), ("tif", "TIFF", False), ("tif", "jpeg in TIFF", True),
     ("png", "WEBP", True), ("jpg", "BMP", False)],
)  # fmt: skip
def test_lossy_is_what_is_stored_not_the_extension(tmp_path: Path, extension: str, stored_as: str, lossy: bool):
    for i, image in enumerate(make_images(2)):
        options = {"compression": "jpeg"} if stored_as.startswith("jpeg") else {}
        Image.fromarray(image).save(tmp_path / f"{i}.{extension}", format=stored_as.split()[-1], **options)
    assert open_set(tmp_path, Options()).lossy == lossy


def test_skipped_files_and_further_frames_are_counted(tmp_path: Path):
    images = [Image.fromarray(image) for image in make_images(3)]
    images[0].save(tmp_path / "0.png", save_all=True, append_images=images[1:])
    images[1].save(tmp_path / "1.tif", save_all=True, append_images=images[1:])
    images[2].save(tmp_path / "2.png")
    (tmp_path / "3.gif").touch()
    assert open_set(tmp_path, Options()).warnings == (
        f"{tmp_path}: 2 images have more than one frame, of which the first is used",
        f"{tmp_path}: skipped 1 .gif file",
    )


def test_copies_are_counted(tmp_path: Path):
    images = make_images(3)[[0, 1, 2, 1, 1]]
    np.savez(tmp_path / "x.npz", images)
    assert open_set(write_folder(tmp_path / "x", images), Options()).copies == 2
    assert open_set(tmp_path / "x.npz", Options()).copies == 2
    inputs = open_inputs(None, tmp_path / "x", Options(("paired",), paired=tmp_path / "x.npz"))
    assert input_warnings(inputs, None, ()) == [f"2 of 5 images of {tmp_path / 'x'} are exact copies of others"]


def test_names_that_are_not_utf_8_can_be_measured_and_printed(tmp_path: Path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_folder(folder, make_images(3))
    os.rename(folder / "000001.png", os.fsencode(folder) + b"/\xe9.png")  # noqa: PTH104
    image_set = open_set(folder, Options())
    assert image_set.source.names[-1] == "\udce9"
    report = Report(
        {}, {"comparable": True, "n_fake": 3}, {"fake": image_set.describe()}, {}, (image_set.source.names[-1],)
    )
    report.save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_bytes())["inputs"]["fake"]["path"] == str(folder)
    assert "\\udce9" in report.text()


def test_images_with_one_stem_are_two_images(tmp_path: Path):
    write_folder(tmp_path, make_images(3), ["1.png", "1.bmp", "1.tif"])
    assert open_set(tmp_path, Options()).count == 3


def test_a_set_from_class_folders_names_them(tmp_path: Path):
    write_folder(tmp_path, make_images(3), ["2/a.png", "10/a.png", "cat/a.png"])
    image_set = open_set(tmp_path, Options())
    assert image_set.source.labels == (0, 1, 2)
    assert image_set.describe()["classes"] == "3 classes: 2 … cat"
    report = Report({}, {"comparable": True, "n_fake": 3}, {"fake": image_set.describe()}, {})
    assert f"3 generated images of {tmp_path} in 3 classes: 2 … cat" in report.text()


def test_resizing_makes_one_size(tmp_path: Path):
    write_folder(tmp_path, make_images(2, 24))
    Image.fromarray(make_images(1, 40)[0]).crop((0, 0, 40, 32)).save(tmp_path / "000001.png")
    image_set = open_set(tmp_path, Options(resize_to=12))
    assert image_set.size == (12, 12)
    assert {image_set.source.read(i).shape for i in range(2)} == {(12, 12, 3)}


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


MALFORMED = {
    "a missing path": (lambda folder: folder / "missing", r"no folder or file .*missing"),
    "an empty folder": (lambda folder: folder, r"contain no images"),
    "a folder without images": (lambda folder: (folder / "a.txt").write_text("x") and folder, r"contain no images"),
    "one image": (lambda folder: write_folder(folder, make_images(1)), r"contains 1 images; at least 2 images"),
    "a truncated image": (truncated_png, r"000001\.png cannot be read as an image"),
    "text called PNG": (text_as_png, r"000002\.png cannot be read as an image"),
    "an empty file": (empty_png, r"000000\.png cannot be read as an image"),
    "two sizes": (two_sizes, r"000000\.png is 12×12 and .*000002\.png is 16×16.*--resize-to"),
    "an .npz of nothing": (npz(), r"contains nothing; expected images under arr_0"),
    "an .npz of other things": (npz(images=make_images(3)), r"contains images; expected images under arr_0"),
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
    "an .npy": (bare_npy, r"neither a folder nor an \.npz"),
    "an .npy called .npz": (bare_npy_called_npz, r"cannot be read as an \.npz"),
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


# Which images are chosen.


def labelled(counts: list[int]) -> Source:
    """A source with the given number of images of each class, sorted by class."""
    labels = tuple(np.repeat(np.arange(len(counts)), counts).tolist())
    return Source(Path("x"), tuple(str(i) for i in range(len(labels))), labels=labels)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 100), st.integers(0, 5))
def test_choice_keeps_classes_in_proportion(counts: list[int], count: int, seed: int):
    source = labelled(counts)
    count = min(count, len(source))
    chosen = choose(source, count, seed)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    per_class = Counter(source.labels[i] for i in chosen)
    for label, size in enumerate(counts):
        assert abs(per_class[label] - count * size / len(source)) < 1


def test_choice_is_seeded_and_not_the_first_images():
    source = labelled([50, 50])
    first, again, other = choose(source, 6, 0), choose(source, 6, 0), choose(source, 6, 1)
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    assert first.tolist() == [10, 11, 28, 52, 73, 80]  # on every system and NumPy: published subsets must not change


def test_all_images_are_chosen_by_default():
    np.testing.assert_array_equal(choose(labelled([3, 4]), None), np.arange(7))


def test_more_images_than_available_need_allow_fewer(tmp_path: Path):
    write_folder(tmp_path, make_images(3))
    with pytest.raises(UserError, match=r"contains 3 images, fewer than the 5 requested; lower --num_images or pass"):
        open_set(tmp_path, Options(num_images=5))
    image_set = open_set(tmp_path, Options(num_images=5, allow_fewer=True))
    assert image_set.count == 3
    assert image_set.warnings == (f"{tmp_path} contains only 3 of the 5 requested images",)


def test_content_changes_with_a_byte_a_name_and_the_choice(tmp_path: Path):
    write_folder(tmp_path, make_images(4))
    everything, some = np.arange(4), np.arange(3)
    contents = [open_source(tmp_path).content(indices) for indices in (everything, some)]
    Image.fromarray(255 - make_images(4)[0]).save(tmp_path / "000000.png")
    contents.append(open_source(tmp_path).content(everything))
    (tmp_path / "000000.png").rename(tmp_path / "0.png")
    contents += [open_source(tmp_path).content(everything), open_source(tmp_path, 8).content(everything)]
    assert len({digest for digest, _ in contents}) == 5
    assert open_source(tmp_path).content(everything) == contents[3]


def test_unknown_options_are_named():
    with pytest.raises(UserError, match="no metric 'fidd'; choose from fid, sfid"):
        Options(metrics=("fidd",))
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        Options(batch_size=0)


# Sets that belong together.


def test_counterparts_are_matched_by_name_across_orders_and_kinds(tmp_path: Path):
    images = make_images(12)
    fake = write_folder(tmp_path / "fake", images, [f"{i}.png" for i in range(12)])
    np.savez(tmp_path / "full.npz", images)
    inputs = open_inputs(None, fake, Options(("paired",), num_images=5, paired=tmp_path / "full.npz"))
    assert inputs.counterparts is not None
    for i, j in zip(inputs.fake.indices, inputs.counterparts.indices, strict=True):
        np.testing.assert_array_equal(inputs.fake.source.read(i), inputs.counterparts.source.read(j))


def test_missing_counterparts_are_counted_and_the_first_is_named(tmp_path: Path):
    fake, full = write_folder(tmp_path / "fake", make_images(5)), write_folder(tmp_path / "full", make_images(3))
    with pytest.raises(UserError, match=r"2 of 5 images of .*fake have no counterpart in .*full \(first: 000003\)"):
        open_inputs(None, fake, Options(("paired",), paired=full))


@pytest.mark.parametrize("kind", ["fake in real", "real in fake", "by a link"])
def test_a_set_inside_the_other_is_refused(tmp_path: Path, kind: str):
    real, fake = (tmp_path / "a", tmp_path / "b") if kind == "by a link" else (tmp_path, tmp_path / "b")
    real, fake = (fake, real) if kind == "real in fake" else (real, fake)
    write_folder(real, make_images(3)), write_folder(fake, make_images(3, seed=1))
    if kind == "by a link":
        (real / "link").symlink_to(fake)
    with pytest.raises(UserError, match=f"share the images in {tmp_path / 'b'}; move one set out of the other"):
        open_inputs(real, fake, Options(("fid",)))
    if kind == "fake in real":
        with pytest.raises(UserError, match="share the images"):
            open_inputs(None, fake, Options(("paired",), paired=real))


def test_a_set_can_be_compared_with_itself(tmp_path: Path):
    write_folder(tmp_path / "a", make_images(3))
    (tmp_path / "b").symlink_to("a")
    inputs = open_inputs(tmp_path / "a", tmp_path / "b", Options(("fid",)))
    assert input_warnings(inputs, None, ()) == [f"{tmp_path / 'a'} and {tmp_path / 'b'} contain the same images"]


def paired_names(folder: Path, ours: list[str], theirs: list[str]) -> dict[str, str]:
    """The names of each image and its counterpart."""
    sets = [write_folder(folder / name, make_images(len(names)), names) for name, names in (("a", ours), ("b", theirs))]
    inputs = open_inputs(None, sets[0], Options(("paired",), paired=sets[1]))
    assert inputs.counterparts is not None
    pairs = zip(inputs.fake.indices, inputs.counterparts.indices, strict=True)
    return {inputs.fake.source.names[i]: inputs.counterparts.source.names[j] for i, j in pairs}


def test_names_come_before_numbers(tmp_path: Path):
    """1.png and 01.png are two images; a number decides only where each set has it once."""
    equal = ["1.png", "01.png", "2.png", "02.png", "a/3.png"]
    assert paired_names(tmp_path / "equal", equal, equal) == {name[:-4]: name[:-4] for name in equal}
    assert paired_names(tmp_path / "more", ["1.png", "7.png"], ["01.png", "1.jpg", "007.png"]) == {"1": "1", "7": "007"}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [(["1.png", "01.png"], ["1.png", "2.png"], r"1 of 2 images .* have no counterpart in .* \(first: 01\)"),
     (["001.png", "2.png"], ["1.png", "01.png", "2.png"], r"1 of 2 images .* \(first: 001\)"),
     (["1.png", "1.jpg"], ["1.png"], r"a contains two images named 1 with different extensions"),
     (["1.png", "2.png"], ["1.png", "2.png", "2.bmp"], r"b contains two images named 2 with different extensions")],
)  # fmt: skip
def test_ambiguous_names_are_not_paired(tmp_path: Path, ours: list[str], theirs: list[str], message: str):
    with pytest.raises(UserError, match=message):
        paired_names(tmp_path, ours, theirs)


def test_counterparts_of_another_size_are_refused(tmp_path: Path):
    fake, full = write_folder(tmp_path / "fake", make_images(3)), write_folder(tmp_path / "full", make_images(3, 16))
    with pytest.raises(UserError, match=r"\(16, 16\), those of .* \(12, 12\)"):
        open_inputs(None, fake, Options(("paired",), paired=full))


def sampled(folder: Path, **manifest: object) -> Path:
    """A folder of 3 images with the manifest of `svdit generate`, for one seed and one model."""
    fields = {
        "tool": "svdit",
        "model": "DiT-S",
        "seed": 0,
        "steps": 20,
        "sampler": "ddim",
        "labels": [0, 1, 2],
        "checkpoint": "full",
    }
    write_folder(folder, make_images(3))
    (folder / "manifest.json").write_text(json.dumps(fields | manifest))
    return folder


def test_unrelated_folders_with_equal_names_are_not_paired(tmp_path: Path):
    fake, real = (write_folder(tmp_path / name, make_images(3, seed=i)) for i, name in enumerate(("fake", "real")))
    assert open_inputs(real, fake, Options()).counterparts is None
    assert open_inputs(real, fake, Options(("paired",))).counterparts is not None  # requested
    assert open_inputs(real, fake, Options(("fid",))).counterparts is None


@pytest.mark.parametrize(
    ("difference", "paired"),
    [({"checkpoint": "w4a4", "quantization": {"preset": "w4a4"}}, True), ({"seed": 1}, False), ({"steps": 50}, False),
     ({"seed": None}, False), ({"labels": [0, 1, 1]}, False), ({"model": "DiT-B"}, False)],
)  # fmt: skip
def test_real_images_are_counterparts_if_both_manifests_record_the_same_noise(
    tmp_path: Path, difference: dict[str, object], paired: bool
):
    real, fake = sampled(tmp_path / "real"), sampled(tmp_path / "fake", **difference)
    assert (open_inputs(real, fake, Options()).counterparts is not None) == paired


def test_seedless_manifests_prove_nothing(tmp_path: Path):
    real, fake = sampled(tmp_path / "real", seed=None), sampled(tmp_path / "fake", seed=None)
    assert open_inputs(real, fake, Options()).counterparts is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"metrics": ("fid", "kid"), "paired": "x"}, "--paired_dir has no effect on --metrics fid,kid; add paired"),
     ({"metrics": ("paired",), "save_stats": Path("x")}, "--save-stats has no effect on --metrics paired"),
     ({"seed": -1}, "seed is -1"), ({"seed": 2**32}, "seed is 4294967296")],
)  # fmt: skip
def test_options_without_effect_are_refused(options: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        Options(**options)


def test_missing_inputs_are_named(tmp_path: Path):
    fake = write_folder(tmp_path / "fake", make_images(3))
    with pytest.raises(UserError, match="fid, prc need --real_dir"):
        open_inputs(None, fake, Options(("fid", "prc")))
    with pytest.raises(UserError, match="need counterparts; pass --paired_dir"):
        open_inputs(None, fake, Options(("paired",)))
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UserError, match="contains statistics only; --fake_dir must contain images"):
        open_inputs(fake, tmp_path / "s.npz", Options())
