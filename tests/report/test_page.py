"""The report page's data: what belongs together, PSNR, sizes, warnings; files of earlier versions; hostile names."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest

from svdit.cli import command
from svdit.errors import UserError
from svdit.images import write_png
from svdit.report import page
from svdit.report.page_heat import coloured
from svdit.report.page_images import gallery, groups, psnr
from svdit.report.page_inputs import read_inputs
from svdit.report.page_markup import join, tag
from svdit.report.page_plots import Axis, thinned


class Reader(HTMLParser):
    """The elements of a page with their attributes, and its text by element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs)
        self.elements.append((name, dict(attrs)))
        if name not in ("meta", "input", "img"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    pages.write_all(root)
    return root


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return page.build([root]).html


def shown(html: str) -> list[dict[str, Any]]:
    """The galleries' data."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]


def rows(html: str, section: str) -> list[list[str]]:
    """The cells of the first table of a section."""
    table = html.split(f'<section id="{section}"')[1].split("</table>")[0]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]


def test_a_quantized_model_its_images_and_its_metrics_are_one_run(root: Path) -> None:
    runs = read_inputs([root]).runs
    assert [run.name for run in runs] == ["full", "w8a8", "w4a4"] or [run.name for run in runs] == [
        "full",
        "w4a4",
        "w8a8",
    ]
    assert runs[0].full_precision and not runs[0].report
    for run in runs[1:]:
        assert run.source is not None and run.source.path.name == run.name
        assert run.metrics == root / f"{run.name}-evaluation" / "metrics.json"


def test_every_kind_of_path_leads_to_the_same_page(root: Path, html: str) -> None:
    (root / "w8a8.safetensors").touch()
    paths = ["full/manifest.json", "w4a4.report.json", "w8a8.safetensors", "w8a8.report.json", "w4a4", "w8a8"]
    paths += ["w8a8-evaluation", "w4a4-evaluation/metrics.json"]
    assert page.build([root / path for path in paths]).html == html
    assert page.build(sorted(root.iterdir())).html == html


def test_the_summary_has_sizes_and_measured_quality(html: str) -> None:
    table = {row[0]: row[1:] for row in rows(html, "summary")}
    assert table["w8a8"] == ["2.00", "4.00×", "28.0 ± 1.0", "INT8", "INT8", "8", "38.0", "9.5"]
    assert table["w4a4"][3] == "INT4 g64"
    assert "full" not in table


def test_metrics_have_errors_differences_and_their_protocol(html: str) -> None:
    assert rows(html, "metrics") == [
        ["set", "psnr"], ["w4a4", "22.0 ± 1.0"], ["w8a8", "28.0 ± 1.0 (+6.0 ± 1.4)"],
    ]  # fmt: skip
    assert "not comparable" not in html
    assert '<th scope="row">n fake</th><td>12</td><td>12</td>' in html


def test_sets_of_other_protocols_have_tables_of_their_own(root: Path, tmp_path: Path) -> None:
    for name in ("w8a8", "w4a4"):
        content = json.loads((root / f"{name}-evaluation" / "metrics.json").read_text())
        content["protocol"]["n_fake"] = 4 if name == "w8a8" else 5
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    html = page.build([tmp_path]).html
    assert rows(html, "metrics") == [["set", "psnr"], ["w4a4", "22.0 ± 1.0"]]
    assert "different protocols and are not comparable" in html
    assert "28.0 ± 1.0</td>" in html


def test_psnr_of_each_image_and_identical_ones(html: str) -> None:
    (data,) = shown(html)
    expected = {"w8a8": 20 * math.log10(255 / pages.STEP), "w4a4": 20 * math.log10(255 / (2 * pages.STEP))}
    assert [row["label"] for row in data["images"]] == [i % 3 for i in range(pages.COUNT)]
    for i, row in enumerate(data["images"]):
        for name, value in zip(data["columns"][1:], row["psnr"], strict=True):
            if (name, i) == ("w8a8", 3):
                assert value == "identical"
            else:
                assert value == pytest.approx(expected[name], abs=1e-9)
    assert psnr(pages.images()[0], pages.images(4)[0]) is None


def test_warnings_name_few_rows_layers_left_alone_and_without_a_kernel(html: str) -> None:
    text = " ".join(Reader(html.split('<section id="warnings"')[1].split("</section>")[0]).text["li"])
    few = "1 of 6 layers were calibrated with fewer than 4 rows per input feature"
    for part in (few, "blocks.2.mlp.fc2, 100 rows for 64 features", "head was not quantized: has a forward hook",
                 "2 of 6 layers in fp32: no kernel", "few images"):  # fmt: skip
        assert part in text
    assert "svdit quantize --preset INT8</code>" in html
    assert "x_embedder.proj" in html


def test_a_page_without_warnings_says_so(tmp_path: Path) -> None:
    pages.write_set(tmp_path / "a", pages.images())
    pages.write_set(tmp_path / "b", pages.images(), quantization={"preset": "rtn"})
    html = page.build([tmp_path]).html
    assert "No warnings." in html and 'id="warnings"' not in html


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"seed": 1}, "differs in seed"),
        ({"steps": 20, "sampler": "ddim"}, "differs in sampler, steps"),
        ({"num_classes": 7}, "differs in num_classes"),
    ],
)
def test_unpaired_sets_are_named_with_the_reason(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    pages.write_set(tmp_path / "full", pages.images())
    pages.write_set(tmp_path / "other", pages.images(), quantization={"preset": "rtn"}, **fields)
    result = page.build([tmp_path / "full", tmp_path / "other"])
    assert shown(result.html) == []
    assert any("other: no full-precision set" in note and reason in note for note in result.notes)
    assert "full: no other set here is from the same noise." in result.notes
    assert all(part in result.html for part in ("from the same noise", reason))


def test_cached_images_are_not_those_of_the_quantized_model(root: Path, tmp_path: Path) -> None:
    """In any order."""
    shutil.copytree(root, tmp_path / "all")
    manifest = json.loads((root / "w8a8" / "manifest.json").read_text())
    pages.write_set(
        tmp_path / "all" / "cached", pages.images(), quantization=manifest["quantization"], caching={"speedup": 2.0}
    )
    for order in (["all/cached", "all"], ["all", "all/cached"]):
        runs = {run.name: run for run in read_inputs([tmp_path / name for name in order]).runs}
        assert runs["w8a8"].source and runs["w8a8"].source.path.name == "w8a8"
        assert runs["cached"].source and not runs["cached"].full_precision


def test_a_quantized_set_alone_is_named(tmp_path: Path) -> None:
    pages.write_set(tmp_path / "q", pages.images(), quantization={"preset": "rtn"})
    assert page.build([tmp_path / "q"]).notes == [
        "q: there is no full-precision set here to compare it with; add the folder of one."
    ]


def test_two_models_have_two_galleries(tmp_path: Path) -> None:
    for model in ("a", "b"):
        for name, quantization in ((f"{model}-full", None), (f"{model}-q", {"preset": "rtn"})):
            pages.write_set(tmp_path / name, pages.images(), quantization=quantization, model=model)
    galleries = shown(page.build([tmp_path]).html)
    assert [each["columns"] for each in galleries] == [["a-full", "a-q"], ["b-full", "b-q"]]


def test_large_sets_are_cut_to_the_limit_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LIMIT", 400_000)
    for name, quantization in (("full", None), ("q", {"preset": "rtn"})):
        pages.write_set(tmp_path / name, pages.images(64, 16), quantization=quantization)
    result = page.build([tmp_path])
    (data,) = shown(result.html)
    assert (
        350_000 - 50_000 - 2 * 20_000 < len(result.html.encode()) <= 400_000
    )  # noise: about 16 KB each, 4/3 in base64
    assert 0 < len(data["images"]) < 16 == data["of"]
    assert f"{16 - len(data['images'])} of 16 are left out" in result.html
    assert [row["name"] for row in data["images"]][:: len(data["images"]) - 1] == ["000000", "000015"]


def test_the_gain_makes_the_worst_models_differences_visible(root: Path) -> None:
    (group,), _ = groups(read_inputs([root]).runs)
    assert gallery(group, 10**6)["gain"] == 4  # 2 STEP = 20 levels; 64 / 20, rounded to a power of 2


def test_an_image_grid_is_embedded(root: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "grid.png", pages.images()[0])
    result = page.build([root / "w8a8.report.json", tmp_path / "grid.png"])
    assert result.images == 1
    assert ("img", "sample grid grid.png") in [(name, a.get("alt")) for name, a in Reader(result.html).elements]


def test_every_image_has_an_alternative_and_no_address_leaves_the_page(html: str) -> None:
    elements = Reader(html).elements
    assert [a for name, a in elements if name == "img" and "alt" not in a] == []
    assert [a for name, a in elements if name == "svg" and not a.get("aria-label")] == []
    addresses = [a.get(key) for _, a in elements for key in ("src", "href", "action", "poster", "srcset") if a.get(key)]
    assert addresses and all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not re.search(r"url\(|@import|https?://", html)
    assert len(html.encode()) < page.LIMIT


HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(1)">'"&<!-- ]]> \u202e\x1b[2J"""


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [poisoned(each) for each in value]
        return HOSTILE if isinstance(value, str) else value

    content = poisoned(pages.report())
    content["measured"] |= {"time": "timesteps", "spectra": {HOSTILE: {"rank": 8, **pages.SPECTRUM}}}
    content["measured"]["errors"] = {"conditional": {HOSTILE: [0.1, 0.2, 0.3]}}
    name = HOSTILE.replace("/", "∕").replace("\x1b", "")
    (tmp_path / f"{name}.report.json").write_text(json.dumps(content))
    pages.write_set(tmp_path / f"{name} full", pages.images(), model=HOSTILE)
    pages.write_set(tmp_path / name, pages.images(), model=HOSTILE, quantization=content["settings"])
    metrics = pages.write_metrics(tmp_path / f"{name}-evaluation", tmp_path / name, 30.0) / "metrics.json"
    changes = {"warnings": [HOSTILE], "protocol": {HOSTILE: HOSTILE}}
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | changes))
    html = page.build([tmp_path]).html
    elements = Reader(html).elements
    assert sum(name == "script" for name, _ in elements) == 2
    assert [key for _, a in elements for key in a if key.startswith("on")] == []
    assert [a for name, a in elements if a.get("src") == "x"] == []
    assert shown(html)[0]["model"] == HOSTILE
    assert not any(c in html for c in "\u202e\x1b")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in JSON; of a list, those of the first entry."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [path, *(leaf for key, each in inside for leaf in leaves(each, (*path, key)))]


