"""Tables of layers: one row per layer, or per kind of layer."""

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from rich.constrain import Constrain

from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.quant.linear import LinearSpec
from svdit.quant.report import LayerReport
from svdit.report.tables import MANY, by_kind, layer_table, place, spec_table, transform_text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.27.attn.qkv", ("qkv", 27)),
        ("blocks.3.adaLN_modulation.1", ("adaLN", 3)),
        ("final_layer.adaLN_modulation.1", ("final_layer.adaLN", None)),
        ("t_embedder.mlp.2", ("t_embedder.mlp.2", None)),
        ("head", ("head", None)),
    ],
)
def test_a_layers_place(name: str, expected: tuple[str, int | None]) -> None:
    assert place(name) == expected


def line(name: str, sqnr: float | None) -> LayerReport:
    sizes = 4, 64, 64, True, 8_000_000, 1_000_000
    return LayerReport(name, "INT4 g64", "INT8", *sizes, sqnr, 0.1, 0.5, 0.5, inputs=64, rows=900, held_out=70)


def printed(table: RenderableType, width: int = 100) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(row.split()) for row in capture.get().splitlines()]


def test_few_layers_have_a_row_each() -> None:
    assert len(printed(layer_table([line(f"blocks.{i}.mlp.fc1", 20.0 + i) for i in range(MANY)]))) > MANY


def test_many_layers_are_grouped_by_kind_with_median_and_worst() -> None:
    lines = [line(f"blocks.{i}.mlp.fc1", 60.0 - i) for i in range(MANY)]
    rows = printed(layer_table([*lines, line("final_layer.linear", None)]))
    assert len(rows) == 4
    assert rows[2] == "40 fc1 INT4 g64 INT8 4 320.0 → 40.0 900 70 40.5 21.0 in 39"
    assert rows[3] == "1 final_layer.linear INT4 g64 INT8 4 8.0 → 1.0 900 70 – –"


@pytest.mark.parametrize("blocks", [6, 28])
def test_reports_fit_80_columns_without_cutting_a_number(blocks: int) -> None:
    """As an 80-column terminal shows them: names are wrapped instead, and not those of the digits' blocks."""
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    names = [*(f"blocks.{i}.{kind}" for i in range(blocks) for kind in kinds), "final_layer.adaLN_modulation.1"]
    lines = [
        replace(line(name, 38.25), act="INT4 g64", bytes_after=105_000, rows=20_000, held_out=512) for name in names
    ]
    rows = printed(layer_table(lines), 80)
    assert max(map(len, rows)) <= 80 and "…" not in "".join(rows)
    assert sum("20000 512" in row for row in rows) == len(by_kind(names) if blocks == 28 else names)
    assert sum("38.2" in row for row in rows) == sum("20000 512" in row for row in rows)
    assert blocks == 28 or all(any(row.startswith(f"{name} ") for row in rows) for name in names[:-1])


def test_any_mixture_of_formats_fits_80_columns() -> None:
    """On a wider terminal too: `svdit inspect` prints at most 80 columns everywhere."""
    layers = {}
    for i in range(28):
        for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            spec = LinearSpec(8 * (i % 5), None, "bfloat16", Format(2 + i % 7, group=64, scale="bf16"), Format(8))
            layers[f"blocks.{i}.{kind}"] = (spec, 4608 + i // 20, 1152, 3_000_000)
    rows = printed(Constrain(spec_table(layers), 80), 300)
    assert max(map(len, rows)) <= 80
    assert all(f"INT{bits}" in " ".join(rows) for bits in range(2, 9))


@pytest.mark.parametrize("count", [MANY - 1, MANY])
def test_what_layers_store_fits_80_columns(count: int) -> None:
    spec = LinearSpec(32, None, "bfloat16", WEIGHT_FORMATS["int4"], Format(8), True, True, 64)
    plain = LinearSpec(0, None, "bfloat16", Format(8), None, False, False, 0)
    layers = {f"blocks.{i}.mlp.fc1": (spec, 4608, 1152, 3_000_000) for i in range(count)}
    layers["final_layer.adaLN_modulation.1"] = (plain, 2304, 1152, 2_700_000)
    rows = printed(spec_table(layers), 80)
    assert len(rows) == 1 + (count + 1 if count < MANY else 2)
    label, total = ("blocks.0.mlp.fc1", 3000) if count < MANY else (f"{count} fc1", 3000 * count)
    assert rows[1] == f"{label} 4608 × 1152 INT4 g64 INT8 32 BF16 {total:.1f}"
    assert rows[-1].endswith("adaLN_modulation.1 2304 × 1152 INT8 float – 2700.0" if count < MANY else "2700.0")
    assert transform_text(layers) == f"centering + smoothing + Hadamard 64 in {count} layers; none in 1 layer"
