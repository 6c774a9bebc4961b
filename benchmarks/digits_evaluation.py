"""The quality of the quantized digits model by every metric that works offline: 2000 images per method.

    python benchmarks/digits_evaluation.py [--only w4a4 …] [--count 2000] [--folder results/digits]

All sets are sampled from the same noise with the accelerated kernels, and compared with the real digits and, pair by
pair, with full precision. The features are those of an Inception with random weights, comparable only to themselves.
The tables of `svdit compare` are written to digits_evaluation.md.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from bench_end_to_end import BEST_PUBLISHED, RANK, WALK, calibration
from record import record
from tables import update_pages

from svdit.checkpoints.store import load_model
from svdit.cli import command
from svdit.evaluation.compare import compare
from svdit.images import to_uint8, write_png
from svdit.quant.config import RECIPES, Recipe, dit_config
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling.dataset import generate_dataset
from svdit.training.data import digits

METHODS: dict[str, Recipe | None] = {
    "full": None,
    "w8a8": RECIPES["w8a8"],
    "svdquant-w8a8": BEST_PUBLISHED["svdquant w8a8, gptq"],
    "w4a8": RECIPES["w4a8"],
    "svdquant-w4a8": BEST_PUBLISHED["svdquant w4a8, gptq"],
    "w4a4": RECIPES["w4a4"],
    "svdquant-w4a4": BEST_PUBLISHED["svdquant-w4a4, gptq"],
}
METRICS = ("random_fid", "random_kid_full", "random_precision", "random_recall", "psnr", "relative_l2")


def write_real(folder: Path) -> None:
    """Write all 1797 real digits at the model's resolution."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [image for part in digits() for image in (part.read(i) for i in range(len(part)))]
    for i, image in enumerate(to_uint8(torch.stack(images))):
        write_png(folder / f"{i:06}.png", image)


def sample(name: str, folder: Path, count: int) -> None:
    """Sample the set of one method, unless it exists already."""
    model, recipe = load_model("digits"), METHODS[name]
    if recipe:
        quantize_(model, dit_config(replace(recipe, rank=RANK)), calibration(model))
    origin = {"model": "digits", "checkpoint": name, "precision": "float32"}
    generate_dataset(accelerate(model), folder, count, WALK, seed=0, batch_size=200, origin=origin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("results/digits"))
    args = parser.parse_args()
    folder: Path = args.folder
    write_real(folder / "real")
    for name in dict.fromkeys(["full", *args.only]):
        sample(name, folder / "sets" / name, args.count)
        paired = "" if name == "full" else f",paired --paired_dir {folder}/sets/full"
        flags = f"--feature-extractor random --metrics fid,kid,prc{paired}"
        where = f"--real_dir {folder}/real --fake_dir {folder}/sets/{name} --output {folder}/{name}"
        command("evaluate", [*where.split(), *flags.split()])
        metrics = json.loads((folder / name / "metrics.json").read_text())["metrics"]
        for metric in METRICS:
            if metrics.get(metric, {}).get("value") is not None:
                note = f"se {metrics[metric]['se']}, {args.count} images"
                record("digits evaluation", f"{name} {metric}", metrics[metric]["value"], "", note)
    names = list(dict.fromkeys(["full", *args.only]))
    tables = (
        compare([folder / name for name in names], METRICS[:4]),
        compare([folder / n for n in names[1:]], METRICS[4:]),
    )
    text = "\n\n".join(tables) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    update_pages()
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
