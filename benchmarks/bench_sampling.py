"""Wall time of `sample.py` for DiT-XL/2 at 256 px, fp32 and quantized, from start to the written file.

    python benchmarks/bench_sampling.py
    python benchmarks/bench_sampling.py --digits      # speed and image error of --cfg-interval on the digits model

Uses random weights and a random VAE of Stable Diffusion's architecture; time does not depend on the values. Needs 4 GB
of temporary disk space.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_end_to_end import WALK, differences, draw
from random_models import in_floats, quantized
from record import record
from timing import measure, ratio

from svdit.checkpoints.store import load_model, save_model
from svdit.shims import allow_cpu_torchvision

ROOT = Path(__file__).parents[1]
MODELS = {"fp32": ("W8A8", "int8"), "W8A8": ("W8A8", "int8"), "W4A8": ("W4A8", "int4")}  # blocks and adaLN


def save_vae(folder: Path) -> None:
    """Save a random AutoencoderKL of Stable Diffusion's architecture, 84 million parameters."""
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    stages = 4
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    ).save_pretrained(folder)


def seconds(checkpoint: Path, vae: Path, classes: int, steps: int) -> float:
    """Wall time of one `sample.py` run, from start to the written image."""
    labels = [str(10 * i) for i in range(classes)]
    out = checkpoint.with_suffix(".png")
    command = [sys.executable, "sample.py", "--ckpt", str(checkpoint), "--vae", str(vae), "--output", str(out)]
    command += ["--sampler", "ddim", "--num-sampling-steps", str(steps), "--classes", *labels]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert out.exists()
    return time.perf_counter() - start


def intervals(count: int) -> None:
    """Guidance at some timesteps: speed-up and image error compared with guidance at all timesteps."""
    model = load_model("digits")
    walks = {pair: replace(WALK, cfg_interval=pair) for pair in (None, (200, 999), (0, 800), (200, 800), (400, 800))}
    images = {pair: draw(model, count, walk) for pair, walk in walks.items()}
    runs = {str(pair): lambda walk=walk: draw(model, 16, walk) for pair, walk in walks.items()}
    times = measure(runs, 9)
    for pair in list(walks)[1:]:
        psnr, _, relative = differences(images[pair], images[None])
        note = f"{count} digits, DDIM 50, cfg 1.5; {psnr:.1f} dB PSNR, relative L2 {relative:.4f} to full guidance"
        ratio(times, "None", str(pair)).record(
            "guidance interval", f"timesteps {pair[0]} to {pair[1]}, speed", "×", note
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=4, help="batch size for images per minute; 0: skip that part")
    parser.add_argument("--digits", action="store_true", help="only measure --cfg-interval, on the digits model")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.digits:
        intervals(256)
        return
    with tempfile.TemporaryDirectory() as folder:
        vae = Path(folder) / "vae"
        save_vae(vae)
        files = {name: Path(folder) / f"{name}.safetensors" for name in MODELS}
        for name, (scheme, adaln) in MODELS.items():
            model = quantized(scheme, adaln)
            save_model(in_floats(model) if name == "fp32" else model, files[name], name="DiT-XL/2")
        for classes in filter(None, (1, args.images)):  # all methods at one batch size before the next
            note = f"sample.py, DDIM {args.steps}, batch {classes}, from start to file"
            for name, file in files.items():
                elapsed = seconds(file, vae, classes, args.steps)
                if classes == 1:
                    record("sampling", f"{name}, first image", elapsed, "s", note)
                else:
                    record("sampling", f"{name}, images a minute", 60 * classes / elapsed, "/min", note)


if __name__ == "__main__":
    main()
