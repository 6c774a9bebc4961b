"""Errors of the system in every command: one sentence, exit code 2, no traceback, nothing half-written."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pixels import saved

from svdit import images
from svdit.cli import command

FAST = "--num-sampling-steps 2 --device cpu"
TRAIN = "train --data digits --model DiT-digits --steps 1 --log-every 1 --global-batch-size 2 --num-workers 0"
QUANTIZE = "quantize --ckpt tiny.safetensors --preset rtn --no-figures"
EVALUATE = "evaluate --real_dir set --fake_dir set --metrics fid --feature-extractor random --device cpu"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and a folder of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)
    saved(tmp_path / "tiny.safetensors")
    (tmp_path / "set").mkdir()
    for i, image in enumerate(np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)):
        images.write_png(tmp_path / "set" / f"{i}.png", image)
    return tmp_path


def message(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with; its exit code is 2."""
    name, *argv = line.split()
    with pytest.raises(SystemExit) as stop:
        command(name, argv)
    assert stop.value.code == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    return last


@contextmanager
def file_limit() -> Iterator[None]:
    """No file may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = [
    (f"sample --ckpt tiny.safetensors --output a.png {FAST}", "a.png"),
    (f"generate --ckpt tiny.safetensors --sample-dir new --num-fid-samples 1 {FAST}", "{place}/new/manifest.json"),
    (f"{QUANTIZE} --output a.safetensors", "a.safetensors.partial/.*.safetensors"),
    (f"{QUANTIZE} --output a.pt", "a.pt.partial/.*.safetensors"),
    (f"{TRAIN} --device cpu --results-dir run", "run/loss.png"),
    ("evaluate --fake_dir set --metrics paired --paired_dir set --device cpu --output out", "out/metrics.json"),
    (f"{EVALUATE} --cache-dir cache --save-stats stats.npz", "cache/features"),
]


@pytest.mark.parametrize(("line", "target"), FULL, ids=[line.split()[0] for line, _ in FULL])
def test_a_full_disk(line: str, target: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(place.rglob("*"))
    pattern = (
        f"svdit {line.split()[0]}: cannot write {target.format(place=place)} \\(File too large\\); raise the limit"
    )
    with file_limit():
        last = message(line, capsys)
    assert re.match(pattern, last), last
    new = set(place.rglob("*")) - before
    assert [path for path in new if path.is_file() and path.stat().st_size and path.name != "loss.csv"] == []
    assert not list(place.rglob(".svdit-*"))


BROKEN = {
    "sample": f"--ckpt broken.safetensors {FAST}",
    "generate": f"--ckpt broken.pt {FAST}",
    "quantize": "--ckpt broken.safetensors",
    "inspect": "broken.pt",
    "verify": "broken.safetensors --against tiny.safetensors",
    "evaluate": "--fake_dir broken.npz --paired_dir set --metrics paired --device cpu",
    "compare": "broken.json",
    "selftest": "--adm-samples admnet_guided_imagenet128.npz --adm-reference a --feature-extractor-weights broken.pt",
    "train": "--data broken.npz --model DiT-S/2",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_disk_that_cannot_be_read(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading a process's memory at address 0 is an input/output error, as on a disk that fails."""

    def fail(file: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for suffix in ("safetensors", "pt", "npz", "json"):
        (place / f"broken.{suffix}").symlink_to("/proc/self/mem")
    monkeypatch.setattr("zipfile._EndRecData", fail)  # which seeks first, and that fails otherwise in memory
    before = set(place.rglob("*"))
    last = message(f"{name} {BROKEN[name]}", capsys)
    pattern = rf"svdit {name}: cannot read \S+\.(safetensors|pt|npz|json) \(Input/output error\); check the disk"
    assert re.match(pattern, last), last
    assert {path.name for path in set(place.rglob("*")) - before} <= {"results", ".lock"}


@pytest.mark.parametrize("line", [EVALUATE, f"{TRAIN} --data classes --vae none --image-size 8 --num-workers 1"])
def test_an_image_that_cannot_be_read(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a worker process, whose error arrives with its traceback."""
    (place / "classes").mkdir()
    (place / "classes" / "0").symlink_to(place / "set")
    (place / "set" / "2.png").unlink()
    (place / "set" / "2.png").symlink_to("/proc/self/mem")
    last = message(f"{line} --device cpu", capsys)
    assert re.match(r"svdit \w+: cannot read .*2\.png \(Input/output error\); check the disk", last), last
