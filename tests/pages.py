"""The inputs of a report page, written by hand: a full-precision set, two quantized models, their sets and metrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from svdit.images import write_png
from svdit.storage.manifest import write_manifest

COUNT, SIDE, STEP = 12, 8, 10  # images; pixels; levels by which the images of w8a8 differ
TIMES = [999, 500, 0]
NAMES = [f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn.qkv", "mlp.fc2")]
VALUES = [0.5 / i for i in range(1, 65)]
SPECTRUM = {"original": VALUES, "transformed": VALUES, "remaining": VALUES}


def layer(name: str, weight: str, sqnr: float | None, **changes: Any) -> dict[str, Any]:
    sizes = {"bytes_before": 4000, "bytes_after": 1000, "rows": 900, "inputs": 64, "held_out": 90}
    return {
        "name": name,
        "weight": weight,
        "act": "INT8",
        "rank": 8,
        "sqnr": sqnr,
        "weight_error": 0.01,
        **sizes,
        **changes,
    }


def report(weight: str = "INT8", **changes: Any) -> dict[str, Any]:
    """A report of `svdit quantize` with a plan. Its sixth layer has too few rows."""
    sqnrs = [40.0, 9.5, 38.0, 100.0, None, 35.0]
    lines = [layer(name, weight, sqnr) for name, sqnr in zip(NAMES, sqnrs, strict=True)]
    lines[5]["rows"] = 100
    errors = {name: [0.01, 0.02, 0.001 * (i + 1)] for i, name in enumerate(NAMES)}
    tries = [{"bytes": 2e6, "sqnr": 20.0, "psnr": 50.0}]
    content = {
        **{"command": f"svdit quantize --preset {weight}", "date": "2026-11-27", "machine": "a processor, 2 threads"},
        **{"versions": "svdit 0", "model": "DiT-tiny", "source": {"file": "tiny.safetensors", "sha256": "ab" * 32}},
        "settings": {
            **{"mode": "preset", "preset": weight.lower(), "skip": [], "calibration": {"images": 9, "steps": 3}},
            **{"recipe": {"low_rank": "alternated", "rank": 8}, "weight_errors": dict.fromkeys(NAMES, 0.01)},
            "plan": {"target_mb": 2.5, "target_psnr": 50.0, "psnr": 50.0, "tries": tries, "sqnr": 20.0},
        },
        **{"kept": ["x_embedder.proj"], "backend": "cpu", "fallbacks": "2 of 6 layers in fp32: no kernel"},
        **{"layers": lines, "bytes_before": 8_000_000, "bytes_after": 2_000_000},
        **{"seconds": {"calibrate": 1.5, "quantize": 2.5}, "skipped": {"head": "has a forward hook"}},
        "measured": {
            **{"time": "timesteps", "timesteps": TIMES, "errors": {"conditional": errors, "unconditional": errors}},
            "spectra": {NAMES[0]: {"rank": 8, **SPECTRUM}},
            **{"curve": [[1e6, 10.0], [2e6, 20.0], [3e6, 30.0]], "chosen": [2e6, 20.0]},
            "uniform": [[4, 8, 2.2e6, 18.0]],
        },
        **changes,
    }  # fmt: skip
    copy: dict[str, Any] = json.loads(json.dumps(content))  # whose parts nobody shares
    return copy


def images(side: int = SIDE, count: int = COUNT) -> np.ndarray:
    """uint8 (N, H, W, 3), from 40 to 215, so that differences are not clipped."""
    return np.random.default_rng(0).integers(40, 216, (count, side, side, 3)).astype(np.uint8)


def write_set(folder: Path, pixels: np.ndarray, **fields: Any) -> Path:
    """A folder of `svdit generate`; image i is of class i mod 3."""
    files = [f"{i:06d}.png" for i in range(len(pixels))]
    for file, image in zip(files, pixels, strict=True):
        write_png(folder / file, image)
    manifest = {"tool": "svdit", "model": "DiT-tiny", "seed": 0, "image_size": pixels.shape[1], "num_classes": 3}
    manifest |= {"num_images": len(pixels), "labels": [i % 3 for i in range(len(pixels))], "files": files}
    write_manifest(folder / "manifest.json", {**manifest, "quantization": None, "steps": 50, **fields})
    return folder


def write_metrics(folder: Path, measured: Path, psnr: float) -> Path:
    """A folder of `svdit evaluate`."""
    estimate = {"value": psnr, "se": 1.0, "bias": 0.0, "leave_out": [psnr - 1, psnr + 1], "reason": None}
    content = {
        **{"schema": 1, "metrics": {"psnr": estimate}, "second": {}, "difference": {}},
        "inputs": {"fake": {"path": str(measured)}},
        **{"protocol": {"n_fake": COUNT, "comparable": True}, "versions": {}},
        **{"warnings": ["few images"], "seconds": 3.5},
    }  # fmt: skip
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def write_all(root: Path) -> list[Path]:
    """Everything. The pixels of w8a8 differ by STEP, except for image 3; those of w4a4 by twice that."""
    pixels = images()
    near, far = pixels + np.uint8(STEP), pixels - np.uint8(2 * STEP)
    near[3] = pixels[3]
    written = [write_set(root / "full", pixels)]
    for name, weight, own in (("w8a8", "INT8", near), ("w4a4", "INT4 g64", far)):
        content = report(weight)
        (root / f"{name}.report.json").write_text(json.dumps(content))
        written.append(root / f"{name}.report.json")
        written.append(write_set(root / name, own, quantization=content["settings"]))
        written.append(write_metrics(root / f"{name}-evaluation", root / name, 28.0 if own is near else 22.0))
    return written
