"""A picture of images from the same noise: full precision above, quantized below it, and their difference."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svdit.extras import require
from svdit.files import atomic_path
from svdit.images import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAIN = 4  # of the differences


def draw_pairs(
    path: Path, before: Sequence[Pixels], after: Sequence[Pixels], captions: Sequence[str], title: str
) -> None:
    """Write a PNG of pairs of images, uint8 (H, W, 3), each pair in a column.

    Raises UserError without matplotlib.
    """
    require("matplotlib")
    from matplotlib import rc_context

    from svdit.report.figures import STYLE

    with rc_context(STYLE), atomic_path(path) as temporary:
        figure_of(before, after, captions, title).savefig(temporary, format="png")


def figure_of(before: Sequence[Pixels], after: Sequence[Pixels], captions: Sequence[str], title: str) -> "Figure":
    """The figure of `draw_pairs`."""
    from matplotlib.figure import Figure

    rows = ("full precision", "quantized", f"difference × {GAIN}")
    height, width = before[0].shape[:2]
    figure = Figure(figsize=(0.6 + 2.4 * len(before), 0.8 + 3 * 2.4 * height / width), layout="constrained")
    axes = figure.subplots(3, len(before), squeeze=False)
    for column, (a, b, caption) in enumerate(zip(before, after, captions, strict=True)):
        difference = np.clip(128 + GAIN * (b.astype(np.int16) - a), 0, 255).astype(np.uint8)
        for axis, image in zip(axes[:, column], (a, b, difference), strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(caption)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label)
    figure.suptitle(title)
    return figure
