"""The pictures of the README, from the output of `make demo`; needs Chromium.

    python docs/generate_images.py demo

Copies side_by_side.png, and photographs the images on a report page about the quantized DiTs. The other pictures in
docs/images are drawn by benchmarks/bench_growth.py and bench_caching.py with --plot, and by svdit recover.
"""

import shutil
import sys
import tempfile
from base64 import b64decode
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser  # noqa: E402

from svdit.cli import command  # noqa: E402

PRESETS = ("svdquant-w4a4", "w4a4", "w8a8")
WIDTH, HEIGHT = 600, 960  # of the photograph in pixels: legible on a telephone too


def main(demo: Path) -> None:
    """Write both pictures."""
    images = ROOT / "docs" / "images"
    shutil.copy(demo / "side_by_side.png", images)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        runs = [demo / "digits"]
        for preset in PRESETS:
            runs += [demo / f"digits-{preset}.report.json", demo / f"digits-{preset}"]
        command("report", [*map(str, runs), "--output", str(page)])
        with Browser(Path(folder) / "browser") as browser:
            browser.open(page, width=WIDTH)
            top = browser.run("document.querySelector('#images').getBoundingClientRect().y")
            clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT, "scale": 1}
            shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    (images / "report.png").write_bytes(b64decode(shot["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
