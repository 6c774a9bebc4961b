"""Conversion, image files, grids and .npz files, compared with Pillow, NumPy and torchvision's rounding."""

import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svdit.errors import UserError
from svdit.images import (
    UINT8,
    center_crop,
    class_numbers,
    class_summary,
    grid,
    image_header,
    list_images,
    natural_key,
    read_image,
    scan_images,
    to_float,
    to_uint8,
    write_png,
)  # fmt: skip

GOLDEN = Path(__file__).parent / "golden"


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


@pytest.mark.parametrize(
    ("family", "rule"),
    [("sit", "half_up"), ("lightningdit", "half_up"), ("repa", "truncate"), ("jit", "half_even")],
)
def test_pixels_are_those_of_the_published_scripts(family: str, rule: str):
    golden = np.load(GOLDEN / family / "uint8.npz")
    x = torch.from_numpy(golden["float_in"]).view(1, 1, 1, -1)
    np.testing.assert_array_equal(to_uint8(x, rule)[0, 0, :, 0], golden["uint8_out"])
    assert all((to_uint8(x, other)[0, 0, :, 0] != golden["uint8_out"]).any() for other in set(UINT8) - {rule})


def test_natural_order():
    names = ["10.png", "9.png", "a2/1.png", "a10/1.png", "b.png", "01.png"]
    assert sorted(names, key=natural_key) == [
        "01.png", "9.png", "10.png", "a2/1.png", "a10/1.png", "b.png",
    ]  # fmt: skip
    for ties in (["1.png", "01.png", "001.png"], ["001.png", "01.png", "1.png"]):
        assert sorted(ties, key=natural_key) == ["001.png", "01.png", "1.png"]


def test_classes_are_numbered_in_natural_order():
    assert class_numbers(["10", "9", "cat", "9"]) == (("9", "10", "cat"), [1, 0, 2, 0])
    assert class_summary(("9", "10", "cat")) == "3 classes: 9 … cat"
    assert class_summary(("cat",)) == "1 class: cat"


def test_listing_includes_subfolders_and_ignores_other_files(tmp_path: Path):
    for name in ("b/2.PNG", "b/10.png", "a.jpeg", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a.jpeg", "b/2.PNG", "b/10.png"]
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "missing")


def make(folder: Path, *names: str) -> Path:
    for name in names:
        write_png(folder / name, random_image())
    return folder


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


@pytest.mark.parametrize("name", [".hidden", "__MACOSX", "@eaDir", "x/.ipynb_checkpoints", ".a/b/c"])
def test_nothing_below_hidden_and_system_folders_is_listed(tmp_path: Path, name: str):
    root = tmp_path / ".cache"  # of the folder itself, the name does not matter
    assert names(make(root, "1.png", "x/2.png", f"{name}/3.png", f"{name}/d/4.png")) == ["1.png", "x/2.png"]


