"""Chromium without a window, driven through a pipe by the DevTools protocol: no driver and no package is needed.

    with Browser(folder) as browser:
        browser.open(path, width=390)
        browser.click("button")
        assert browser.run("document.title") == "…" and not browser.problems

`requests` are the addresses that the page asked for, `problems` its errors in the console and its exceptions.
"""

import fcntl
import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
KEYS = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Escape": 27, "End": 35}


class Browser:
    """One tab; `folder` is for its files."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.last, self.session, self.rest = 0, "", b""
        assert CHROMIUM is not None
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (*os.pipe(), *os.pipe())]  # away from 3 and 4

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[3], 4)

        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=place, pass_fds=(3, 4), **quiet)
        self.writer, self.reader = ends[1], ends[2]
        for fd in (ends[0], ends[3]):
            os.close(fd)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.writer)
        os.close(self.reader)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events before it are noted."""
        self.last += 1
        session = {"sessionId": self.session} if self.session else {}
        message = json.dumps({"id": self.last, "method": method, "params": params, **session})
        os.write(self.writer, message.encode() + b"\0")
        while (answer := self._next()).get("id") != self.last:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.reader, 1 << 16)
            assert part, "the browser ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(str(params["args"]))

    def open(self, page: Path | str, width: int = 1280, scheme: str = "light") -> None:
        """Load a file or an address and wait for it, on a screen of this width."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while (event := self._next()).get("method") != "Page.loadEventFired":
            self._note(event)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> None:
        """Wait for an expression that becomes true, as after an event of the browser's."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({script})"):  # an element is an empty dict here
            assert time.monotonic() < end, f"{script} did not become true"
            time.sleep(0.05)

    def click(self, query: str) -> None:
        """A click in the middle of the first such element."""
        x, y = self.run(f"""(() => {{ const e = document.querySelector({json.dumps(query)});
            e.scrollIntoView({{block: "center", behavior: "instant"}});
            const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key of KEYS."""
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def choose(self, query: str, value: str) -> None:
        """Set a field, as a reader does."""
        self.run(f"""(() => {{ const e = document.querySelector({json.dumps(query)}); e.value = {json.dumps(value)};
            e.dispatchEvent(new Event("input", {{bubbles: true}})); }})()""")

    def pixels(self, query: str) -> bytes:
        """A PNG of the first such element."""
        x, y, width, height = self.run(f"""(() => {{ const e = document.querySelector({json.dumps(query)});
            const r = e.getBoundingClientRect();
            return [r.x + scrollX, r.y + scrollY, r.width, r.height]; }})()""")
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return b64decode(shot["data"])
