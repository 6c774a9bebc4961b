"""Sheets: every image is where its row and column are, text stays beside the images, differences are visible."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from svdit import sheet as sheets
from svdit.images import Pixels
from svdit.sheet import compared, difference, fitted, font, sheet, visible_gain

COLOURS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 0, 200], [0, 200, 200], [200, 200, 0]], np.uint8)


def images(count: int, height: int, width: int, first: int = 0) -> list[Pixels]:
    return [np.tile(COLOURS[first + i], (height, width, 1)) for i in range(count)]


def boxes(pixels: Pixels, colour: Pixels) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has this colour."""
    y, x = np.nonzero((pixels == colour).all(-1))
    assert len(y) == (np.ptp(y) + 1) * (np.ptp(x) + 1)  # nothing is drawn over it
    return int(y.min()), int(x.min()), int(np.ptp(y)) + 1, int(np.ptp(x)) + 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 96), (700, 900)])
def test_images_are_aligned_in_rows_and_columns_and_keep_their_shape(height: int, width: int) -> None:
    rows = [("full precision", images(3, height, width)), ("w4a8\n48.2 dB", images(3, height, width, 3))]
    drawn = sheet("Title", "about", rows, ("class", ["0", "1", "2"]), ["a note"])
    places = [boxes(drawn, colour) for colour in COLOURS]
    above, below = places[:3], places[3:]
    assert [box[1] for box in above] == [box[1] for box in below]
    assert len({box[0] for box in above}) == len({box[0] for box in below}) == 1
    assert len({box[2:] for box in places}) == 1
    _, _, tall, wide = places[0]
    assert tall / wide == pytest.approx(height / width, rel=0.01)
    assert 500 < 3 * wide <= sheets.WIDE
    if wide >= width:
        assert wide % width == 0


def test_there_is_text_above_left_of_and_below_the_images() -> None:
    plain = sheet("", "", [("", images(2, 8, 8))])
    full = sheet("Title", "about", [("label", images(2, 8, 8))], ("class", ["3", "4"]), ["note"])
    top, left, height, _ = boxes(full, COLOURS[0])
    for part in (full[:top, :left], full[:top, left:], full[top : top + height, :left], full[top + height :]):
        assert (part < 100).any()
    assert full[:, :4].min() == full[:, -4:].min() == full[:4].min() == full[-4:].min() == 255  # margins
    assert plain.shape[0] < full.shape[0] and plain.shape[1] < full.shape[1]


@pytest.mark.parametrize("matplotlib", [True, False])
def test_text_fits_with_either_font(matplotlib: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    letters = font(20)
    assert isinstance(letters, ImageFont.FreeTypeFont)
    assert ("DejaVu" in str(letters.getname())) == matplotlib
    text = "32.1 dB, seed 7\na photograph of a very long street in an unpronounceableunpronounceable town"
    lines = fitted(text, letters, 160)
    assert lines[0] == "32.1 dB, seed 7" and len(lines) == 3 and lines[-1].endswith("…")
    assert all(letters.getlength(line) <= 160 for line in lines)
    assert fitted("short", letters, 160) == ["short"]
    assert fitted("difference × 8\n名\x07", letters, 160) == (
        ["difference × 8", "名\\x07"] if matplotlib else ["difference x 8", "?\\x07"]
    )


def test_long_labels_leave_most_of_the_width_to_the_images() -> None:
    drawn = sheet(
        "Title", "about", [("name" * 60, images(3, 8, 8)), ("a label of several words " * 9, images(3, 8, 8))]
    )
    assert drawn.shape[1] < 1.6 * 3 * boxes(drawn[: drawn.shape[0] // 2], COLOURS[0])[3]


def test_differences_are_signed_around_grey() -> None:
    a = np.full((1, 2, 2, 3), 100, np.uint8)
    b = a + np.array([[[0], [3]], [[200 - 256], [1]]], np.int16).astype(np.uint8)
    assert difference(b, a, 8)[0, :, :, 0].tolist() == [[128, 152], [0, 136]]


@pytest.mark.parametrize(("level", "gain"), [(1, 64), (2, 32), (5, 16), (40, 2), (200, 1)])
def test_the_gain_makes_differences_visible(level: int, gain: int) -> None:
    before, change = images(2, 8, 8), np.uint8(level)
    after = [np.where(image > 100, image - change, image + change).astype(np.uint8) for image in before]
    rows = compared(before, {"generated": after})
    assert [label for label, _ in rows] == ["full precision", "generated", f"difference\n× {gain}"]
    assert all(abs(pixels.astype(int) - sheets.GREY).min() >= 40 for pixels in rows[2][1])
    assert visible_gain(0.0) == 64


def test_variants_have_one_gain_that_of_the_one_which_differs_most() -> None:
    before, small, large = images(2, 8, 8), np.uint8(1), np.uint8(5)
    rows = compared(before, {"a": [x + small for x in before], "b": [x + large for x in before]}, "DiT")
    assert [label for label, _ in rows] == ["DiT", "a", "difference\n× 16", "b", "difference\n× 16"]
    assert [int(pixels[0].max()) for _, pixels in rows[2::2]] == [sheets.GREY + 16, sheets.GREY + 80]
    assert compared(before, {"a": before}, gain=3)[2][0] == "difference\n× 3"


def test_a_sheet_is_a_valid_png(tmp_path: Path) -> None:
    drawn = sheet("One image", "DiT", [("", images(1, 12, 12))])
    Image.fromarray(drawn).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn)
