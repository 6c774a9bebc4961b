"""Titles name the model, its setting and the day."""

from datetime import date
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from svdit import pictures
from svdit.cli.quantize_settings import QuantizeSettings
from svdit.pictures import blank, plot, setting, subject


def test_the_subject_ends_with_a_day() -> None:
    assert subject("DiT", "", "w8a8", day="2026-01-02") == "DiT, w8a8, 2026-01-02"
    assert subject("DiT") == f"DiT, {date.today().isoformat()}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"preset": "w4a8", "rank": 8}, "w4a8, rank 8"),
        ({"preset": "rtn"}, "rtn"),
        ({"rank_ratio": 0.5, "num_bits": 4}, "rank ratio 0.5, 4 bits"),
    ],
)
def test_settings_are_those_of_a_record(options: dict[str, object], text: str) -> None:
    assert setting(QuantizeSettings(**options).record()) == text  # type: ignore[arg-type]


def test_a_target_stands_instead_of_the_rank_and_nothing_for_full_precision() -> None:
    record = QuantizeSettings(preset="w4a8", target_size=2.0).record()
    assert setting(record | {"plan": {"target_mb": 2.0, "target_sqnr": None}}) == "w4a8, at most 2 MB"
    assert setting(record | {"plan": {"target_mb": None, "target_psnr": 45.5}}) == "w4a8, PSNR 45.5 dB"
    assert setting(None) == setting({}) == "full precision"


def test_names_in_titles_are_neither_formulas_nor_warnings(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    figures: list[Figure] = []

    def draw() -> Figure:
        figures.append(blank(1, 1, 4, 3)[0])
        return figures[0]

    plot(tmp_path / "a.png", "Title", subject("$\\x$ 猫\x07", "w8a8" * 99, day="2026-01-02"), draw)
    assert figures[0].get_suptitle() == f"Title\n$\\x$ 猫\\x07, {'w8a8' * 20}, 2026-01-02"
    assert not list(recwarn)


def test_a_plot_has_its_title_and_the_style_only_within(tmp_path: Path) -> None:
    figures: list[Figure] = []

    def draw() -> Figure:
        figures.append(blank(1, 1, 4, 3)[0])
        return figures[0]

    plot(tmp_path / "a.png", "Title", "DiT, 2026-01-02", draw)
    assert figures[0].get_suptitle() == "Title\nDiT, 2026-01-02"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert blank(1, 1, 4, 3)[1][0, 0].spines["top"].get_visible()
    assert not figures[0].axes[0].spines["top"].get_visible()
    assert set(pictures.STYLE) >= {"savefig.dpi"}
