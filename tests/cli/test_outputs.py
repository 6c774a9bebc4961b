"""Outputs are not lost: two processes never write one, and none of a default name is replaced without --overwrite."""

from pathlib import Path

import numpy as np
import pytest
from pixels import saved

from svdit.cli import COMMANDS as NAMES
from svdit.cli import command, parser
from svdit.files import exclusive

CPU = ["--device", "cpu"]
STEPS = ["--num-sampling-steps", "2", *CPU]
EVALUATE = ["--real_dir", "r.npz", "--fake_dir", "r.npz", "--feature-extractor", "random", "--cache-dir", "", *CPU]
COMMANDS = {
    "sample": ["--ckpt", "digits", "--output", "out.png", *STEPS],
    "quantize": ["--ckpt", "digits", "--preset", "rtn", "--output", "out.safetensors", *CPU],
    "generate": ["--ckpt", "digits", "--num-fid-samples", "2", "--sample-dir", "out", *STEPS],
    "train": ["--data", "digits", "--model", "DiT-digits", "--results-dir", "out", *CPU],
    "evaluate": ["--output", "out", *EVALUATE],
    "cache": ["digits", "--speedup", "2", "--output", "out.pt", *STEPS],
    "export": ["digits", "--to", "onnx", "--output", "out.onnx"],
}
OUTPUTS = [(name, next(word for word in words if word.startswith("out"))) for name, words in COMMANDS.items()]
OUTPUTS += [("generate", "out.npz"), ("quantize", "out.report.json"), ("evaluate", "stats.npz")]


@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_an_output_that_another_process_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("r.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    if "." not in output:
        Path(output).mkdir()
    flags = [*COMMANDS[name], *(["--save-stats", "stats.npz"] if output == "stats.npz" else [])]
    with exclusive(output), pytest.raises(SystemExit) as stop:
        command(name, flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"svdit {name}: another process is writing ")
    assert error.endswith(f"{output}; wait for it to finish, or choose another name")
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"r.npz"}


UNNAMED = {  # arguments without --output, and what they would write
    "sample": ("--ckpt nowhere", ["sample.png"]),
    "quantize": (
        "--ckpt nowhere", ["quantized_model.safetensors", "quantized_model.report.json", "quantized_model.report"]
    ),
    "recover": (
        "nowhere --against nowhere",
        ["recovered_model.safetensors", "recovered_model.recovery.json", "recovered_model.recovery.png"],
    ),
    "cache": ("nowhere --speedup 2", ["cached_model.safetensors"]),
    "report": ("nowhere", ["report.html"]),
}  # fmt: skip
RESUMED = {"generate": "sample_dir", "train": "results_dir"}  # folders of a default name


@pytest.mark.parametrize("name", NAMES)
def test_every_default_file_has_overwrite_and_every_default_folder_is_resumed(name: str) -> None:
    options = {action.dest: action for action in parser(name)._actions}
    defaults = {dest for dest, action in options.items() if isinstance(action.default, Path)}
    assert defaults == ({"output"} if name in UNNAMED else {RESUMED[name]} if name in RESUMED else set())
    assert ("overwrite" in options) == (name in UNNAMED)
    if name in UNNAMED:
        assert str(options["output"].default) == UNNAMED[name][1][0]


@pytest.mark.parametrize(("name", "output"), [(name, out) for name, (_, outs) in UNNAMED.items() for out in outs])
def test_an_existing_output_of_the_default_name_is_kept_unless_overwrite_or_output_is_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if output.endswith(".report"):
        Path(output).mkdir()
    else:
        Path(output).write_text("older")
    words, outs = UNNAMED[name]

    def error(*more: str) -> str:
        with pytest.raises(SystemExit) as stop:
            command(name, [*words.split(), *more])
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    refused = f"svdit {name}: {output} exists; pass --output with another name, or --overwrite to replace it"
    assert error() == refused
    assert "nowhere" in error("--overwrite")  # what is wrong next
    assert "nowhere" in error("--output", outs[0])
    assert "nowhere" in error(f"--output=./{outs[0]}")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [output]


def test_overwrite_replaces_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--ckpt", saved(tmp_path / "tiny.safetensors"), *STEPS, "--seed"]
    command("sample", [*arguments, "0"])
    first = Path("sample.png").read_bytes()
    with pytest.raises(SystemExit):
        command("sample", [*arguments, "1"])
    assert Path("sample.png").read_bytes() == first
    command("sample", [*arguments, "1", "--overwrite"])
    second = Path("sample.png").read_bytes()
    assert second != first
    command("sample", [*arguments, "0", "--output", "sample.png"])
    assert Path("sample.png").read_bytes() == first