@pytest.mark.parametrize("other", [-1, "text", {"a": None}])
def test_reports_with_other_values_make_a_page_or_one_sentence(other: Any, tmp_path: Path) -> None:
    for path in leaves(pages.report())[1:]:
        content = pages.report()
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = other
        (tmp_path / "q.report.json").write_text(json.dumps(content))
        refused = path == ("layers",) and not isinstance(other, list)
        with pytest.raises(UserError, match="is not a report of svdit quantize") if refused else nullcontext():
            Reader(page.build([tmp_path / "q.report.json"]).html)


def test_reports_of_earlier_versions_make_a_page(tmp_path: Path) -> None:
    content = {"layers": [{"name": "a", "weight": "INT8", "rank": 4}], "bytes_before": 8, "bytes_after": 2}
    (tmp_path / "old.report.json").write_text(json.dumps(content))
    html = page.build([tmp_path / "old.report.json"]).html
    assert rows(html, "summary")[1:] == [["old", "0.00", "4.00×", "–", "INT8", "–", "4", "–", "–"]]
    assert "The command is not recorded" in html


def test_the_commands_that_made_images_and_metrics_are_shown_once_each(tmp_path: Path) -> None:
    made, measured = "svdit generate --sample-dir full\udcff", "svdit evaluate --fake-dir full"
    folder = pages.write_set(tmp_path / "full", pages.images(), command=made)
    metrics = pages.write_metrics(tmp_path / "full-evaluation", folder, 40.0)
    for command_line, count in ((measured, 1), (made, 0)):  # the second is `generate --evaluate`
        content = json.loads((metrics / "metrics.json").read_text())
        content.pop("sha256", None)
        (metrics / "metrics.json").write_text(json.dumps({**content, "command": command_line}))
        html = page.build([folder, metrics]).html
        assert (html.count("svdit generate --sample-dir"), html.count(measured)) == (1, count)
        html.encode()


