"""Layers that the backend does not support run in fp32: every command that meets them says so and records it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pixels import saved

from svdit.cli import command
from svdit.kernels import ops
from svdit.kernels.layer import LinearSpec

FAST = "--num-sampling-steps 2 --device cpu"
QUANTIZE = "--preset w4a8 --rank 4 --calib-images 1 --calib-steps 1 --no-figures --device cpu"


def without_adaln(spec: LinearSpec, *_: object) -> str:
    return "" if spec.act else "weight-only INT8"


@pytest.mark.parametrize(
    ("unsupported", "summary"), [(without_adaln, "2 of 6 layers in fp32: weight-only INT8"), (lambda *_: "", None)]
)
def test_fallbacks_are_printed_and_recorded(
    unsupported: object,
    summary: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SVDIT_BACKEND", "dequant")
    monkeypatch.setitem(ops.BACKENDS, "dequant", replace(ops.BACKENDS["dequant"], unsupported=unsupported))

    def printed(line: str) -> str:
        name, *argv = line.split()
        command(name, argv)
        return " ".join(" ".join(capsys.readouterr()).split())

    path = tmp_path / "q.safetensors"
    commands = [
        f"quantize --ckpt {saved(tmp_path / 'tiny.safetensors')} --output {path} {QUANTIZE}",
        f"inspect {path}",
        f"sample --ckpt {path} --output {tmp_path}/a.png {FAST}",
        f"generate --ckpt {path} --sample-dir {tmp_path}/set --num-fid-samples 1 {FAST}",
    ]
    for line in commands:
        text = printed(line)
        assert summary in text if summary else "in fp32" not in text, line
    for file in (path.with_suffix(".report.json"), tmp_path / "set" / "manifest.json"):
        record = json.loads(file.read_text())
        assert (record["backend"], record["fallbacks"]) == ("dequant", summary), file
