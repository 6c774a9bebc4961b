"""Progress of a training run: the learning curve as CSV and as a figure, and grids of samples."""

import csv
import math
from pathlib import Path

import torch

from svdit.diffusion.guidance import guided
from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import ddim
from svdit.diffusion.schedule import make_schedule
from svdit.extras import require
from svdit.files import atomic_path, writing
from svdit.images import grid, to_uint8, write_png
from svdit.model.autoencoder import Autoencoder
from svdit.model.dit import DiT
from svdit.printing import warn

COLUMNS = ["step", "loss", "mse", "vb", "held_out_mse", "seconds"]


class Curve:
    """Rows of `loss.csv`; rows after the step that a run resumes from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows = [row for row in read_curve(path) if int(row["step"]) <= step] if path.is_file() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, step: int, losses: list[float], held_out: float | None, seconds: float) -> str:
        """Append one row, with an empty field if there is no held-out error; returns it as a line of text."""
        error = "" if held_out is None else f"{held_out:.6f}"
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            row = [step, *(f"{loss:.6f}" for loss in losses), error, f"{seconds:.1f}"]
            csv.writer(file, lineterminator="\n").writerow(row)
        return f"step {step}  loss {losses[0]:.4f}  {'held-out ' + error if error else ''}  {seconds:.0f} s"


def read_curve(path: Path) -> list[dict[str, str]]:
    """The rows of a `loss.csv`; those that are damaged are dropped, with a warning."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = list(csv.reader(line.replace("\0", "?") for line in file))
    rows = [dict(zip(COLUMNS, line, strict=False)) for line in lines[1:] if _is_row(line)]
    if damaged := len(lines[1:]) - len(rows):
        warn(f"{damaged} damaged rows of {path} are dropped")
    return rows


def _is_row(line: list[str]) -> bool:
    numbers = [text for text in line if text]
    return len(line) == len(COLUMNS) and line[0].isdecimal() and all(map(_is_number, numbers))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def plot_curve(source: Path, target: Path) -> None:
    """Plot the prediction error over the training steps, on training and, where measured, on held-out images."""
    figure = require("matplotlib.figure").Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    rows = read_curve(source)
    for key, label in (("mse", "training, current weights"), ("held_out_mse", "held-out, averaged weights")):
        points = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="training step", ylabel="mean squared error of the prediction", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120)


@torch.no_grad()
def sample_grid(model: DiT, autoencoder: Autoencoder, path: Path, seed: int, cfg_scale: float = 1.5) -> None:
    """Write a grid of up to ten classes, one per column, four images each: DDIM, 25 steps, all channels guided."""
    device, columns = model.pos_embed.device, min(model.config.num_classes, 10)
    labels = torch.arange(4 * columns, device=device) % columns
    noise = image_noise(seed, range(len(labels)), model.input_shape, device)
    denoise = guided(model, labels, model.null_class, cfg_scale, channels=None)
    z = ddim(denoise, noise(), make_schedule("ddim25"), noise=noise, prediction=model.config.prediction)
    samples = to_uint8(autoencoder.decode(z), model.config.uint8)
    write_png(path, grid(samples, columns, scale=max(1, 64 // samples.shape[2])))
