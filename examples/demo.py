"""Quantize the digits model with several presets, sample with the same noise, evaluate, and compare.

    python examples/demo.py demo

Takes a few minutes on two cores and downloads nothing. Prints one row per preset and writes demo/side_by_side.png.
Expect w8a8 above 40 dB PSNR, and w4a4 well above SVDQuant as published (svdquant-w4a4).
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

PRESETS = ("w8a8", "w4a8", "w4a4", "svdquant-w4a4")
COUNT = 200
SAMPLING = "--sampler ddim --num-sampling-steps 50 --cfg-scale 1.5 --per-proc-batch-size 100"


def run(line: str) -> None:
    """Print a svdit command and run it."""
    print(f"\n$ svdit {line}", flush=True)
    name, *rest = line.split()
    command(name, rest)


def main(folder: Path) -> None:
    """Run the demo; all files go into `folder`."""
    run(f"generate --ckpt digits --num-fid-samples {COUNT} --sample-dir {folder}/full {SAMPLING}")
    table = Table("", "MB", "PSNR, dB", "relative L2", "Fréchet distance of random features*", box=None)
    for preset in PRESETS:
        file, samples, out = folder / f"{preset}.safetensors", folder / preset, folder / f"{preset}-evaluation"
        run(f"quantize --ckpt digits --preset {preset} --rank 8 --output {file}")
        run(f"generate --ckpt {file} --num-fid-samples {COUNT} --sample-dir {samples} {SAMPLING}")
        run(
            f"evaluate --real_dir {folder}/full --fake_dir {samples} --num_images {COUNT} --metrics fid,paired "
            f"--feature-extractor random --output {out}"
        )
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        shown = [f"{metrics[name]['value']:.4g}" for name in ("psnr", "relative_l2", "random_fid")]
        table.add_row(preset, f"{file.stat().st_size / 1e6:.2f}", *shown)
    side_by_side(folder)
    Console().print(table, f"* to the full-precision images; NOT an FID\n{folder}/side_by_side.png", sep="\n")


def side_by_side(folder: Path) -> None:
    """Plot the first 20 images of every preset, from the same noise, and their differences to full precision."""
    names = ("full", *PRESETS)
    first = {name: np.stack([read_image(path) for path in list_images(folder / name)[:20]]) for name in names}
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(len(names), 1, height_ratios=(1, *[2] * len(PRESETS)))
    for axis, name in zip(axes, names, strict=True):
        difference = np.abs(first[name].astype(int) - first["full"])
        rows = [first[name]] if name == "full" else [first[name], np.minimum(10 * difference, 255).astype(np.uint8)]
        axis.imshow(grid(np.concatenate(rows), 20, scale=4))
        axis.set_title(name if name == "full" else f"{name}, and difference × 10", loc="left", fontsize=9)
        axis.axis("off")
    figure.savefig(folder / "side_by_side.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