def test_a_recovered_or_cached_checkpoint_points_to_the_report_before(tmp_path: Path) -> None:
    (tmp_path / "r.safetensors").write_text("")
    with pytest.raises(UserError, match="recover and svdit cache write none; pass that of the file before"):
        page.build([tmp_path / "r.safetensors"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "there is no file or folder"),
        ("a.report.json", "[1]", "is not a report of svdit quantize"),
        ("a.report.json", "{", "is not readable JSON"),
        ("a.safetensors", "", "beside"),
        ("metrics.json", "{}", "is not a metrics.json"),
        ("manifest.json", "{}", "is not a manifest"),
        ("a.png", "", "cannot be read as an image"),
        ("a.txt", "", "is no report"),
        ("folder/a.txt", "", "contains no report, set or metrics"),
    ],
)
def test_other_files_are_one_sentence_and_exit_code_2(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        command("report", [str(tmp_path / name.split("/")[0]), "--output", str(tmp_path / "out" / "r.html")])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "out" / "r.html").exists()


def test_strings_are_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>", tag("i", 'a"'), data_x='"<', hidden=True, id=None) == (
        '<p data-x="&quot;&lt;" hidden>&lt;b&gt;<i>a&quot;</i></p>'
    )
    assert join(["<", None, tag("img", alt="")]) == '&lt;<img alt="">'


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0, 10), [0, 2, 4, 6, 8, 10]),
        (Axis("", 1.7, 2.4), [1.8, 2.0, 2.2, 2.4]),
        (Axis("", 1, 1000, log=True), [1, 10, 100, 1000]),
        (Axis("", 0.04, 0.3, log=True), [0.05, 0.1, 0.2]),
    ],
)
def test_ticks_are_round_and_inside(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)
    assert [axis.at(axis.low), axis.at(axis.high)] == pytest.approx([0, 1])


def test_colours_run_over_the_scale_and_nothing_is_grey() -> None:
    colours = coloured(np.array([[1.0, 10.0, 100.0, np.nan, -1.0]]), 1, 100)[0].tolist()
    assert colours[0] == colours[4] == [0x44, 0x01, 0x54] and colours[2] == [0xFD, 0xE7, 0x25]
    assert colours[3] == [128] * 3
    assert colours[1] not in colours[::2]


def test_long_curves_are_thinned_with_both_ends() -> None:
    curve = [(float(i), 1.0 / i) for i in range(1, 2001)]
    few = thinned(curve)
    assert few[0] == curve[0] and few[-1] == curve[-1] and 40 < len(few) <= 80


@pytest.mark.parametrize(("side", "small"), [(8, True), (128, False)])
def test_large_images_are_smoothed_and_small_ones_are_not(side: int, small: bool, tmp_path: Path) -> None:
    for name, quantization in (("full", None), ("q", {"preset": "rtn"})):
        pages.write_set(tmp_path / name, pages.images(side, 2), quantization=quantization)
    assert shown(page.build([tmp_path]).html)[0]["small"] is small
