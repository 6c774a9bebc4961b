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
from rich.console import Console
from rich.table import Table

from svdit.cli import command
from svdit.images import list_images, read_image, write_png
from svdit.pictures import subject
from svdit.sheet import DIFFERENCE, compared, rms, sheet, visible_gain

PRESETS = {"digits": ("w8a8", "w4a4", "svdquant-w4a4"), "digits-sit": ("w8a8", "w4a4")}
NAMES = {"digits": "DiT", "digits-sit": "SiT (flow)"}
SAMPLERS = {"digits": "ddim --num-sampling-steps 50", "digits-sit": "heun --num-sampling-steps 26"}  # 50 evaluations
COUNT = 200
SHOWN = 10  # images of each set in side_by_side.png
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
    """Draw the first images of every preset, from the same noise in a column, and their differences."""
    sets = {name: first(folder / name) for name in (*PRESETS, *(name for name, _ in quantized()))}
    gain = visible_gain(max(rms(sets[name], sets[model]) for name, model in quantized()))
    rows = []
    for model, presets in PRESETS.items():
        names = {preset: f"{model}-{preset}" for preset in presets}
        variants = {f"{preset}\n{figures(folder, name)[1]} dB": sets[name] for preset, name in names.items()}
        rows += compared(sets[model], variants, f"{NAMES[model]}\nfull precision", gain)
    labels = json.loads((folder / next(iter(PRESETS)) / "manifest.json").read_text())["labels"][:SHOWN]
    title = "Digits from the same noise, in full precision and quantized"
    about = subject("8×8 pixels", "rank 8", "50 evaluations", "guidance 1.5", f"PSNR of {COUNT} images")
    write_png(folder / "side_by_side.png", sheet(title, about, rows, ("class", list(map(str, labels))), [DIFFERENCE]))


def quantized() -> list[tuple[str, str]]:
    """The quantized models, and the model of each."""
    return [(f"{model}-{preset}", model) for model, presets in PRESETS.items() for preset in presets]


def first(folder: Path) -> list[np.ndarray]:
    """The first images, (H, W, 3)."""
    return [read_image(path) for path in list_images(folder)[:SHOWN]]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
