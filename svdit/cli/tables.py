"""Tables for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from svdit.quant.recipe import LayerReport


def layer_table(layers: Sequence["LayerReport"]) -> Table:
    """One row a quantized layer."""
    table = Table(box=None, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for column in ("weights", "inputs"):
        table.add_column(column)
    for column in ("rank", "KB before", "KB after", "weight error", "output SQNR, dB", "α, β"):
        table.add_column(column, justify="right")
    for line in layers:
        table.add_row(
            line.name,
            line.weight,
            line.act,
            str(line.rank),
            f"{line.bytes_before / 1e3:.1f}",
            f"{line.bytes_after / 1e3:.1f}",
            f"{line.weight_error:.4f}",
            "–" if line.sqnr is None else f"{line.sqnr:.1f}",
            f"{line.alpha:.2f}, {line.beta:.2f}",
        )
    return table