def test_links_to_folders_and_images_are_followed(tmp_path: Path):
    make(tmp_path, "store/a/1.png", "store/b/2.png", "root/c/3.png", "single.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "root" / "b").symlink_to("../store/b")
    (tmp_path / "root" / "c" / "4.png").symlink_to(tmp_path / "single.png")
    assert names(tmp_path / "root") == ["a/1.png", "b/2.png", "c/3.png", "c/4.png"]
    (tmp_path / "door").symlink_to(tmp_path / "root")
    assert names(tmp_path / "door") == names(tmp_path / "root")


def test_links_never_lead_in_circles_nor_out_of_the_folder_upwards(tmp_path: Path):
    root = make(tmp_path, "root/x/1.png", "root/y/2.png", "outside.png") / "root"
    for link, target in (("x/up", "../.."), ("x/here", "."), ("x/y", "../y"), ("y/x", "../x")):
        (root / link).symlink_to(target)
    for i in range(12):  # each of which leads to all others
        make(tmp_path, f"many/{i}/image.png")
        (root / f"many{i}").symlink_to(tmp_path / "many" / str(i))
        for j in range(12):
            (tmp_path / "many" / str(i) / f"to{j}").symlink_to(tmp_path / "many" / str(j))
    files, skipped = scan_images(root)
    assert len(files) == len({file.resolve() for file in files}) == 14
    assert skipped == f"{4 + 144} repeated folders"


def test_a_second_name_of_a_folder_is_not_read_again(tmp_path: Path):
    make(tmp_path, "run3/1.png")
    (tmp_path / "latest").symlink_to("run3")
    assert scan_images(tmp_path) == ([tmp_path / "run3" / "1.png"], "1 repeated folder")


@pytest.mark.parametrize("name", ["broken.png", "class", "loop.png"])
def test_broken_links_are_named(tmp_path: Path, name: str):
    make(tmp_path, "1.png")
    (tmp_path / name).symlink_to(name if name == "loop.png" else "nowhere")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name} is a broken link; repair or remove it")):
        list_images(tmp_path)


def test_broken_links_to_other_files_are_counted(tmp_path: Path):
    make(tmp_path, "1.png")
    (tmp_path / "notes.txt").symlink_to("nowhere")
    assert scan_images(tmp_path)[1] == "1 broken link"


def test_files_that_are_not_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, "1.png")
    for name in ("a.gif", "b.GIF", "c/d.avif", "e.txt", ".f.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket.jpg")
    files, skipped = scan_images(tmp_path)
    assert (files, skipped) == ([tmp_path / "1.png"], "1 .avif file, 2 .gif files, 2 special files")


def test_closed_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def closed(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=re.escape(f"cannot read {tmp_path} (Permission denied); change")):
        list_images(tmp_path)


