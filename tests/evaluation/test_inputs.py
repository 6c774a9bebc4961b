"""Sets that belong together: counterparts by name, overlaps, and what is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svdit.errors import UserError
from svdit.evaluation.inputs import open_inputs
from svdit.evaluation.options import Options
from svdit.evaluation.protocol import input_warnings

from .conftest import make_images, write_folder


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


def test_another_reference_than_the_protocols_is_a_warning(tmp_path: Path):
    real, fake = (write_folder(tmp_path / name, make_images(3, seed=i)) for i, name in enumerate(("real", "fake")))
    for reference, warnings in (("ref.npz", ["figures of dit-250 are against ref.npz, not real"]), ("real", [])):
        record = {"tool": "svdit", "protocol": "dit-250", "reference": reference}
        (fake / "manifest.json").write_text(json.dumps(record))
        assert input_warnings(open_inputs(real, fake, Options(("fid",))), None, ()) == warnings


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
