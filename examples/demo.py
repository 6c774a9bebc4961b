"""Quantize two digits models, a DiT and a SiT, sample with the same noise, evaluate, and compare.

    python examples/demo.py demo

Takes a few minutes on two cores and downloads nothing. Prints one row per model and preset and writes
demo/side_by_side.png and the page demo/report.html. Expect w8a8 above 40 dB PSNR, and w4a4 well above SVDQuant as
published (svdquant-w4a4).
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from svdit.cli import command
from svdit.images import grid, list_images, read_image

PRESETS = {"digits": ("w8a8", "w4a4", "svdquant-w4a4"), "digits-sit": ("w8a8", "w4a4")}
NAMES = {"digits": "DiT", "digits-sit": "SiT (flow)"}
SAMPLERS = {"digits": "ddim --num-sampling-steps 50", "digits-sit": "heun --num-sampling-steps 26"}  # 50 evaluations
COUNT = 200
GAIN = 32  # of the differences
SAMPLING = "--cfg-scale 1.5 --per-proc-batch-size 100"


def run(line: str) -> None:
    """Print a svdit command and run it."""
    print(f"\n$ svdit {line}", flush=True)
    name, *rest = line.split()
    command(name, rest)


def main(folder: Path) -> None:
    """Run the demo; all files go into `folder`."""
    table = Table("", "", "MB", "PSNR, dB", "relative L2", "Fréchet distance of random features*", box=None)
    for model, presets in PRESETS.items():
        sampling = f"--num-fid-samples {COUNT} --sampler {SAMPLERS[model]} {SAMPLING}"
        run(f"generate --ckpt {model} --sample-dir {folder}/{model} {sampling}")
        for preset in presets:
            name = f"{model}-{preset}"
            run(f"quantize --ckpt {model} --preset {preset} --rank 8 --output {folder}/{name}.safetensors")
            run(f"generate --ckpt {folder}/{name}.safetensors --sample-dir {folder}/{name} {sampling}")
            run(
                f"evaluate --real_dir {folder}/{model} --fake_dir {folder}/{name} --num_images {COUNT} "
                f"--metrics fid,paired --feature-extractor random --output {folder}/{name}-evaluation"
            )
            table.add_row(NAMES[model], preset, *figures(folder, name))
    side_by_side(folder)
    run(f"report {folder} --output {folder}/report.html")
    paths = f"{folder}/side_by_side.png\n{folder}/report.html"
    Console().print(table, "* to the full-precision images; NOT an FID", paths, sep="\n")


def figures(folder: Path, name: str) -> list[str]:
    """Size, PSNR, relative L2 and Fréchet distance of a quantized model."""
    metrics = json.loads((folder / f"{name}-evaluation" / "metrics.json").read_text())["metrics"]
    size = (folder / f"{name}.safetensors").stat().st_size
    values = [metrics[metric]["value"] for metric in ("psnr", "relative_l2", "random_fid")]
    return [f"{size / 1e6:.2f}", *(f"{value:.4g}" for value in values)]


def side_by_side(folder: Path) -> None:
    """Plot the first 20 images of every preset, from the same noise, and their differences to full precision."""
    rows = []
    for model, presets in PRESETS.items():
        original = first(folder / model)
        rows.append((f"{NAMES[model]}: full precision", grid(original, 20, scale=4)))
        for preset in presets:
            quantized = first(folder / f"{model}-{preset}")
            difference = np.minimum(GAIN * np.abs(quantized.astype(int) - original), 255).astype(np.uint8)
            title = f"{NAMES[model]}: {preset}; below, difference × {GAIN}"
            rows.append((title, grid(np.concatenate([quantized, difference]), 20, scale=4)))
    width, space = rows[0][1].shape[1], 20  # pixels, and those for a title
    height = sum(len(pixels) + space for _, pixels in rows)
    figure = Figure(figsize=(10, 10 * height / width))
    top = 0
    for title, pixels in rows:  # all equally wide, so that the same noise is in one column
        top += len(pixels) + space
        axis = figure.add_axes((0, 1 - top / height, 1, len(pixels) / height))
        axis.imshow(pixels, aspect="auto", interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=9, pad=3)
        axis.axis("off")
    figure.savefig(folder / "side_by_side.png", dpi=120)


def first(folder: Path) -> np.ndarray:
    """The first 20 images, (20, H, W, 3)."""
    return np.stack([read_image(path) for path in list_images(folder)[:20]])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
