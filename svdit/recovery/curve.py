"""The learning curve of a recovery as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.pictures import COLOURS, blank, plot
from svdit.recovery.state import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(path: Path, curve: Sequence[Point], best: int, about: str) -> None:
    """Write a PNG: PSNR of held-out images over the training steps, and the step that was kept.

    Raises UserError without matplotlib.
    """
    plot(path, "Recovery: PSNR of held-out images to those in full precision", about, lambda: figure_of(curve, best))


def figure_of(curve: Sequence[Point], best: int) -> "Figure":
    """The figure of `draw`."""
    figure, ((axes,),) = blank(1, 1, 6.5, 4)
    steps = [point.step for point in curve]
    axes.plot(steps, [point.psnr for point in curve], "o-", color=COLOURS[0], ms=4, label="mean over images")
    axes.plot(steps, [point.pooled for point in curve], "s-", color=COLOURS[1], ms=4, label="of all images' mean error")
    axes.axvline(best, color="grey", lw=1, ls="--", label=f"kept: step {best}")
    axes.set(xlabel="training step", ylabel="PSNR, dB")
    axes.legend(loc="lower right")
    return figure
