"""The learning curve of a recovery as a figure."""

from collections.abc import Sequence
from pathlib import Path

from svdit.extras import require
from svdit.files import atomic_path
from svdit.recovery.state import Point


def plot(curve: Sequence[Point], best: int, path: Path) -> None:
    """Write a PNG: PSNR of held-out images over the training steps, and the step that was kept.

    Raises UserError without matplotlib.
    """
    figure = require("matplotlib.figure").Figure(figsize=(6, 3.5), layout="constrained")
    axes, steps = figure.subplots(), [point.step for point in curve]
    axes.plot(steps, [point.psnr for point in curve], marker="o", ms=3, label="mean over images")
    axes.plot(steps, [point.pooled for point in curve], marker="s", ms=3, label="of the mean squared error of all")
    axes.axvline(best, color="grey", lw=1, ls="--", label="kept")
    axes.set(xlabel="training step", ylabel="PSNR to full precision, dB", title="Held-out images")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
