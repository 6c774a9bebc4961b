"""Two processes never write one output: the second is refused with one sentence, before it does anything."""

from pathlib import Path

import numpy as np
import pytest

from svdit.cli import command
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
