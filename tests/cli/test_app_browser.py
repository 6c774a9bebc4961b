"""The page of `svdit app` in Chromium: it draws, it tells what is wrong, and it asks for nothing from elsewhere."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Browser
from pixels import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; install Debian's chromium package"),
]
IMAGES = "[...document.querySelectorAll('img')].filter(image => image.naturalWidth > 200)"
CELLS = "[...document.querySelectorAll('td')].map(cell => cell.textContent.trim()).filter(text => text)"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a process of its own, whose only way out is a proxy that does not exist."""
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **nowhere, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "svdit", "app", "--port", str(port), "--device", "cpu"]
    folder = tmp_path_factory.mktemp("app")
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url = server.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}"
        yield url
        server.terminate()
        assert server.wait(timeout=60) == 128 + 15
        assert server.stdout.read() == ""
        assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
        places = {request.partition("://")[2].partition("/")[0] for request in browser.requests if "://" in request}
        assert places - {"blob:http:"} == {address.partition("://")[2]}


def choose(browser: Browser, field: str, value: str) -> None:
    """Pick an entry of a list, once the page is complete."""
    browser.until("document.querySelector('button.primary') && !document.querySelector('[role=option]')")
    for _ in range(20):
        browser.run("document.activeElement.blur()")
        browser.run(f"document.querySelector('input[aria-label={field}]').focus()")
        time.sleep(0.5)
        if texts := browser.run("[...document.querySelectorAll('[role=option]')].map(e => e.ariaLabel)"):
            break
    browser.run(f"document.querySelectorAll('[role=option]')[{texts.index(value)}].id = 'chosen'")
    browser.click("#chosen")
    browser.until(f"document.querySelector('input[aria-label={field}]').value === '{value}'")


def test_the_page_draws_both_models_side_by_side(browser: Browser, address: str) -> None:
    browser.open(address)
    choose(browser, "preset", "rtn")
    choose(browser, "class", "7")
    browser.click("button.primary")
    browser.until(f"{IMAGES}.length === 2", seconds=300)
    browser.until(f"{CELLS}.length === 9")
    cells = browser.run(CELLS)
    assert [cells[i] for i in (0, 3, 6, 7)] == ["time", "weights in memory", "PSNR to full precision", "–"]
    assert 30 < float(cells[8].removesuffix(" dB")) < 100
    assert browser.run(f"{IMAGES}.map(image => image.alt)") == ["full precision", "quantized"]
    left, right = browser.run(
        f"{IMAGES}.map(image => [image.getBoundingClientRect().x, image.getBoundingClientRect().y])"
    )
    assert left[0] < right[0] and left[1] == right[1]


def test_a_mistake_is_a_sentence_on_the_page(browser: Browser, address: str) -> None:
    browser.open(address)
    choose(browser, "preset", "rtn")
    browser.choose("input[aria-label=seed]", "-5")
    browser.click("button.primary")
    browser.until(
        "document.body.innerText.includes('the seed is -5; choose an integer from 0 to 2^63 - 1')", seconds=60
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(width: int, browser: Browser, address: str) -> None:
    browser.open(address, width)
    browser.until("document.querySelector('button.primary')")
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_classes_are_those_of_the_model(browser: Browser, address: str) -> None:
    browser.open(address)
    choose(browser, "model", "digits-jit")
    browser.until("document.querySelector('input[aria-label=class]').value === '0'")
