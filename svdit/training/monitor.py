"""Progress of a training run: the learning curve as CSV and as a figure, and grids of samples."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdit.diffusion import paths
from svdit.diffusion.flow import FlowSchedule, flow_times
from svdit.diffusion.flow_samplers import FLOW_SAMPLERS
from svdit.diffusion.guidance import guided
from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import Denoise, Noise, ddim
from svdit.diffusion.schedule import make_schedule
from svdit.files import atomic_path, writing
from svdit.images import grid, to_uint8, write_png
from svdit.model.autoencoder import Autoencoder
from svdit.model.dit import DiT, DiTConfig
from svdit.pictures import COLOURS, blank, few_decades, plot
from svdit.printing import warn
from svdit.training.objective import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def columns(family: str) -> list[str]:
    """The columns of a family's `loss.csv`."""
    return ["step", "loss", *PARTS[family], "held_out_mse", "seconds"]


class Curve:
    """Rows of `loss.csv`; rows after the step that a run resumes from are dropped."""

    def __init__(self, path: Path, step: int, family: str = "dit") -> None:
        self.path = path
        rows = [row for row in read_curve(path, family) if int(row["step"]) <= step] if path.is_file() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(family), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, step: int, losses: list[float], held_out: float | None, seconds: float) -> str:
        """Append one row, with an empty field if there is no held-out error; returns it as a line of text."""
        error = "" if held_out is None else f"{held_out:.6f}"
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            row = [step, *(f"{loss:.6f}" for loss in losses), error, f"{seconds:.1f}"]
            csv.writer(file, lineterminator="\n").writerow(row)
        return f"step {step}  loss {losses[0]:.4f}  {'held-out ' + error if error else ''}  {seconds:.0f} s"


def read_curve(path: Path, family: str = "dit") -> list[dict[str, str]]:
    """The rows of a family's `loss.csv`; those that are damaged are dropped, with a warning."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = list(csv.reader(line.replace("\0", "?") for line in file))
    names = columns(family)
    rows = [dict(zip(names, line, strict=True)) for line in lines[1:] if len(line) == len(names) and _is_row(line)]
    if damaged := len(lines[1:]) - len(rows):
        warn(f"{damaged} damaged rows of {path} are dropped")
    return rows


def _is_row(line: list[str]) -> bool:
    numbers = [text for text in line if text]
    return line[0].isdecimal() and all(map(_is_number, numbers))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def plot_curve(source: Path, target: Path, about: str, family: str = "dit") -> None:
    """Plot the prediction error over the training steps, on training and, where measured, on held-out images.

    Raises UserError without matplotlib.
    """
    plot(target, "Training: mean squared error of the prediction", about, lambda: figure_of(read_curve(source, family)))


def figure_of(rows: list[dict[str, str]]) -> "Figure":
    """The figure of `plot_curve`."""
    figure, ((axes,),) = blank(1, 1, 6.5, 4)
    kinds = (("mse", "training, current weights"), ("held_out_mse", "held-out, averaged weights"))
    for (key, label), colour in zip(kinds, COLOURS, strict=False):
        points = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label)
    axes.set(xlabel="training step", ylabel="mean squared error", yscale="log")
    few_decades(axes.yaxis)
    axes.legend()
    return figure


@torch.no_grad()
def sample_grid(model: DiT, autoencoder: Autoencoder, path: Path, seed: int, cfg_scale: float = 1.5) -> None:
    """Write a grid of up to ten classes, one per column, four images each, all channels guided."""
    device, config = model.pos_embed.device, model.config
    columns = min(config.num_classes, 10)
    labels = torch.arange(4 * columns, device=device) % columns
    noise = image_noise(seed, range(len(labels)), model.input_shape, device)
    denoise = guided(model, labels, model.null_class, cfg_scale, channels=None)
    z = (heun25 if config.is_flow else ddim25)(config, denoise, noise)
    samples = to_uint8(autoencoder.decode(z), config.uint8)
    write_png(path, grid(samples, columns, scale=max(1, 64 // samples.shape[2])))


def ddim25(config: DiTConfig, denoise: Denoise, noise: Noise) -> Tensor:
    """Latents (N, C, H, W) by DDIM in 25 steps."""
    return ddim(denoise, noise(), make_schedule("ddim25"), noise=noise, prediction=config.prediction)


def heun25(config: DiTConfig, denoise: Denoise, noise: Noise) -> Tensor:
    """Latents (N, C, H, W) of a flow by Heun's method in 25 steps; times are shifted as LightningDiT's sampler does."""
    path, shift = paths.Path(config.path, config.time), 0.3 if config.family == "lightningdit" else 1.0
    times = flow_times(26, path, config.prediction, shift=shift)
    schedule = FlowSchedule(times, path, last_euler=config.family == "jit")
    x = config.noise_scale * noise()
    return FLOW_SAMPLERS["heun"](denoise, x, schedule, noise=noise, prediction=config.prediction)
