"""The pictures of the README, from the output of `make demo`; needs Chromium. And one of a model of colour images.

    python docs/generate_images.py demo
    python docs/generate_images.py --cifar10 FOLDER     # sets of svdit generate: full, w4a4, svdquant-w4a4

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

import numpy as np  # noqa: E402
from browser import Browser  # noqa: E402

from svdit.cli import command  # noqa: E402
from svdit.evaluation.paired import psnr  # noqa: E402
from svdit.images import list_images, read_image, write_png  # noqa: E402
from svdit.pictures import subject  # noqa: E402
from svdit.sheet import DIFFERENCE, compared, sheet  # noqa: E402
from svdit.storage.manifest import read_manifest  # noqa: E402

PRESETS, VARIANTS, SHOWN = ("svdquant-w4a4", "w4a4", "w8a8"), ("w4a4", "svdquant-w4a4"), 8
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
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


def cifar10(folder: Path) -> None:
    """Write docs/images/cifar10.png from sets of images of the same noise."""
    manifest = read_manifest(folder / "full" / "manifest.json") or {}
    names = manifest["files"][:SHOWN]
    full, *others = ([read_image(folder / name / file) for file in names] for name in ("full", *VARIANTS))
    labels = []
    for name in VARIANTS:
        pairs = zip(*(list_images(folder / each) for each in (name, "full")), strict=True)
        labels.append(f"{name}\n{np.mean([psnr(read_image(a), read_image(b)) for a, b in pairs]):.1f} dB")
    classes = [CLASSES[label] for label in manifest["labels"][:SHOWN]]
    sampler = f"{manifest['sampler']} {manifest['steps']}, guidance {manifest['cfg_scale']}"
    about = subject(manifest["model"], "rank 16", sampler, f"PSNR of {manifest['num_images']} images")
    rows = compared(full, dict(zip(labels, others, strict=True)))
    title = "CIFAR-10 images from the same noise, in full precision and quantized"
    write_png(ROOT / "docs" / "images" / "cifar10.png", sheet(title, about, rows, ("class", classes), [DIFFERENCE]))


if __name__ == "__main__":
    cifar10(Path(sys.argv[2])) if sys.argv[1] == "--cifar10" else main(Path(sys.argv[1]))
