"""Whether images depend on batch size and world size: the same set drawn under each, compared byte for byte.

    python benchmarks/identity.py [PRESET …]

Quantizes the digits model, and a random model of latents with a random VAE, draws 96 images (DDPM, 10 steps) with
`sample_ddp.py` under every combination, and prints how many differ from those of one process in batches of 32. One
process has all threads, several have one each. Backends other than `cpu`: set SVDIT_BACKEND.
"""

import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

from svdit.checkpoints.store import save_model
from svdit.model.dit import DiT, DiTConfig
from svdit.shims import allow_cpu_torchvision

ROOT = Path(__file__).resolve().parents[1]
WORLDS, BATCHES, IMAGES = (1, 2, 3), (1, 4, 32), 96
QUANTIZE = "--calib-images 8 --calib-steps 5 --no-figures"
SAMPLE = f"--num-fid-samples {IMAGES} --num-sampling-steps 10"


def run(*arguments: str) -> None:
    """One command of the repository's root."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def random_latents(folder: Path) -> tuple[str, str]:
    """A random model of latents of 128 px and a random VAE: their files."""
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=16, patch_size=2, in_channels=4, hidden_size=128, depth=2, num_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # the last layers start with zeros
    save_model(model, folder / "latents.safetensors")
    stages = 4
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(64,) * stages,
    ).save_pretrained(folder / "vae")
    return str(folder / "latents.safetensors"), str(folder / "vae")


def draw(checkpoint: Path, vae: str, folder: Path, world: int, batch: int) -> list[bytes]:
    """The image files, in order."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    where = ["--ckpt", str(checkpoint), "--sample-dir", str(folder), "--per-proc-batch-size", str(batch), "--vae", vae]
    run(*launch, "sample_ddp.py", *where, *SAMPLE.split())
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def main(presets: list[str]) -> None:
    """Print one row per model, preset and world size."""
    print("| model | preset | processes | " + " | ".join(f"batches of {batch}" for batch in BATCHES) + " |", flush=True)
    print("|---" * (3 + len(BATCHES)) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        models = {"digits": ("digits", "none"), "latents": random_latents(Path(temporary))}
        for (name, (source, vae)), preset in product(models.items(), presets):
            checkpoint, folder = Path(temporary) / f"{name}-{preset}.safetensors", Path(temporary)
            run("quantize_ptq.py", "--ckpt", source, *QUANTIZE.split(), "--preset", preset, "--output", str(checkpoint))
            reference = draw(checkpoint, vae, folder / f"{name}-{preset}", 1, 32)
            for world in WORLDS:
                cells = []
                for batch in BATCHES:
                    images = draw(checkpoint, vae, folder / f"{name}-{preset}-{world}-{batch}", world, batch)
                    assert len(images) == len(set(images)) == len(reference) == IMAGES
                    differ = sum(a != b for a, b in zip(images, reference, strict=True))
                    cells.append(f"{differ} of {IMAGES}")
                print(f"| {name} | {preset} | {world} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["w8a8", "w4a8", "w4a4", "w8a16"])
