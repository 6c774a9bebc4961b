"""Tables of layers: one row per layer, or per kind of layer."""

import pytest
from rich.console import Console

from svdit.quant.report import LayerReport
from svdit.report.tables import MANY, layer_table, place


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


def printed(lines: list[LayerReport]) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(layer_table(lines))
    return capture.get()


def test_few_layers_have_a_row_each() -> None:
    assert len(printed([line(f"blocks.{i}.mlp.fc1", 20.0 + i) for i in range(MANY)]).splitlines()) > MANY


def test_many_layers_are_grouped_by_kind_with_median_and_worst() -> None:
    lines = [line(f"blocks.{i}.mlp.fc1", 60.0 - i) for i in range(MANY)]
    rows = printed([*lines, line("final_layer.linear", None)]).splitlines()
    assert len(rows) == 3
    assert " ".join(rows[1].split()) == "40 fc1 INT4 g64 INT8 4 320.0 → 40.0 900 70 40.5 21.0 in 39"
    assert " ".join(rows[2].split()) == "1 final_layer.linear INT4 g64 INT8 4 8.0 → 1.0 900 70 – –"