MODES = [("RGB", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("1", "bmp"),
         ("PA", "tif"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "tif"), ("RGB", "webp")]  # fmt: skip


@pytest.mark.parametrize(("mode", "extension"), MODES)
def test_every_mode_of_8_bits_is_read_as_rgb(tmp_path: Path, mode: str, extension: str):
    image = Image.fromarray(random_image(8, 8).repeat(8, 0).repeat(8, 1)).convert(mode)
    path = tmp_path / f"x.{extension}"
    image.save(path, **({"quality": 100} if extension == "jpg" else {"lossless": True} if extension == "webp" else {}))
    assert image_header(path).size == (64, 64)
    error = read_image(path).astype(int) - np.asarray(image.convert("RGB"))
    assert abs(error).mean() <= (5 if extension == "jpg" else 0)


def test_transparency_of_a_palette_is_dropped(tmp_path: Path):
    image = Image.fromarray(random_image()).convert("P")
    image.save(tmp_path / "x.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.asarray(image.convert("RGB")))


DEEP = np.random.RandomState(0).randint(0, 65536, (5, 7)).astype(np.uint16)
DEEP[0, :2] = 0, 65535


def twelve_bits(path: Path) -> None:
    """A TIFF of 12 bits per sample, which Pillow reads and does not write: every pixel twice, in 3 bytes."""
    rows = bytes(b for x in (DEEP >> 4).flatten().tolist() for b in (x >> 4, (x & 15) << 4 | x >> 8, x & 255))
    tags = {256: 14, 257: 5, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 5, 279: len(rows)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHLH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    path.write_bytes(header.ljust(200, b"\0") + rows)


SIXTEEN: dict[str, Callable[[Path], object]] = {
    "a.png": lambda path: Image.fromarray(DEEP).save(path),
    "b.tif": lambda path: Image.fromarray(DEEP).save(path),
    "c.tif": lambda path: Image.frombytes("I;16B", (7, 5), DEEP.astype(">u2").tobytes()).save(path),
    "d.pgm": lambda path: Image.fromarray(DEEP).save(path),
    "e.tif": lambda path: Image.fromarray(65535 - DEEP).save(path, tiffinfo={262: 0}),
    "f.tif": twelve_bits,
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_grey_of_16_bits_is_what_it_shows_in_8(tmp_path: Path, name: str):
    SIXTEEN[name](tmp_path / name)
    image = read_image(tmp_path / name)
    image = image[:, ::2] if name == "f.tif" else image
    np.testing.assert_array_equal(image, (DEEP >> 8).astype(np.uint8)[..., None].repeat(3, 2))


RANGELESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "float.tif": (lambda path: Image.fromarray(np.float32(DEEP / 65535)).save(path), "mode F .* from 0.0 to 1.0"),
    "int.tif": (lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path), "mode I .* from 0 to 65535"),
    "lab.tif": (lambda path: Image.frombytes("LAB", (2, 2), bytes(range(12))).save(path), "mode LAB"),
    "float.pgm": (lambda path: path.write_bytes(b"Pf 1 1 -1.0\n" + bytes(4)), "mode F"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGELESS)
@pytest.mark.parametrize("read", [read_image, image_header])
def test_modes_without_a_range_are_refused_with_what_they_hold(tmp_path: Path, name: str, read):
    write, message = RANGELESS[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)} has {message}"):
        read(tmp_path / name)


def eps(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n%%EOF\n")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "EPS": (eps, "it is no PNG, JPEG"),
    "GIF": (lambda path: Image.fromarray(random_image()).save(path, format="GIF"), "it is no PNG, JPEG"),
    "too many pixels": (lambda path: path.write_bytes(b"P6 60000 60000 255\n"), "Image size .* exceeds limit"),
    "a long header": (lambda path: path.write_bytes(b"P6 9000 9000 255\n\0\0\0"), "declares 324 MB in 20 bytes"),
    "a flat WebP": (
        lambda path: Image.new("RGB", (5000, 5000)).save(path, format="WEBP", lossless=True, method=0),
        "declares 100 MB in",
    ),
    "a flat TIFF": (
        lambda path: Image.new("L", (5000, 5000)).save(path, format="TIFF", compression="tiff_deflate"),
        "declares 100 MB in",
    ),
    "a pipe": (os.mkfifo, "it is not a file"),
    "nothing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("read", [read_image, image_header])
def test_hostile_files_start_no_program_and_are_not_decoded(
    tmp_path: Path, kind: str, read, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started, or memory for an image allocated")

    write, message = HOSTILE[kind]
    write(tmp_path / "x.png")
    for place in ("subprocess.Popen", "PIL.EpsImagePlugin.Ghostscript", "PIL.ImageFile.ImageFile.load_prepare"):
        monkeypatch.setattr(place, refuse)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "x.png")
    assert str(tmp_path / "x.png") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_strip_is_not_scaled_to_gigabytes():
    with pytest.raises(UserError, match=r"x\.png has 60000×1 pixels .*cropped to 256; crop or remove it"):
        center_crop(np.zeros((1, 60000, 3), np.uint8), 256, "x.png")
    assert center_crop(np.zeros((1, 60, 3), np.uint8), 256).shape == (256, 256, 3)


def test_no_damage_of_a_file_is_a_traceback(tmp_path: Path):
    """Cut, and with random bytes in the place of others, in every format."""
    random, messages = np.random.default_rng(0), []
    for extension in ("png", "jpg", "webp", "bmp", "tif", "ppm"):
        path = tmp_path / f"x.{extension}"
        Image.fromarray(random_image(16, 16)).save(path)
        whole = path.read_bytes()
        for n in range(40):
            damaged = bytearray(whole[: random.integers(1, len(whole))] if n % 2 else whole)
            damaged[int(random.integers(min(200, len(damaged))))] = int(random.integers(256))
            path.write_bytes(damaged)
            try:
                assert read_image(path).dtype == np.uint8
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith(str(tmp_path)) for message in messages)


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
