"""Everything a user may point at: what is read, what is chosen, and the sentence for each thing that is wrong."""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svdit.errors import UserError
from svdit.evaluation.inputs import open_inputs, open_set
from svdit.evaluation.options import Options
from svdit.evaluation.sources import Source, choose, open_source

from .conftest import pictures, write_folder


def test_folder_is_read_deep_in_natural_order(tmp_path: Path):
    names = ["b/10.png", "b/2.png", "a/1.jpg", "a/3.webp", "a/12.bmp"]
    source = open_source(write_folder(tmp_path, pictures(5), names))
    assert source.names == ("a/1", "a/3", "a/12", "b/2", "b/10")
    assert source.labels == (0, 0, 0, 1, 1)
    assert (source.kind, source.lossy) == ("folder", True)
    np.testing.assert_array_equal(source.read(4), pictures(5)[0])


def test_flat_folder_has_labels_only_from_its_manifest(tmp_path: Path):
    write_folder(tmp_path, pictures(3))
    assert open_source(tmp_path).labels is None
    (tmp_path / "manifest.json").write_text(json.dumps({"labels": [4, 4, 7], "steps": 20}))
    source = open_source(tmp_path)
    assert source.labels == (4, 4, 7)
    assert source.manifest["steps"] == 20


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_equals_its_images_however_it_is_stored(tmp_path: Path, save: Callable[..., None], order: str):
    images = pictures(4)
    save(tmp_path / "x.npz", np.array(images, order=order))
    (tmp_path / "x.json").write_text(json.dumps({"seed": 3}))
    source = open_source(tmp_path / "x.npz")
    assert isinstance(source.array, np.memmap)
    assert (source.kind, len(source), source.lossy, source.manifest) == ("npz", 4, False, {"seed": 3})
    for i in range(4):
        np.testing.assert_array_equal(source.read(i), images[i])


def test_grey_npz_becomes_rgb(tmp_path: Path):
    grey = pictures(2)[..., :1]
    np.savez(tmp_path / "x.npz", grey)
    np.testing.assert_array_equal(open_source(tmp_path / "x.npz").read(1), grey[1].repeat(3, 2))


def test_adm_reference_has_images_and_statistics(tmp_path: Path):
    np.savez(
        tmp_path / "adm.npz", arr_0=pictures(3), mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(2), sigma_s=np.eye(2)
    )
    source = open_source(tmp_path / "adm.npz")
    assert (len(source), sorted(source.gaussians), source.extractor) == (3, ["pool", "spatial"], "inception")


def test_conversions_are_counted(tmp_path: Path):
    write_folder(tmp_path, pictures(3))
    Image.fromarray(pictures(1)[0]).convert("L").save(tmp_path / "000001.png")
    Image.fromarray(pictures(1)[0]).convert("RGBA").save(tmp_path / "000002.png")
    each = open_set(tmp_path, Options())
    assert each.warnings == (f"{tmp_path}: 2 images were converted to RGB (1 of mode L, 1 of mode RGBA)",)


def test_resizing_makes_one_size(tmp_path: Path):
    write_folder(tmp_path, pictures(2, 24))
    Image.fromarray(pictures(1, 40)[0]).crop((0, 0, 40, 32)).save(tmp_path / "000001.png")
    each = open_set(tmp_path, Options(resize_to=12))
    assert each.size == (12, 12)
    assert {each.source.read(i).shape for i in range(2)} == {(12, 12, 3)}


# What is wrong, as files; and what must be said.


def truncated_png(folder: Path) -> Path:
    write_folder(folder, pictures(3))
    (folder / "000001.png").write_bytes((folder / "000001.png").read_bytes()[:20])
    return folder


def text_as_png(folder: Path) -> Path:
    write_folder(folder, pictures(3))
    (folder / "000002.png").write_text("hello")
    return folder


def empty_png(folder: Path) -> Path:
    write_folder(folder, pictures(3))
    (folder / "000000.png").write_bytes(b"")
    return folder


def two_sizes(folder: Path) -> Path:
    write_folder(folder, pictures(3))
    Image.fromarray(pictures(1, 16)[0]).save(folder / "000002.png")
    return folder


def one_name_twice(folder: Path) -> Path:
    return write_folder(folder, pictures(2), ["1.png", "1.jpg"])


def broken_manifest(folder: Path) -> Path:
    write_folder(folder, pictures(3))
    (folder / "manifest.json").write_text("{")
    return folder


