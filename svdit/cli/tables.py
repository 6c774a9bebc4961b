"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from svdit.quant.linear import SVDLinear
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


def spec_table(layers: Mapping[str, "SVDLinear"]) -> Table:
    """One row a layer: what it stores."""
    table = Table(box=None, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "weights", "inputs", "factors", "transform"):
        table.add_column(column)
    table.add_column("KB", justify="right")
    for name, layer in layers.items():
        spec = layer.spec
        parts = [("centred", spec.shifted), ("smoothed", spec.scaled), (f"Hadamard {spec.hadamard}", spec.hadamard)]
        table.add_row(
            name,
            f"{layer.out_features} × {layer.in_features}",
            str(spec.weight or "–"),
            str(spec.act or "as they are"),
            f"rank {spec.rank}, {spec.factors or spec.factor_dtype}" if spec.rank else "–",
            ", ".join(text for text, there in parts if there) or "–",
            f"{spec.nbytes(layer.out_features, layer.in_features, layer.bias is not None) / 1e3:.1f}",
        )
    return table
