"""Every example once per epoch, the same for any world size; images equal their files."""

import io
from pathlib import Path

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


def as_float(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def test_npz_with_arr_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=COLOURS, labels=[0, 1, 2, 0, 1, 4])
    images = load(str(tmp_path / "a.npz"), 8)
    assert (len(images), images.num_classes, images.channels) == (6, 5, 3)
    torch.testing.assert_close(images.read(4), as_float(COLOURS[4]))


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


def test_a_damaged_jpeg_is_an_error(tmp_path: Path) -> None:
    rubbish = np.arange(64, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", jpeg=rubbish, offsets=np.array([0, 64]), labels=np.zeros(1))
    with pytest.raises(UserError, match=r"image 0 of .*a\.npz cannot be read"):
        load(str(tmp_path / "a.npz"), 8).read(0)


def test_unusable_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot train on nowhere; pass a folder"):
        load("nowhere", 8)
    with pytest.raises(UserError, match="no class folders with images"):
        load(str(tmp_path), 8)
    np.savez(tmp_path / "a.npz", arr_0=COLOURS)
    with pytest.raises(UserError, match="holds arr_0; it needs labels"):
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
