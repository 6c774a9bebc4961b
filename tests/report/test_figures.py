"""The report's figures show the report's numbers, for 28 blocks, one block, and layers outside the blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.text import Text

from svdit.quant.report import LayerReport
from svdit.report import figures

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
SHORT = ("qkv", "proj", "fc1", "fc2", "adaLN")
LINES = ("original", "transformed", "remaining")
STEPS = [999, 500, 0]


def names(blocks: int) -> list[str]:
    inside = [f"blocks.{i}.{kind}" for i in range(blocks) for kind in KINDS]
    return [*inside, "final_layer.adaLN_modulation.1"]


def line(name: str, size: int = 1000) -> LayerReport:
    return LayerReport(name, "INT4", "INT8", 4, 64, 64, True, 8 * size, size, 20.0, 0.1, 0.5, 0.5)


def numbers(blocks: int, halves: tuple[str, ...] = ("conditional", "unconditional")) -> dict[str, Any]:
    rng, every = np.random.default_rng(0), names(blocks)
    histogram = {"limit": 5.0, "shares": [0.0, 0.1, 0.8, 0.1, 0.0], "peak": 3.0}
    return {
        "sqnr": {name: float(rng.uniform(20, 50)) for name in every},
        "time": "timesteps",
        "timesteps": STEPS,
        "errors": {half: {name: rng.uniform(0.001, 0.1, len(STEPS)).tolist() for name in every} for half in halves},
        "spectra": {n: {"rank": 2, **{key: [1.0, 0.5, 0.1] for key in LINES}}
                    for n in every[:3]},
        "smoothing": {n: {"alpha": i % 2 / 2, "beta": 0.3, "scale_quantiles": [0.5, 0.8, 1, 2, 4]}
                      for i, n in enumerate(every) if "adaLN" not in n},
        "activations": {n: {"before": histogram, "after": histogram} for n in every[:1]},
        "curve": [(1e6, 10.0), (2e6, 20.0), (3e6, 30.0)],
        "chosen": (2e6, 20.0),
    }  # fmt: skip


ALL = ("layers", "timesteps", "spectra", "smoothing", "activations", "pareto")


@pytest.mark.parametrize(("blocks", "expected"), [(28, ALL), (1, ALL[:2])])
def test_every_figure_is_drawn_and_not_empty(blocks: int, expected: tuple[str, ...], tmp_path: Path) -> None:
    measured = numbers(blocks)
    if expected != ALL:
        measured |= {"smoothing": {}, "activations": {}, "spectra": {}, "curve": None}
    paths = figures.draw(tmp_path / "r", [line(name) for name in names(blocks)], measured, "DiT, w8a8, 2026-11-28")
    assert tuple(path.stem for path in paths) == expected
    assert sorted((tmp_path / "r").iterdir()) == sorted(paths)
    for path in paths:
        pixels = imread(path)[..., :3]
        assert 0.002 < (pixels < 0.95).any(-1).mean() < 0.95, path
        edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
        assert (edge == 1).all(), f"{path} is cut off"


def test_exponents_are_drawn_where_a_grid_chose_them() -> None:
    chosen = numbers(2)["smoothing"]
    assert len(figures.smoothing(chosen).axes) == 2 * 4
    balanced = {name: layer | {"alpha": 0.5, "beta": 0.5} for name, layer in chosen.items()}
    assert {axis.get_ylabel() for axis in figures.smoothing(balanced).axes} == {"λ per channel", ""}


def test_layers_are_at_their_blocks_with_their_sqnr_and_size() -> None:
    measured = numbers(3)
    figure = figures.layers([line(name, size=i + 1) for i, name in enumerate(names(3))], measured["sqnr"])
    top, bottom = figure.axes
    for drawn, kind in zip(top.get_lines(), KINDS, strict=False):
        assert list(drawn.get_xdata()) == [0, 1, 2]
        assert list(drawn.get_ydata()) == [measured["sqnr"][f"blocks.{i}.{kind}"] for i in range(3)]
    assert [text.get_text() for text in top.get_legend().get_texts()][0::5] == ["qkv", "final_layer.adaLN"]
    tops = {}
    for bar in bottom.patches[4:]:  # the first four: full precision
        middle = bar.get_x() + bar.get_width() / 2
        tops[middle] = max(tops.get(middle, 0), bar.get_y() + bar.get_height())
    assert tops == pytest.approx({0: 15e-6, 1: 40e-6, 2: 65e-6, 3.5: 16e-6})


def test_mixed_formats_show_bits_and_rank_of_every_layer() -> None:
    lines = [replace(line(name), weight=f"INT{2 + i % 3} g64", rank=8 * (i % 2)) for i, name in enumerate(names(3))]
    top, middle, bottom = figures.layers(lines, numbers(3)["sqnr"]).axes
    bits = {colour: int(text.get_text().split()[0]) for text, colour in legend_of(middle)}
    shown = {
        (round(bar.get_x() + 0.45, 1), round(bar.get_y() + 0.45)): bits[bar.get_facecolor()] for bar in middle.patches
    }
    assert shown == {(i // 5, i % 5): 2 + i % 3 for i in range(15)} | {(3.5, 5): 2}
    assert [text.get_text() for text in middle.texts] == ["8"] * 8
    assert [tick.get_text() for tick in middle.get_yticklabels()] == [*SHORT, "final_layer.adaLN"]
    assert (len(top.get_lines()), bottom.get_ylabel()) == (6, "size, MB")


def legend_of(axis: Axes) -> list[tuple[Text, Any]]:
    """The texts of a legend and the colours beside them."""
    legend = axis.get_legend()
    return [(t, patch.get_facecolor()) for t, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)]


def test_the_heat_map_is_the_errors_by_kind_and_block() -> None:
    measured = numbers(3)
    figure = figures.timesteps(measured)
    left, right, bar = figure.axes
    order = [f"blocks.{i}.{kind}" for kind in KINDS for i in range(3)] + ["final_layer.adaLN_modulation.1"]
    for axis, half in ((left, "conditional"), (right, "unconditional")):
        expected = 100 * np.array([measured["errors"][half][name] for name in order])
        np.testing.assert_allclose(axis.images[0].get_array(), expected)
        assert axis.get_title() == half
    assert left.images[0].norm.vmax == right.images[0].norm.vmax
    assert [tick.get_text() for tick in left.get_yticklabels()] == [*SHORT, "final_layer.adaLN"]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["999", "500", "0"]
    assert bar.get_ylabel().endswith("%")


def test_without_guidance_there_is_one_panel_and_errors_may_be_zero() -> None:
    measured = numbers(1, ("conditional",))
    measured["errors"]["conditional"]["blocks.0.attn.qkv"] = [0.0, 0.0, 0.0]
    figure = figures.timesteps(measured)
    assert len(figure.axes) == 2
    assert figure.axes[0].images[0].norm.vmin > 0


@pytest.mark.parametrize(("time", "label"), [("noise_to_data", "noise (0)"), ("data_to_noise", "noise (1)")])
def test_the_time_of_a_flow_is_named_with_its_direction(time: str, label: str) -> None:
    measured = numbers(1) | {"time": time, "timesteps": [0.0, 0.02, 1.0]}
    measured["errors"]["unconditional"]["blocks.0.attn.qkv"] = [None, 0.1, 0.2]  # outside of the guidance interval
    left, right, _ = figures.timesteps(measured).axes
    assert label in left.get_xlabel()
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0", "0.02", "1"]
    assert np.isnan(np.ma.filled(right.images[0].get_array(), np.nan)).sum() == 1


def test_the_pareto_curve_marks_the_choice() -> None:
    measured = numbers(1)
    curve, star = figures.pareto(measured["curve"], measured["chosen"]).axes[0].get_lines()
    assert list(curve.get_xdata()) == [1, 2, 3]
    assert list(curve.get_ydata()) == [10, 20, 30]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, 20)
