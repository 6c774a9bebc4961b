"""Image sources: what is converted, counted and warned of, and which images are chosen."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svdit.errors import UserError
from svdit.evaluation.inputs import open_inputs, open_set
from svdit.evaluation.opening import open_source
from svdit.evaluation.options import Options
from svdit.evaluation.protocol import input_warnings
from svdit.evaluation.report import Report
from svdit.evaluation.sources import Source, choose

from .conftest import make_images, write_folder


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
    with pytest.raises(UserError, match="no metric 'fidd'; choose one of fid, sfid"):
        Options(metrics=("fidd",))
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        Options(batch_size=0)
