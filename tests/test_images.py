"""Conversion, image files, grids and .npz files, compared with Pillow, NumPy and torchvision's rounding."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svdit.errors import UserError
from svdit.images import (
    center_crop,
    grid,
    image_header,
    list_images,
    natural_key,
    read_image,
    to_float,
    to_uint8,
    write_png,
)  # fmt: skip


def random_image(height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_every_level_survives_the_round_trip_through_floats():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels)


def test_rounding_is_half_up_as_in_torchvision():
    x = torch.linspace(-1.2, 1.2, 4001).view(1, 1, 1, -1)
    expected = ((x + 1) / 2 * 255 + 0.5).clamp(0, 255).to(torch.uint8)  # torchvision.utils.save_image
    assert (to_uint8(x)[..., 0] != expected[:, 0].numpy()).mean() < 1e-3  # ties of float32 aside
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert to_uint8(x).shape == (1, 1, 4001, 3)  # grey is written as RGB


def test_natural_order():
    names = ["10.png", "9.png", "a2/1.png", "a10/1.png", "b.png", "01.png"]
    assert sorted(names, key=lambda name: natural_key(Path(name))) == [
        "01.png", "9.png", "10.png", "a2/1.png", "a10/1.png", "b.png",
    ]  # fmt: skip


def test_listing_includes_subfolders_and_ignores_other_files(tmp_path: Path):
    for name in ("b/2.PNG", "b/10.png", "a.jpeg", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a.jpeg", "b/2.PNG", "b/10.png"]
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "missing")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
def test_every_mode_is_read_as_rgb(tmp_path: Path, mode: str):
    grey = np.zeros((4, 6), np.uint16) if mode == "I;16" else None
    image = Image.fromarray(grey) if grey is not None else Image.fromarray(random_image(4, 6)).convert(mode)
    image.save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (4, 6, 3)
    assert image_header(tmp_path / "x.png")[0] == (4, 6)


@pytest.mark.parametrize("read", [read_image, image_header])
def test_unreadable_images_are_named(tmp_path: Path, read):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'x.png'} cannot be read as an image")):
        read(tmp_path / "x.png")


def test_png_is_lossless(tmp_path: Path):
    write_png(tmp_path / "new" / "x.png", random_image())
    np.testing.assert_array_equal(read_image(tmp_path / "new" / "x.png"), random_image())


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3))
def test_grid_contains_every_image_in_order(n: int, columns: int, pad: int, scale: int):
    images = np.stack([random_image(3, 2, seed=i) for i in range(n)])
    canvas = grid(images, columns, pad, scale)
    for i, image in enumerate(images):
        top, left = (i // columns) * (3 * scale + pad) + pad, (i % columns) * (2 * scale + pad) + pad
        np.testing.assert_array_equal(canvas[top : top + 3 * scale : scale, left : left + 2 * scale : scale], image)
    rows = -(-n // columns)
    assert canvas.shape == (rows * (3 * scale + pad) + pad, columns * (2 * scale + pad) + pad, 3)


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (16, 16), (15, 30), (100, 33)])
def test_center_crop_is_the_middle_at_the_size(height: int, width: int):
    ramp = np.add.outer(np.arange(height), np.arange(width)).astype(np.float64)
    ramp = (ramp / ramp.max() * 255).astype(np.uint8)[..., None].repeat(3, 2)
    cropped = center_crop(ramp, 16)
    assert cropped.shape == (16, 16, 3)
    assert float(cropped.mean()) == pytest.approx(float(ramp.mean()), abs=6)  # a ramp's middle has its mean
    if (height, width) == (16, 16):
        np.testing.assert_array_equal(cropped, ramp)
