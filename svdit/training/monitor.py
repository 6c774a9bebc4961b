"""What a run shows of itself: the learning curve as CSV while it goes and as a picture, and grids of samples."""

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from svdit.diffusion.guidance import guided
from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import ddim
from svdit.diffusion.schedule import make_schedule
from svdit.files import atomic_path
from svdit.images import grid, to_uint8, write_png
from svdit.model.dit import DiT

COLUMNS = ["step", "loss", "mse", "vb", "held_out_mse", "seconds"]


class Curve:
    """Rows of `loss.csv`; rows after the step a run goes on from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows = [row for row in read_curve(path) if int(row["step"]) <= step] if path.exists() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, step: int, losses: list[float], held_out: float | None, seconds: float) -> str:
        """Append one row and return it as a sentence; an empty field where nothing was measured."""
        error = "" if held_out is None else f"{held_out:.6f}"
        with self.path.open("a", newline="") as file:
            row = [step, *(f"{loss:.6f}" for loss in losses), error, f"{seconds:.1f}"]
            csv.writer(file, lineterminator="\n").writerow(row)
        return f"step {step}  loss {losses[0]:.4f}  {'held out ' + error if error else ''}  {seconds:.0f} s"


def read_curve(path: Path) -> list[dict[str, str]]:
    """The rows of a `loss.csv`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_curve(source: Path, target: Path) -> None:
    """Draw the noise prediction error over the steps, on trained and, where measured, on held-out pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    rows = read_curve(source)
    for key, label in (("mse", "training, this step's weights"), ("held_out_mse", "held out, averaged weights")):
        points = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="mean squared error of ε", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120)


@torch.no_grad()
def sample_grid(model: DiT, decode: Callable[[Tensor], Tensor], path: Path, seed: int, cfg_scale: float = 1.5) -> None:
    """A grid of up to ten classes, one a column, four of each: DDIM in 25 steps, guided on all channels."""
    config, device = model.config, model.pos_embed.device
    columns = min(config.num_classes, 10)
    labels = torch.arange(4 * columns, device=device) % columns
    draw = image_noise(seed, range(len(labels)), (config.in_channels, config.input_size, config.input_size), device)
    denoise = guided(model, labels, model.null_class, cfg_scale, channels=None)
    x = decode(ddim(denoise, draw(), make_schedule("ddim25"), noise=draw))
    write_png(path, grid(to_uint8(x), columns, scale=max(1, 64 // x.shape[-1])))
