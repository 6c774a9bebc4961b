"""What `svdit recover` gains: digits from the same noise, before and after.

    svdit quantize --ckpt digits --preset w4a8 --rank 8 --no-figures --output q.safetensors
    svdit recover q.safetensors --against digits --output r.safetensors
    python benchmarks/recovery.py digits q.safetensors r.safetensors --name "DiT w4a8"

50 steps (DDIM, or Euler for flows), guidance 1.5. PSNR to full precision: the mean over images, and pooled, of the mean
squared error of all. The Fréchet distance is that of families.py to the images of `--data`; its change is relative to
the quantized file, with a jackknife error.
"""

import argparse
from pathlib import Path

import numpy as np
from bench_end_to_end import draw
from families import decibels, distance, real, squares, walk_of
from record import record

from svdit.checkpoints.store import load_model, read_header
from svdit.runtime.accelerate import accelerate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("quantized", type=Path)
    parser.add_argument("recovered", type=Path)
    parser.add_argument("--name", default="DiT w4a8", help="of the rows: the model and the preset")
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--data", default="digits", help="training images: digits, or a file of train.py --data")
    args = parser.parse_args()
    model = load_model(args.source)
    walk = walk_of(model)
    full, (before, after) = (
        draw(model, args.count, walk),
        (draw(accelerate(load_model(file)), args.count, walk) for file in (args.quantized, args.recovered)),
    )
    errors = {"before": squares(before, full), "after": squares(after, full)}
    steps = (read_header(args.recovered) or {})["provenance"]["recovery"]["steps"]
    what = "digits" if args.data == "digits" else "images"
    setting = f"{args.count} {what}, {walk.sampler} 50, cfg 1.5; {steps} training steps"
    for name, values in errors.items():
        pooled = 10 * np.log10(255**2 / values.mean())
        note = f"se {decibels(values).std(ddof=1) / args.count**0.5:.2f}; pooled {pooled:.2f}; {setting}"
        record("recovery", f"{args.name} {name} PSNR", decibels(values).mean(), "dB", note)
    gains = decibels(errors["after"]) - decibels(errors["before"])
    record(
        "recovery", f"{args.name} gain", gains.mean(), "dB", f"se {gains.std(ddof=1) / args.count**0.5:.2f}; {setting}"
    )
    reference = real(args.data)
    change = distance(reference, after).minus(distance(reference, before))
    record("recovery", f"{args.name} Fréchet change", change.value, "", f"se {change.se:.2g}; {setting}")


if __name__ == "__main__":
    main()
