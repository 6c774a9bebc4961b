"""Every example once per epoch, the same for any world size; images equal their files."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svdit.errors import UserError
from svdit.images import write_png
from svdit.training import data
from svdit.training.data import AUGMENTATIONS, Examples, LabelledImages, batches, load, order, share

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(256, size=(6, 8, 8, 3), dtype=np.uint8)


def plain(size: int) -> LabelledImages:
    """Image i is filled with i and has label i."""
    return LabelledImages(lambda i: torch.full((1, 2, 2), float(i)), np.arange(size), size, 1)


def test_the_split_of_the_digits_is_fixed() -> None:
    training, held_out = data.digits()
    a, b = (torch.stack([p.read(i) for i in range(len(p))]) for p in (training, held_out))
    assert (len(training), len(held_out)) == (1438, 359)
    assert a.shape[1:] == (1, 8, 8)
    assert set(torch.cat([a, b]).unique().tolist()) == {level / 8 - 1 for level in range(17)}
    assert torch.cdist(a.flatten(1), b.flatten(1)).min() > 0
    assert set(held_out.labels) == set(training.labels) == set(range(10))
    assert held_out.labels[:8].tolist() == HELD_OUT_LABELS


HELD_OUT_LABELS = [2, 8, 2, 6, 6, 7, 1, 9]


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 50))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    assert sorted(order(seed, epoch, size)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    assert len({tuple(order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9


def test_processes_share_the_examples_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [list(share(step, 6)) for step in range(4)]
    assert [n for numbers in alone for n in numbers] == list(range(24))
    monkeypatch.setattr("svdit.distributed.world_size", lambda: 3)
    for step in range(4):
        together = []
        for rank in range(3):
            monkeypatch.setattr("svdit.distributed.rank", lambda rank=rank: rank)
            together += share(step, 6)
        assert together == alone[step]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_cover_epochs_of_other_sizes(workers: int) -> None:
    loaded = list(batches(Examples(plain(10), 0, "none"), range(5), 4, workers))
    labels = torch.cat([y for _, y in loaded])
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert torch.equal(torch.cat([x for x, _ in loaded])[:, 0, 0, 0].long(), labels)
    later = list(batches(Examples(plain(10), 0, "none"), range(3, 5), 4, 0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loaded[3:], later, strict=True))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_depend_on_the_example_alone(name: str) -> None:
    image = torch.arange(32.0).view(2, 4, 4)
    examples = Examples(LabelledImages(lambda i: image, np.zeros(3, dtype=np.int64), 1, 2), 0, name)
    augmented = [examples[n][0] for n in range(40)]
    assert all(x.shape == image.shape for x in augmented)
    assert torch.equal(augmented[7], examples[7][0])
    assert len({tuple(x.flatten().tolist()) for x in augmented}) == {"none": 1, "flip": 2, "shift": 9}[name]


def test_shift_moves_by_one_and_flip_mirrors() -> None:
    image = torch.full((1, 5, 5), -1.0)
    image[0, 2, 1] = 1
    examples = [AUGMENTATIONS["shift"](image, np.random.default_rng(n)) for n in range(60)]
    assert {tuple(x[0].nonzero()[x[0][x[0] != 0].eq(1)][0].tolist()) for x in examples} == {
        (y, x) for y in (1, 2, 3) for x in (0, 1, 2)
    }
    flipped = [AUGMENTATIONS["flip"](image, np.random.default_rng(n)) for n in range(20)]
    assert {int(x[0, 2].argmax()) for x in flipped} == {1, 3}


def test_folder_of_class_folders(tmp_path: Path) -> None:
    for name, pixels in (("b/2.png", 0), ("b/10.png", 1), ("a/x/1.png", 2), ("a/y.png", 3)):
        write_png(tmp_path / name, COLOURS[pixels])
    (tmp_path / "notes.txt").write_text("no class")
    images = load(str(tmp_path), 8)
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.num_classes == 2
    for i, pixels in enumerate((2, 3, 0, 1)):
        assert torch.equal(images.read(i), as_float(COLOURS[pixels]))


def write(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write_png(folder / name, COLOURS[i % len(COLOURS)])
    return folder


def test_classes_are_in_natural_order(tmp_path: Path) -> None:
    names = [f"{i}/x.png" for i in (10, 2, 0, 11, 1)]
    images = load(str(write(tmp_path, *names)), 8)
    assert images.classes == ("0", "1", "2", "10", "11")
    assert torch.equal(images.read(2), as_float(COLOURS[1]))
    assert images.summary() == "5 images in 5 classes: 0 … 11"


def test_padded_and_alphabetic_classes_are_numbered_as_before(tmp_path: Path) -> None:
    names = ["n01440764", "n01443537", "n02102040", "apple", "Bear", "cat_b", "cat-a", "007", "010"]
    images = load(str(write(tmp_path, *(f"{name}/x.png" for name in names))), 8)
    assert images.classes == tuple(path.name for path in sorted(tmp_path.iterdir()))


def test_only_folders_with_images_are_classes(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/2.png", "cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "3.png", "4.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").touch()
    (tmp_path / "dog" / "a.gif").touch()
    images = load(str(tmp_path), 8)
    assert images.labels.tolist() == [0, 1]
    assert (images.num_classes, images.classes) == (2, ("cat", "dog"))
    assert images.notes == (
        "folders without images are no classes: annotations",
        "2 images beside the class folders are not used",
        "skipped 1 .gif file",
    )


def test_linked_classes_are_classes(tmp_path: Path) -> None:
    write(tmp_path, "store/b/1.png", "data/a/2.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "store" / "b")
    assert load(str(tmp_path / "data"), 8).classes == ("a", "b")


def test_the_parent_of_train_and_val_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "val") for name in ("cat", "dog")))
    message = (
        r"train has no images of its own but 2 folders of images \(cat, …\), .*pass the folder of the class folders"
    )
    with pytest.raises(UserError, match=message):
        load(str(tmp_path), 8)
    with pytest.raises(UserError, match="train has no images of its own"):
        load(str(write(tmp_path / "more", "x/1.png", "train/cat/1.png", "train/dog/1.png")), 8)
    stray = write(tmp_path / "stray", *(f"a/{name}.png" for name in ("cat/1", "cat/2", "dog/1", "preview")), "b/1.png")
    with pytest.raises(UserError, match=r"a has 1 images of its own but 2 folders of images"):
        load(str(stray), 8)
    for names in (("train/cat/1", "val/cat/2"), ("train/1", "Test/2")):
        splits = write(tmp_path / names[0].replace("/", "-"), *(f"{name}.png" for name in names))
        with pytest.raises(UserError, match=r"are parts of a data set \(.*\), not classes; pass one of them"):
            load(str(splits), 8)
    nested = write(tmp_path / "nested", "cat/images/1.png", "dog/images/2.png")  # as in Tiny ImageNet
    assert load(str(nested), 8).classes == ("cat", "dog")


def test_the_fingerprint_changes_with_names_and_sizes(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return load(str(tmp_path), 8).fingerprint

    write(tmp_path, "a/1.png", "b/2.png")
    seen = [fingerprint()]
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "3.png")
    seen.append(fingerprint())
    (tmp_path / "a").rename(tmp_path / "c")
    seen.append(fingerprint())
    write_png(tmp_path / "b" / "2.png", np.zeros((8, 8, 3), np.uint8))
    seen.append(fingerprint())
    assert len(set(seen)) == 4
    assert fingerprint() == seen[-1]
    for labels in (range(6), [0, 1, 2, 3, 5, 4]):
        np.savez(tmp_path / "a.npz", arr_0=COLOURS, labels=labels)
        seen.append(load(str(tmp_path / "a.npz"), 8).fingerprint)
    assert len(set(seen)) == 6


LABELS: dict[str, tuple[Any, str]] = {
    "below 0": ([0, 1, 2, 3, -1, -2], r"labels\[4\] of .*a\.npz is -1; labels must be integers from 0 to 999"),
    "huge": ([0, 1, 10**9, 3, 4, 5], r"labels\[2\] of .* is 1000000000; .* or more with --num-classes"),
    "halves": (np.arange(6) + 0.5, r"labels\[0\] of .* is 0\.5"),
    "NaN": ([0, 1, np.nan, 3, 4, 5], r"labels\[2\] of .* is nan"),
    "one-hot": (np.eye(6), r"labels of .* is float64 \(6, 6\); it must be integers \(N,\)"),
    "a column": (np.arange(6)[:, None], r"labels of .* is int64 \(6, 1\)"),
    "words": (["cat", "dog"] * 3, r"labels of .* is <U3 \(6,\)"),
    "one number": (3, r"labels of .* is int64 \(\)"),
    "truth": ([True, False] * 3, r"labels of .* is bool"),
    "too few": ([0, 1], "6 images and 2 labels"),
    "objects": (np.array([{}] * 6, object), "Python objects"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("key", ["labels", "arr_1"])
def test_unusable_labels_are_found_at_once(tmp_path: Path, kind: str, key: str) -> None:
    labels, message = LABELS[kind]
    np.savez(tmp_path / "a.npz", arr_0=COLOURS, **{key: labels})
    with pytest.raises(UserError, match=message.replace("labels", key, 1) if message.startswith("labels") else message):
        load(str(tmp_path / "a.npz"), 8)


def test_labels_are_integers_below_the_number_of_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=COLOURS, arr_1=np.array([1.0, 2, 3, 1, 2, 9]))  # whole floats, ADM's key
    images = load(str(tmp_path / "a.npz"), 8)
    assert (images.labels.tolist(), images.labels.dtype, images.num_classes) == ([1, 2, 3, 1, 2, 9], np.int64, 10)
    assert images.notes == ("classes without images (6 of 10): 0, 4, 5, 6, 7, …",)
    assert load(str(tmp_path / "a.npz"), 8, num_classes=12).num_classes == 12
    with pytest.raises(UserError, match=r"arr_1\[5\] of .* is 9\.0; labels must be integers from 0 to 8$"):
        load(str(tmp_path / "a.npz"), 8, num_classes=9)


def test_an_archive_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=COLOURS[:0], labels=np.arange(0))
    with pytest.raises(UserError, match=r"arr_0 of .* is uint8 \(0, 8, 8, 3\)"):
        load(str(tmp_path / "a.npz"), 8)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0, 64, 32], "ascending"), ([-1, 64], "ascending"), ([0], "ascending"), ([[0, 64]], "ascending"),
     ([0.0, 64.0], "ascending"), ([0, 65], r"jpeg of .* is uint8 \(64,\); it must be uint8 \(65,\)")],
)  # fmt: skip
def test_offsets_outside_the_files_are_refused(tmp_path: Path, offsets: list[int], message: str) -> None:
    np.savez(tmp_path / "a.npz", jpeg=np.zeros(64, np.uint8), offsets=offsets, labels=np.zeros(1))
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "a.npz"), 8)


def as_float(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def test_npz_with_arr_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=COLOURS, labels=[0, 1, 2, 0, 1, 4])
    images = load(str(tmp_path / "a.npz"), 8)
    assert (len(images), images.num_classes, images.channels) == (6, 5, 3)
    torch.testing.assert_close(images.read(4), as_float(COLOURS[4]))


def test_npz_with_names_of_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=COLOURS, labels=[0, 1, 2, 0, 1, 2], classes=["cat", "dog", "owl"])
    assert load(str(tmp_path / "a.npz"), 8).classes == ("cat", "dog", "owl")
    with pytest.raises(UserError, match=r"classes of .*a\.npz is <U3 \(3,\); it must be 4 names"):
        load(str(tmp_path / "a.npz"), 8, num_classes=4)


def test_npz_with_jpeg(tmp_path: Path) -> None:
    files = []
    for pixels in COLOURS:
        files.append(io.BytesIO())
        Image.fromarray(pixels).save(files[-1], format="JPEG", quality=95)
    blobs = [np.frombuffer(file.getvalue(), np.uint8) for file in files]
    offsets = np.cumsum([0, *map(len, blobs)])
    np.savez(tmp_path / "a.npz", jpeg=np.concatenate(blobs), offsets=offsets, labels=np.arange(6, dtype=np.uint8))
    images = load(str(tmp_path / "a.npz"), 8)
    for i, file in enumerate(files):
        assert torch.equal(images.read(i), as_float(np.array(Image.open(file))))


def test_images_of_any_size_are_halved_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = COLOURS[1]
    np.savez(tmp_path / "a.npz", arr_0=np.stack([wide, wide]), labels=np.arange(2))
    assert torch.equal(load(str(tmp_path / "a.npz"), 8).read(1), as_float(COLOURS[1]))
    halved = COLOURS[1].astype(float).reshape(4, 2, 4, 2, 3).mean((1, 3))
    error = 127.5 * (load(str(tmp_path / "a.npz"), 4).read(0) + 1) - torch.from_numpy(halved).permute(2, 0, 1)
    assert 0 < error.abs().max() <= 1  # each of the two passes rounds
    assert load(str(tmp_path / "a.npz"), 16).read(0).shape == (3, 16, 16)


def test_a_strip_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "a" / "x.png", np.zeros((1, 60000, 3), np.uint8))
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1, 1, 60000, 3), np.uint8), labels=[0])
    for source, name in ((tmp_path, r"a/x\.png"), (tmp_path / "a.npz", r"image 0 of .*a\.npz")):
        with pytest.raises(UserError, match=rf"{name} has 60000×1 pixels"):
            load(str(source), 256).read(0)


def test_a_damaged_jpeg_is_an_error(tmp_path: Path) -> None:
    rubbish = np.arange(64, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", jpeg=rubbish, offsets=np.array([0, 64]), labels=np.zeros(1))
    with pytest.raises(UserError, match=r"image 0 of .*a\.npz cannot be read"):
        load(str(tmp_path / "a.npz"), 8).read(0)


def test_unusable_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no nowhere; pass a folder"):
        load("nowhere", 8)
    with pytest.raises(UserError, match="no class folders with images"):
        load(str(tmp_path), 8)
    np.savez(tmp_path / "a.npz", arr_0=COLOURS)
    with pytest.raises(UserError, match=r"holds arr_0; it needs labels \(or arr_1\)"):
        load(str(tmp_path / "a.npz"), 8)
    np.savez(tmp_path / "a.npz", arr_0=COLOURS, labels=[1])
    with pytest.raises(UserError, match="6 images and 1 labels"):
        load(str(tmp_path / "a.npz"), 8)
    np.savez(tmp_path / "a.npz", arr_0=COLOURS[..., 0], labels=range(6))
    with pytest.raises(UserError, match=r"is uint8 \(6, 8, 8\); it must be uint8 \(N, H, W, 3\)"):
        load(str(tmp_path / "a.npz"), 8)
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="cannot be read as an"):
        load(str(tmp_path / "a.npz"), 8)
