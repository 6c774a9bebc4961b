"""Tables of layers for the terminal."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdit.printing import printable

if TYPE_CHECKING:
    from svdit.model.caching import CachePlan
    from svdit.quant.linear import LinearSpec
    from svdit.quant.report import LayerReport

    Stored = tuple[LinearSpec, int, int, int]  # output and input features, bytes

Named = TypeVar("Named", str, "LayerReport")
MANY = 40  # layers; longer tables have one row per kind of layer
FLOATS = {"bfloat16": "BF16", "float32": "FP32"}
WIDE = 120  # columns where stdout is not a terminal


class PlainConsole(Console):
    """A console whose strings are printable lines: names in files are neither markup nor control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that rich prints, cells of tables too, becomes a Text here."""
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


def console() -> Console:
    """A console on stdout, at least WIDE where that is not a terminal."""
    terminal = PlainConsole()
    return terminal if terminal.is_terminal else PlainConsole(width=max(terminal.width, WIDE))


def plan_lines(plan: "CachePlan", depth: int) -> Iterator[str]:
    """What a cache plan is for, what was measured, and one line per group: # where an evaluation runs it."""
    steps, measured = (plan.sampling.get(key) for key in ("sampler", "steps")), plan.record
    yield f"caching: for {' '.join(map(str, steps))}, guidance {plan.sampling.get('cfg_scale')}"
    yield ", ".join(f"{key}: {value:.4g}" for key, value in measured.items() if isinstance(value, float))
    for first, end, runs in zip(plan.groups, (*plan.groups[1:], depth), plan.runs, strict=True):
        yield f"blocks {first} to {end - 1}: {runs.replace('1', '#').replace('0', '.')}"


def place(name: str) -> tuple[str, int | None]:
    """A layer's kind and block number, ("fc1", 3); the number is None outside the blocks."""
    name = name.replace("adaLN_modulation.1", "adaLN")
    match = re.search(r"\.(\d+)\.(?:.+\.)?(.+)", name)
    return (match[2], int(match[1])) if match else (name, None)


def by_kind(layers: Iterable[Named]) -> dict[str, list[Named]]:
    """Group layers, or their names, by kind; keeps the order."""
    kinds: dict[str, list[Named]] = {}
    for layer in layers:
        kinds.setdefault(place(layer if isinstance(layer, str) else layer.name)[0], []).append(layer)
    return kinds


def layer_table(layers: Sequence["LayerReport"]) -> Table:
    """One row per quantized layer; of more than MANY layers, one row per kind."""
    return kind_table(layers) if len(layers) > MANY else single_table(layers)


def kind_table(layers: Sequence["LayerReport"]) -> Table:
    """One row per kind of layer: count, total size, fewest rows fitted and held out, median and worst SQNR."""
    table = narrow("layers", "MB", "rows", "held\nout", "SQNR,\ndB", "worst")
    for kind, lines in by_kind(layers).items():
        known = sorted((line.sqnr, line.name) for line in lines if line.sqnr is not None)
        before, after = sum(line.bytes_before for line in lines), sum(line.bytes_after for line in lines)
        block = [f"in {number}" for _, name in known[:1] if (number := place(name)[1]) is not None]
        table.add_row(
            f"{len(lines)} {kind}",
            distinct(line.weight for line in lines),
            distinct(line.act for line in lines),
            ", ".join(map(str, sorted({line.rank for line in lines}))),
            f"{before / 1e6:.1f} → {after / 1e6:.1f}",
            str(min(line.rows for line in lines) or "–"),
            str(min(line.held_out for line in lines) or "–"),
            f"{median(sqnr for sqnr, _ in known):.1f}" if known else "–",
            " ".join([f"{known[0][0]:.1f}", *block]) if known else "–",
        )
    return table


def single_table(layers: Sequence["LayerReport"]) -> Table:
    """One row per quantized layer."""
    table = narrow("layer", "KB", "rows", "held\nout", "weight\nerror", "SQNR,\ndB")
    for line in layers:
        table.add_row(
            line.name,
            line.weight,
            line.act,
            str(line.rank),
            f"{line.bytes_after / 1e3:.1f}",
            str(line.rows or "–"),
            str(line.held_out or "–"),
            f"{line.weight_error:.4f}",
            "–" if line.sqnr is None else f"{line.sqnr:.1f}",
        )
    return table


def narrow(first: str, *numbers: str) -> Table:
    """A table for 80 columns: names and formats are wrapped where that is needed, numbers never."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for column in (first, "weights", "inputs", "rank"):
        table.add_column(column, overflow="fold", vertical="bottom")
    for heading in map(Text, numbers):  # of a str, `PlainConsole` would escape the line break
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return table


def spec_table(layers: Mapping[str, "Stored"]) -> Table:
    """One row per layer of what it stores; of more than MANY layers, one row per kind. At most 80 columns."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    groups = {name: [name] for name in layers} if len(layers) <= MANY else by_kind(layers)
    table.add_column("layer" if len(groups) == len(layers) else "layers", no_wrap=True)
    for column in ("shape", "weights", "inputs", "rank"):
        table.add_column(column)
    table.add_column("KB", justify="right")
    for label, names in groups.items():
        specs = [layers[name][0] for name in names]
        table.add_row(
            label if label in layers else f"{len(names)} {label}",
            distinct(f"{layers[name][1]} × {layers[name][2]}" for name in names),
            distinct(str(spec.weight or "–") for spec in specs),
            distinct(str(spec.act or "float") for spec in specs),
            distinct(
                f"{spec.rank} {spec.factors or FLOATS[spec.factor_dtype]}" if spec.rank else "–" for spec in specs
            ),
            f"{sum(layers[name][3] for name in names) / 1e3:.1f}",
        )
    return table


def distinct(texts: Iterable[str]) -> str:
    """The different ones among them, sorted."""
    return ", ".join(sorted(set(texts)))


def transform_text(layers: Mapping[str, "Stored"]) -> str:
    """What happens to the inputs of how many layers before they are quantized."""
    counts = Counter(transform(spec) for spec, *_ in layers.values())
    return "; ".join(f"{text} in {count} layer{'s' * (count > 1)}" for text, count in counts.most_common())


def transform(spec: "LinearSpec") -> str:
    """What happens to a layer's input before it is quantized."""
    parts = (("centering", spec.shifted), ("smoothing", spec.scaled), (f"Hadamard {spec.hadamard}", spec.hadamard))
    return " + ".join(text for text, used in parts if used) or "none"