def npz(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return make


def truncated_npz(folder: Path) -> Path:
    path = npz(arr_0=pictures(20))(folder)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def npz_of_objects(folder: Path) -> Path:
    return npz(arr_0=np.array([{}], object))(folder)


def npz_with_a_lying_header(folder: Path) -> Path:
    """Announces a thousand images and holds three."""
    body = io.BytesIO()
    np.lib.format.write_array_header_1_0(body, {"descr": "|u1", "fortran_order": False, "shape": (1000, 12, 12, 3)})
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", body.getvalue() + pictures(3).tobytes())
    return folder / "x.npz"


def npz_with_text_inside(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    return folder / "x.npz"


def text_as_npz(folder: Path) -> Path:
    (folder / "x.npz").write_text("hello")
    return folder / "x.npz"


def bare_npy(folder: Path) -> Path:
    np.save(folder / "x.npy", pictures(3))
    return folder / "x.npy"


def bare_npy_called_npz(folder: Path) -> Path:
    bare_npy(folder).rename(folder / "x.npz")
    return folder / "x.npz"


MALFORMED = {
    "nothing there": (lambda folder: folder / "missing", r"no folder or file .*missing"),
    "an empty folder": (lambda folder: folder, r"hold no images"),
    "a folder without images": (lambda folder: (folder / "a.txt").write_text("x") and folder, r"hold no images"),
    "one image": (lambda folder: write_folder(folder, pictures(1)), r"at least 2 images, found 1 in"),
    "a truncated picture": (truncated_png, r"000001\.png cannot be read as an image"),
    "text called PNG": (text_as_png, r"000002\.png cannot be read as an image"),
    "an empty file": (empty_png, r"000000\.png cannot be read as an image"),
    "two sizes": (two_sizes, r"000000\.png is 12×12 and .*000002\.png is 16×16.*--resize-to"),
    "one name twice": (one_name_twice, r"two images called 1 with different extensions"),
    "a broken manifest": (broken_manifest, r"manifest\.json is not readable JSON"),
    "an .npz of nothing": (npz(), r"holds nothing; expected images under arr_0"),
    "an .npz of other things": (npz(images=pictures(3)), r"holds images; expected images under arr_0"),
    "float images": (npz(arr_0=pictures(3) / 255), r"arr_0 in .* is float64; uint8 in 0 … 255 is needed"),
    "int64 images": (npz(arr_0=pictures(3).astype(np.int64)), r"is int64; uint8"),
    "channels first": (npz(arr_0=pictures(3).transpose(0, 3, 1, 2)), r"\(3, 3, 12, 12\).*move the channels last"),
    "one picture without N": (npz(arr_0=pictures(1)[0]), r"has the shape \(12, 12, 3\); \(N, H, W, 3\) is needed"),
    "four channels": (npz(arr_0=np.zeros((3, 8, 8, 4), np.uint8)), r"\(3, 8, 8, 4\); \(N, H, W, 3\) is needed"),
    "no pixels": (npz(arr_0=np.zeros((3, 0, 8, 3), np.uint8)), r"\(3, 0, 8, 3\); \(N, H, W, 3\) is needed"),
    "an .npz of one image": (npz(arr_0=pictures(1)), r"at least 2 images, found 1 in"),
    "an .npz of no image": (npz(arr_0=pictures(3)[:0]), r"at least 2 images, found 0 in"),
    "a truncated .npz": (truncated_npz, r"cannot be read as an \.npz"),
    "an .npz with code": (npz_of_objects, r"cannot be read as an \.npz.*objects"),
    "a lying header": (npz_with_a_lying_header, r"cannot be read as an \.npz"),
    "text in an .npz": (npz_with_text_inside, r"cannot be read as an \.npz"),
    "text called .npz": (text_as_npz, r"cannot be read as an \.npz"),
    "an .npy": (bare_npy, r"neither a folder nor an \.npz"),
    "an .npy called .npz": (bare_npy_called_npz, r"cannot be read as an \.npz"),
    "statistics that do not fit": (npz(mu=np.zeros(3), sigma=np.eye(4)), r"\(3,\) and \(4, 4\)"),
    "statistics with NaN": (npz(mu=np.full(3, np.nan), sigma=np.eye(3)), r"not finite"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_input_gets_one_sentence_with_its_path(tmp_path: Path, what: str):
    make, sentence = MALFORMED[what]
    with pytest.raises(UserError, match=sentence) as caught:
        open_set(make(tmp_path), Options())
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_behind_the_header_is_found_when_the_picture_is_read(tmp_path: Path):
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    write_folder(tmp_path, np.stack([image, image]))
    whole = (tmp_path / "000001.png").read_bytes()
    (tmp_path / "000001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"000001\.png cannot be read as an image"):
        open_set(tmp_path, Options()).source.read(1)


# Which images are taken.


def labelled(counts: list[int]) -> Source:
    """A source with so many images of each class, sorted by class."""
    labels = tuple(np.repeat(np.arange(len(counts)), counts).tolist())
    return Source(Path("x"), tuple(str(i) for i in range(len(labels))), labels=labels)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 100), st.integers(0, 5))
def test_choice_keeps_classes_in_proportion(counts: list[int], count: int, seed: int):
    source = labelled(counts)
    count = min(count, len(source))
    chosen = choose(source, count, seed)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    taken = Counter(source.labels[i] for i in chosen)
    for label, size in enumerate(counts):
        assert abs(taken[label] - count * size / len(source)) < 1


def test_choice_is_seeded_and_never_just_the_first():
    source = labelled([50, 50])
    first, again, other = choose(source, 6, 0), choose(source, 6, 0), choose(source, 6, 1)
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    assert first.tolist() == [
        10,
        11,
        28,
        52,
        73,
        80,
    ]  # the same on every system and NumPy: published subsets must not move


def test_everything_is_taken_where_no_number_is_given():
    np.testing.assert_array_equal(choose(labelled([3, 4]), None), np.arange(7))


def test_more_than_there_is_must_be_allowed(tmp_path: Path):
    write_folder(tmp_path, pictures(3))
    with pytest.raises(UserError, match=r"holds 3 images, 5 were asked for; lower --num_images or pass --allow-fewer"):
        open_set(tmp_path, Options(num_images=5))
    each = open_set(tmp_path, Options(num_images=5, allow_fewer=True))
    assert each.count == 3
    assert each.warnings == (f"{tmp_path} holds only 3 of the 5 images asked for",)


def test_content_changes_with_a_byte_a_name_and_the_choice(tmp_path: Path):
    write_folder(tmp_path, pictures(4))
    everything, some = np.arange(4), np.arange(3)
    contents = [open_source(tmp_path).content(indices) for indices in (everything, some)]
    Image.fromarray(255 - pictures(4)[0]).save(tmp_path / "000000.png")
    contents.append(open_source(tmp_path).content(everything))
    (tmp_path / "000000.png").rename(tmp_path / "0.png")
    contents += [open_source(tmp_path).content(everything), open_source(tmp_path, 8).content(everything)]
    assert len(set(contents)) == 5
    assert open_source(tmp_path).content(everything) == contents[3]


def test_unknown_options_are_named():
    with pytest.raises(UserError, match="no metric 'fidd'; choose from fid, sfid"):
        Options(metrics=("fidd",))
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        Options(batch_size=0)


# Sets that must fit together.


def test_counterparts_are_found_by_name_whatever_the_order_and_the_kind(tmp_path: Path):
    images = pictures(12)
    fake = write_folder(tmp_path / "fake", images, [f"{i}.png" for i in range(12)])
    np.savez(tmp_path / "full.npz", images)
    inputs = open_inputs(None, fake, Options(("paired",), num_images=5, paired=tmp_path / "full.npz"))
    assert inputs.partners is not None
    for i, j in zip(inputs.fake.indices, inputs.partners.indices, strict=True):
        np.testing.assert_array_equal(inputs.fake.source.read(i), inputs.partners.source.read(j))


def test_missing_counterparts_are_counted_and_the_first_is_named(tmp_path: Path):
    fake, full = write_folder(tmp_path / "fake", pictures(5)), write_folder(tmp_path / "full", pictures(3))
    with pytest.raises(UserError, match=r"2 of 5 images of .*fake have no counterpart in .*full \(first: 000003\)"):
        open_inputs(None, fake, Options(("paired",), paired=full))


def test_counterparts_of_another_size_are_refused(tmp_path: Path):
    fake, full = write_folder(tmp_path / "fake", pictures(3)), write_folder(tmp_path / "full", pictures(3, 16))
    with pytest.raises(UserError, match=r"\(16, 16\), those of .* \(12, 12\)"):
        open_inputs(None, fake, Options(("paired",), paired=full))


def test_real_images_are_counterparts_only_by_equal_names_or_on_demand(tmp_path: Path):
    fake, real = write_folder(tmp_path / "fake", pictures(3)), write_folder(tmp_path / "real", pictures(4, seed=1))
    assert open_inputs(real, fake, Options()).partners is None
    assert open_inputs(real, fake, Options(("paired",))).partners is not None
    assert open_inputs(real, fake, Options(("fid",))).partners is None
    (real / "000003.png").unlink()
    assert open_inputs(real, fake, Options()).partners is not None


def test_what_is_missing_is_said(tmp_path: Path):
    fake = write_folder(tmp_path / "fake", pictures(3))
    with pytest.raises(UserError, match="fid, prc need --real_dir"):
        open_inputs(None, fake, Options(("fid", "prc")))
    with pytest.raises(UserError, match="need counterparts; give --paired_dir"):
        open_inputs(None, fake, Options(("paired",)))
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UserError, match="holds statistics only; --fake_dir must hold images"):
        open_inputs(fake, tmp_path / "s.npz", Options())
