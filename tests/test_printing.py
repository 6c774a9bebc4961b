"""What is printed stays on its line, fits every encoding, and survives streams that are closed, full or gone."""

import ast
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixels import ROOT, saved
from rich.table import Table

from svdit.cli import COMMANDS, command, parser
from svdit.errors import UserError
from svdit.evaluation.compare import compare
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.report import Report, literal
from svdit.printing import printable, write_error, write_json, write_out
from svdit.report.tables import console

HOSTILE = "a\x1b[2Jb\rc\nd\x07e\u202ef\u2028g\udcff\x9bh\u200bi[/x][red]:smile:<b>|"
SAFE = "a\\x1b[2Jb\\rc\\nd\\x07e\\u202ef\\u2028g\\udcff\\x9bh\\u200bi[/x][red]:smile:<b>|"


def test_controls_become_escapes_on_one_line() -> None:
    assert printable(HOSTILE) == SAFE
    assert printable(printable(HOSTILE)) == SAFE
    assert printable("2.5× → 10 °C, ä 猫") == "2.5× → 10 °C, ä 猫"


def test_lines_and_errors_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    write_out(HOSTILE, 1)
    write_error(UserError(HOSTILE))
    assert capsys.readouterr() == (f"{SAFE}\n1\n", f"{SAFE}\n")


def test_json_has_the_types_of_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": np.bool_(False), "b": np.float32(0.5), "c": np.int64(3), "d": Path("x"), "e": math.nan})
    assert json.loads(capsys.readouterr().out) == {"a": False, "b": 0.5, "c": 3, "d": "x", "e": None}


def test_tables_and_paths_are_neither_markup_nor_controls(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(HOSTILE, box=None)
    table.add_row(HOSTILE)
    console().print(table, HOSTILE, sep="\n")
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [SAFE] * 3


def test_usage_errors_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("sample", ["--seed", HOSTILE])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", ["inspect", "sample --ckpt", "evaluate --metrics paired --paired_dir x --fake_dir"])
def test_paths_in_errors_are_printable(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = argv.split()
    with pytest.raises(SystemExit) as stop:
        command(name, [*rest, HOSTILE])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "a\\x1b[2Jb\\rc\\nd" in error and error.count("\n") == 1 and error.rstrip("\n").isprintable()


def report(text: str) -> Report:
    protocol = {"comparable": True, "n_fake": 2, "n_real": 2, "sample_vae": text}
    inputs = {side: {"path": text} for side in ("fake", "real")}
    return Report({"fid": Estimate(1.0), "mind": Estimate(None, reason=text)}, protocol, inputs, {}, (text,))


def test_reports_are_printable_and_inert_as_markdown(tmp_path: Path) -> None:
    assert len(report(HOSTILE).text().split("\n")) == len(report("x").text().split("\n"))
    assert all(line.isprintable() for line in report(HOSTILE).text().split("\n"))
    markdown = report(HOSTILE + "![](http://x)").markdown()
    assert len(markdown.split("\n")) == len(report("x").markdown().split("\n"))
    assert "<b>" not in markdown and "![](" not in markdown and "[/x]" not in markdown.replace("\\[", "")
    assert literal("a|b`c`<i>") == "a\\|b\\`c\\`&lt;i&gt;"


def test_names_in_comparisons_are_inert(tmp_path: Path) -> None:
    for name in ("full", "w4|<b>\x1b"):
        report("x").save(tmp_path / name)
    table = compare([tmp_path / "full", tmp_path / "w4|<b>\x1b"])
    assert "| w4\\|&lt;b&gt;\\\\x1b |" in table


def text_calls(path: Path) -> Iterator[tuple[str, int, str]]:
    """(file, line, call) of every call that may open a file as text, or print."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile", "print"):
                yield path.name, node.lineno, ast.unparse(node)


def test_text_files_name_their_encoding_and_one_module_prints() -> None:
    """`open` in a mode with "b", and open of images, archives and descriptors, have no encoding."""
    binary = ("b'", "open_memmap", "Image.open", "archive.open", "os.open", "TemporaryFile(", "out.print", ".print(")
    binary += ("lib.format", "safe_open", "tarfile.open", "sink.open", "super().open")
    wrong = []
    for path in (ROOT / "svdit").rglob("*.py"):
        for file, line, call in text_calls(path):
            if call.startswith("print("):
                wrong += [f"{file}:{line} {call}"] * (file != "printing.py")
            elif "encoding=" not in call and not any(part in call for part in binary):
                wrong.append(f"{file}:{line} {call}")
    assert wrong == []


def test_the_help_of_every_command_is_ascii() -> None:
    for name in COMMANDS:
        text = parser(name).format_help()
        assert text.isascii(), [c for c in text if not c.isascii()]
        assert "--quiet" in text and "--json" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_results_are_printed_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "猫.safetensors")
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as stdout, redirect_stdout(stdout):
        command("inspect", [path])
        stdout.flush()
        assert b"\\u732b.safetensors" in raw.getvalue()


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **environment}
    line = line.replace("svdit ", f"{sys.executable} -m svdit ", 1)
    return subprocess.run(["/bin/sh", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_a_command_with_closed_streams_writes_its_files(tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    tiny = saved(tmp_path / "tiny.safetensors")
    done = shell(f"svdit sample --ckpt {tiny} --device cpu --num-sampling-steps 1 --output {png} <&- >&- 2>&-")
    assert done.returncode == 0
    assert np.asarray(Image.open(png)).shape == (262, 522, 3)


def test_a_full_disk_below_stdout_is_one_line() -> None:
    done = shell("svdit --version > /dev/full")
    message = "svdit: cannot write to stdout (No space left on device); send it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_python_m_svdit_in_an_ascii_locale() -> None:
    done = shell("svdit evaluate --help", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: svdit evaluate")
    assert shell("svdit smaple").returncode == 2


def test_json_reports_are_utf8_in_every_locale(tmp_path: Path) -> None:
    code = "from pathlib import Path; from test_printing import report; report('\\u221e').save(Path('.').resolve())"
    env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=60)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["warnings"] == ["∞"]
