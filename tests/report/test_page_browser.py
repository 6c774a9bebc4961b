"""The report page in Chromium: sorting, filters, sliders, keyboard; no error, no request, no sideways scrolling."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pages
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from svdit.report import page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; install Debian's chromium package"),
]
ROWS = "[...document.querySelectorAll('#layer-table tbody tr')].filter(row => !row.hidden)"
CELLS = ROWS + ".map(row => row.cells[{}].textContent)"
TILES = "[...document.querySelectorAll('.tile')].map(t => t.querySelector('figcaption').textContent)"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    pages.write_all(root / "runs")
    page.write_page([root / "runs"], root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def browser(tab: Browser, html: Path) -> Iterator[Browser]:
    """The page, freshly opened; at the end nothing else was requested, and the console has no error."""
    tab.requests.clear()
    tab.open(html)
    yield tab
    assert tab.problems == []
    assert {request.partition(":")[0] for request in tab.requests} == {"file", "data"}
    assert [request for request in tab.requests if request.startswith("file:")] == [html.as_uri()]


def test_headings_sort_up_then_down_and_unknown_values_come_last(browser: Browser) -> None:
    column = page.tables.COLUMNS
    sqnr = list(column).index("SQNR, dB")
    heading = f"#layer-table th:nth-child({sqnr + 1})"
    browser.click(f"{heading} button")
    assert browser.run(f"document.querySelector({heading!r}).ariaSort") == "ascending"
    assert browser.run(CELLS.format(sqnr)) == [
        *sorted(["9.5", "35.0", "38.0", "40.0", "100.0"] * 2, key=float),
        "–",
        "–",
    ]
    browser.click(f"{heading} button")
    assert browser.run(CELLS.format(sqnr))[:3] == ["100.0", "100.0", "40.0"]
    assert browser.run(CELLS.format(sqnr))[-1] == "–"
    browser.run("document.querySelector('#layer-table th button').focus()")
    browser.press("Tab")  # the keyboard reaches the next heading
    assert browser.run("document.activeElement.textContent") == "model"
    browser.click("#layer-table th:first-child button")
    names = browser.run(CELLS.format(0))
    assert names == sorted(names)


def test_filters_choose_layers(browser: Browser) -> None:
    browser.choose("#layer-text", "qkv blocks.1")
    assert browser.run(CELLS.format(0)) == ["blocks.1.attn.qkv"] * 2
    browser.choose("#layer-model", "w4a4")
    assert browser.run(CELLS.format(1)) == ["w4a4"]
    assert browser.run("document.querySelector('#layer-count').textContent") == "1 of 12 layers"
    browser.choose("#layer-text", "")
    browser.choose("#layer-kind", "fc2")
    assert browser.run(CELLS.format(0)) == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    browser.choose("#layer-text", "nothing like that")
    assert browser.run(CELLS.format(0)) == []


def pixels(browser: Browser, query: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.pixels(query))).convert("RGB")).astype(int)


def test_the_slider_wipes_full_precision_over_quantized(browser: Browser) -> None:
    browser.run("document.querySelector('.wipe').focus()")
    left = pixels(browser, ".wiped")
    browser.press("ArrowRight", 50)
    assert browser.run("document.querySelector('.wipe').value") == "50"
    half = pixels(browser, ".wiped")
    browser.press("End")
    right = pixels(browser, ".wiped")
    middle = left.shape[1] // 2
    assert (half[:, : middle - 2] == right[:, : middle - 2]).all()
    assert (half[:, middle + 2 :] == left[:, middle + 2 :]).all()
    difference = np.abs(right - left)
    assert (difference == 2 * pages.STEP).mean() > 0.9  # the first model on the page is w4a4; edges are resampled


def test_the_gain_multiplies_the_difference(browser: Browser) -> None:
    assert browser.run("document.querySelector('.gallery output').textContent") == "4"
    for gain in (2, 5, 1, 64):
        browser.choose(".gain", str(gain))
        shown = pixels(browser, ".difference")
        assert np.median(shown) == min(255, 2 * pages.STEP * gain)
        assert browser.run("document.querySelector('.times b').textContent") == str(gain)
    browser.choose(".gain", "8")
    identical = browser.run("[...document.querySelectorAll('.db')].findIndex(e => e.textContent === 'identical')")
    browser.run(f"document.querySelectorAll('.db')[{identical}].nextSibling.id = 'same'")
    assert (pixels(browser, "#same") == 0).all()


def test_classes_filter_images_and_the_worst_come_first(browser: Browser) -> None:
    assert len(browser.run(TILES)) == pages.COUNT
    browser.choose(".class", "1")
    assert browser.run(TILES) == [f"{i:06d}, class 1" for i in (1, 4, 7, 10)]
    browser.choose(".class", "")
    browser.choose(".order", "worst")
    assert sorted(browser.run(TILES)) == [f"{i:06d}, class {i % 3}" for i in range(pages.COUNT)]


def test_a_click_enlarges_an_image_and_escape_closes_it(browser: Browser) -> None:
    browser.click(".tile .open")
    assert browser.run("document.querySelector('dialog').open")
    assert "000000, class 0, w4a4, 22.1 dB" in browser.run("document.querySelector('dialog').textContent")
    assert browser.run("document.querySelector('dialog .wiped').clientWidth > 200")
    browser.choose("dialog .wipe", "80")
    assert browser.run("document.querySelector('dialog').style.getPropertyValue('--wipe')") == "80%"
    browser.press("Escape")
    browser.until("!document.querySelector('dialog')")


def test_heat_maps_are_read_with_pointer_and_keys(browser: Browser) -> None:
    output = "document.querySelector('.heat + figcaption + output').textContent"
    browser.run("document.querySelector('.heat').focus()")
    assert browser.run(output) == "blocks.0.attn.qkv at 999: 1 %"
    browser.press("ArrowRight", 2)
    browser.press("ArrowDown")
    assert browser.run(output) == "blocks.1.attn.qkv at 0: 0.3 %"
    browser.press("ArrowDown", 99)
    assert browser.run(output).startswith("blocks.2.mlp.fc2 at 0: ")
    x, y = browser.run("""(() => { const e = document.querySelector('.heat image'); e.scrollIntoView();
        const r = e.getBoundingClientRect();
        return [r.x + 2, r.y + 2]; })()""")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.until(f"{output} === 'blocks.0.attn.qkv at 999: 1 %'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_colours_follow_the_scheme(
    width: int, scheme: str, browser: Browser, html: Path
) -> None:
    browser.requests.clear()
    browser.open(html, width, scheme)
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("innerWidth") == width
    text, back = (browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, value[4:-1].split(","))) for value in (text, back)]
    assert (brightness[1] > 700) == (scheme == "light") and abs(brightness[0] - brightness[1]) > 500
