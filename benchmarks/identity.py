"""Whether images depend on batch size and world size: the same set drawn under each, compared byte for byte.

    python benchmarks/identity.py [PRESET …]

Quantizes the digits model, draws 96 images (DDPM, 10 steps) with `sample_ddp.py` under every combination, and prints
how many differ from those of one process in batches of 32. Backends other than `cpu`: set SVDIT_BACKEND.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLDS, BATCHES, IMAGES = (1, 2, 3), (1, 4, 32), 96
QUANTIZE = "--ckpt digits --calib-images 8 --calib-steps 5 --no-figures"
SAMPLE = f"--num-fid-samples {IMAGES} --num-sampling-steps 10 --vae none"


def run(*arguments: str) -> None:
    """One command of the repository's root."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def draw(checkpoint: Path, folder: Path, world: int, batch: int) -> list[bytes]:
    """The image files, in order."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    where = ["--ckpt", str(checkpoint), "--sample-dir", str(folder), "--per-proc-batch-size", str(batch)]
    run(*launch, "sample_ddp.py", *where, *SAMPLE.split())
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def main(presets: list[str]) -> None:
    """Print one row per preset and world size."""
    print("| preset | processes | " + " | ".join(f"batches of {batch}" for batch in BATCHES) + " |", flush=True)
    print("|---" * (2 + len(BATCHES)) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        for preset in presets:
            checkpoint = Path(temporary) / f"{preset}.safetensors"
            run("quantize_ptq.py", *QUANTIZE.split(), "--preset", preset, "--output", str(checkpoint))
            reference = draw(checkpoint, Path(temporary) / f"{preset}-reference", 1, 32)
            for world in WORLDS:
                cells = []
                for batch in BATCHES:
                    images = draw(checkpoint, Path(temporary) / f"{preset}-{world}-{batch}", world, batch)
                    assert len(images) == len(reference) == IMAGES
                    differ = sum(a != b for a, b in zip(images, reference, strict=True))
                    cells.append(f"{differ} of {IMAGES}")
                print(f"| {preset} | {world} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["w8a8", "w4a8", "w4a4", "w8a16"])
