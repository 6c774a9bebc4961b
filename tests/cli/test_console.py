"""What every command prints, on tiny inputs: progress, and with --quiet nothing but the result."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pixels import saved

from svdit.cli import COMMANDS, command
from svdit.evaluation import inception
from svdit.evaluation.selftest import Check
from svdit.images import write_png
from svdit.progress import Task

LINES = {
    "sample": "--ckpt {tiny} --num-sampling-steps 2 --output {out}/a.png --device cpu",
    "generate": "--ckpt {tiny} --num-sampling-steps 2 --num-fid-samples 3 --sample-dir {out}/set --device cpu",
    "quantize": "--ckpt {tiny} --calib-images 2 --calib-steps 2 --target-size 1 --output {out}/q.pt --device cpu",
    "inspect": "{quantized}",
    "verify": "{quantized} --against {tiny}",
    "evaluate": "--real_dir {real} --fake_dir {fake} --paired_dir {real} --feature-extractor random --device cpu "
    "--metrics fid,paired --cache-dir {out}/cache --output {out}/report",
    "compare": "{report} {report}",
    "selftest": "",
    "train": "--data digits --model DiT-digits --steps 2 --log-every 1 --global-batch-size 2 --num-workers 0 "
    "--device cpu --results-dir {out}/run",
}
PARTS = {  # of the work of each command, which can take minutes
    "sample": {"sampling": "2 steps"},
    "generate": {"generating": "3 images"},
    "quantize": {"calibrating": "4 steps", "choosing formats": "6 layers", "quantizing": "6 layers"},
    "evaluate": {
        **dict.fromkeys(("checking fake", "checking real", "reading fake", "reading real"), "4 images"),
        **{"features of fake": "4 images", "features of real": "4 images"},
        **{"computing": "1 metrics", "comparing": "4 pairs"},
    },
    "train": {"training": "2 steps"},
}
NOTED = {  # options without effect, which are reported
    "sample": "--cfg-scale 1 --cfg-channels all",
    "generate": "--cfg-scale 1 --cfg-channels all",
}


class Means:
    """A tiny network: the means of 2 × 2 patches for each layer."""

    name, digest, comparable = "random", "means", False
    widths = dict.fromkeys(("pool", "spatial", "logits"), 12)

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)
        return dict.fromkeys(self.widths, means)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "random_extractor", Means)
    monkeypatch.setattr("svdit.evaluation.selftest.formulas", lambda: iter([Check("one", 1.0, 1.0, 0.0)]))
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files in LINES, by name."""
    root = tmp_path_factory.mktemp("console")
    tiny = saved(root / "tiny.safetensors")
    command("quantize", ["--ckpt", tiny, "--preset", "rtn", "--no-figures", "--output", str(root / "q.safetensors")])
    for seed, name in enumerate(("real", "fake")):
        for i, image in enumerate(np.random.RandomState(seed).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)):
            write_png(root / name / f"{i}.png", image)
    paired = ["--fake_dir", str(root / "fake"), "--paired_dir", str(root / "real"), "--metrics", "paired"]
    command("evaluate", [*paired, "--device", "cpu", "--output", str(root / "report")])
    files = {"tiny": Path(tiny), "quantized": root / "q.safetensors"}
    return files | {name: root / name for name in ("real", "fake", "report")}


def run(name: str, inputs: dict[str, Path], out: Path, *more: str) -> None:
    command(name, [*LINES[name].format(out=out, **inputs).split(), *more])


def test_the_table_has_every_command() -> None:
    assert set(LINES) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_all_that_takes_long_reports_its_progress(
    name: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Task] = []

    @contextmanager
    def lines(task: Task) -> Iterator[None]:
        tasks.append(task)
        yield

    monkeypatch.setattr("svdit.progress.lines", lines)
    run(name, inputs, tmp_path)
    assert {task.description: f"{task.total} {task.unit}" for task in tasks} == PARTS.get(name, {})
    assert [task.description for task in tasks if task.updates[-1][1] != task.total] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_prints_the_result_only(
    name: str,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = {
        "sample": ["a.png"],
        "generate": ["set", "set.npz"],
        "quantize": ["q.pt", "q.report.json", "q.report"],
        "train": ["run/ema.safetensors"],
    }.get(name)
    with monkeypatch.context() as patch:
        patch.setattr("svdit.progress.lines", lambda task: pytest.fail(str(task)))
        run(name, inputs, tmp_path, "--quiet", *NOTED.get(name, "").split())
    printed = capsys.readouterr()
    assert all(line.startswith("warning: ") for line in printed.err.splitlines())
    assert ("warning: " in printed.err) == (name == "quantize")
    if outputs:
        assert printed.out.splitlines() == [str(tmp_path / path) for path in outputs]
        assert [path for path in outputs if not (tmp_path / path).exists()] == []
    else:
        run(name, inputs, tmp_path)
        assert printed.out == capsys.readouterr().out


@pytest.mark.parametrize("name", NOTED)
def test_without_it_there_are_notes(
    name: str, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, inputs, tmp_path, *NOTED[name].split())
    assert "note: " in capsys.readouterr().err
