"""What every command prints, on tiny inputs: progress, with --quiet the result only, with --json one object."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pixels import ROOT, saved
from worlds import Run

from svdit.checkpoints.store import read_header
from svdit.cli import COMMANDS, command
from svdit.evaluation import inception
from svdit.evaluation.selftest import Check
from svdit.images import write_png
from svdit.progress import Task
from svdit.recovery import loop

LINES = {
    "sample": "--ckpt {tiny} --num-sampling-steps 2 --output {out}/a.png --device cpu",
    "generate": "--ckpt {tiny} --num-sampling-steps 2 --num-fid-samples 3 --sample-dir {out}/set --device cpu",
    "quantize": "--ckpt {tiny} --calib-images 2 --calib-steps 2 --target-size 1 --output {out}/q.pt --device cpu",
    "recover": "{branched} --against {tiny} --steps 1 --output {out}/r.pt --device cpu",
    "export": "{quantized} --to float --output {out}/f.pt",
    "cache": "{tiny} --speedup 1.5 --num-sampling-steps 3 --images 1 --output {out}/c.pt --device cpu",
    "inspect": "{quantized}",
    "verify": "{quantized} --against {tiny}",
    "evaluate": "--real_dir {real} --fake_dir {fake} --paired_dir {real} --feature-extractor random --device cpu "
    "--metrics fid,paired --cache-dir {out}/cache --output {out}/report",
    "compare": "{report} {report}",
    "report": "{quantized} {report} --output {out}/page.html",
    "app": "{tiny} --port 7861 --device cpu",
    "selftest": "",
    "train": "--data digits --model DiT-digits --steps 2 --log-every 1 --global-batch-size 2 --num-workers 0 "
    "--device cpu --results-dir {out}/run",
}
PARTS = {  # of the work of each command, which can take minutes
    "sample": {"sampling": "2 steps"},
    "generate": {"checking set": "0 images", "generating": "3 images", "writing set.npz": "3 images"},
    "quantize": {"calibrating": "4 steps", "choosing formats": "6 layers", "quantizing": "6 layers"},
    "recover": {"recovering": "1 steps"},
    "cache": {"measuring": "7 trajectories"},
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
KEYS = {  # of the objects, as in docs/scripting.md
    "sample": "output classes checkpoint seed sampler steps cfg_scale cfg_channels cfg_interval "
    "time_shift sde_form sde_norm last_step last_step_size caching",
    "generate": "folder npz manifest images storage",
    "quantize": "output report figures layers bytes_before bytes_after seconds skipped warnings",
    "recover": "output report figure file sha256 seed steps images before after seconds",
    "export": "output format",
    "cache": "output groups runs speedup snr held_out_snr images seed",
    "inspect": "file bytes name config class_names layers backend fallbacks caching provenance",
    "verify": "file source layers matches",
    "evaluate": "schema metrics second difference protocol inputs versions warnings seconds command",
    "compare": "rows",
    "report": "output models images notes",
    "app": "url",
    "selftest": "passed checks",
    "train": "output checkpoint steps seconds",
}


class Means:
    """A tiny network: the means of 2 × 2 patches for each layer."""

    name, digest, comparable = "random", "means", False
    widths = dict.fromkeys(("pool", "spatial", "logits"), 12)

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)
        return dict.fromkeys(self.widths, means)


class Nobody(NamedTuple):
    """In place of a server: it ends at once."""

    url: str

    def wait(self) -> None:
        pass


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "random_extractor", Means)
    monkeypatch.setattr("svdit.evaluation.selftest.formulas", lambda: iter([Check("one", 1.0, 1.0, 0.0)]))
    monkeypatch.setattr("svdit.cli.app_page.serve", lambda models, device, port: Nobody(f"http://127.0.0.1:{port}"))
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.touch())
    for constant, value in {"IMAGES": 2, "WALKS": 2, "STEPS": (3,), "ROWS": 8, "EVERY": 1}.items():
        monkeypatch.setattr(loop, constant, value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files in LINES, by name."""
    root = tmp_path_factory.mktemp("console")
    tiny = saved(root / "tiny.safetensors")
    command("quantize", ["--ckpt", tiny, "--preset", "rtn", "--no-figures", "--output", str(root / "q.safetensors")])
    branched = f"--ckpt {tiny} --preset svdquant --rank 2 --calib-images 2 --calib-steps 2 --no-figures --device cpu"
    command("quantize", [*branched.split(), "--output", str(root / "b.safetensors")])
    for seed, name in enumerate(("real", "fake")):
        for i, image in enumerate(np.random.RandomState(seed).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)):
            write_png(root / name / f"{i}.png", image)
    paired = ["--fake_dir", str(root / "fake"), "--paired_dir", str(root / "real"), "--metrics", "paired"]
    command("evaluate", [*paired, "--device", "cpu", "--output", str(root / "report")])
    files = {"tiny": Path(tiny), "quantized": root / "q.safetensors", "branched": root / "b.safetensors"}
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
        "recover": ["r.pt", "r.recovery.json", "r.recovery.png"],
        "export": ["f.pt"],
        "cache": ["c.pt"],
        "report": ["page.html"],
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


def without_checksum(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    del content["sha256"]
    return content


def layer_errors(path: Path) -> dict[str, float]:
    header = read_header(path)
    assert header is not None
    errors: dict[str, float] = header["provenance"]["quantization"]["weight_errors"]
    return errors


AGREES: dict[str, Callable[[dict[str, Any], Path, dict[str, Path]], bool]] = {  # the object and the files
    "sample": lambda data, out, files: (
        data["classes"] == [0, 1, 2, 3, 4] and Path(data["output"]).read_bytes()[1:4] == b"PNG"
    ),
    "generate": lambda data, out, files: (
        len(np.load(data["npz"])["arr_0"]) == data["images"] == len(list(Path(data["folder"]).glob("*.png")))
        and json.loads(Path(data["manifest"]).read_text())["num_images"] == 3
    ),
    "quantize": lambda data, out, files: (
        json.loads((out / "q.report.json").read_text()).items()
        >= {key: data[key] for key in ("layers", "seconds")}.items()
        and {layer["name"]: layer["weight_error"] for layer in data["layers"]} == layer_errors(Path(data["output"]))
    ),
    "inspect": lambda data, out, files: (
        data["bytes"] == files["quantized"].stat().st_size
        and [layer["name"] for layer in data["layers"]] == list(layer_errors(files["quantized"]))
        and data["layers"][0]["shape"] == [192, 64]
    ),
    "verify": lambda data, out, files: (
        data["matches"] is True
        and {layer["name"]: layer["weight_error"] for layer in data["layers"]} == layer_errors(files["quantized"])
    ),
    "recover": lambda data, out, files: (
        json.loads((out / "r.recovery.json").read_text()).items()
        >= {key: data[key] for key in ("before", "after", "steps")}.items()
    ),
    "export": lambda data, out, files: data["format"] == "float" and (out / "f.pt").is_file(),
    "cache": lambda data, out, files: (
        data["runs"] == (read_header(out / "c.pt") or {})["caching"]["runs"] and data["speedup"] >= 1.5
    ),
    "evaluate": lambda data, out, files: data == without_checksum(out / "report" / "metrics.json"),
    "compare": lambda data, out, files: (
        [row["metrics"]["psnr"]["difference"] for row in data["rows"]] == [None, 0]
        and data["rows"][1]["metrics"]["psnr"]["value"]
        == without_checksum(files["report"] / "metrics.json")["metrics"]["psnr"]["value"]
    ),
    "report": lambda data, out, files: (
        data["models"] == ["q", "fake"]
        and all(f'<th scope="row">{name}</th>' in Path(data["output"]).read_text() for name in data["models"])
    ),
    "app": lambda data, out, files: data["url"] == "http://127.0.0.1:7861",
    "selftest": lambda data, out, files: data["passed"] is data["checks"][0]["passed"] is True,
    "train": lambda data, out, files: (
        read_header(Path(data["output"]))["provenance"]["step"] == data["steps"] == 2  # type: ignore[index]
        and Path(data["checkpoint"]).exists()
    ),
}


def strict(constant: str) -> None:
    pytest.fail(f"{constant} is no JSON")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("more", [(), ("--quiet",)], ids=["", "quiet"])
def test_json_is_one_object_that_agrees_with_the_files(
    name: str, more: tuple[str, ...], inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, inputs, tmp_path, "--json", *more)
    printed = capsys.readouterr()
    data = json.loads(printed.out, parse_constant=strict)
    assert list(data) == KEYS[name].split()
    assert AGREES[name](data, tmp_path, inputs)
    assert ("step 1 " in printed.err) == (name == "train" and not more)


def test_the_documented_keys_are_those_of_the_objects() -> None:
    page = (ROOT / "docs" / "scripting.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {row[0].strip("`"): " ".join(row[1].replace("`", "").split(", ")) for row in rows} == KEYS


@pytest.mark.parametrize(
    ("line", "code", "keys"),
    [
        ("evaluate --metrics lpips --fake_dir {fake} --paired_dir {real} --device cpu", 2, ""),
        ("evaluate --metrics fid_inf --fake_dir {fake} --real_dir {real} --feature-extractor random --device cpu "
        "--cache-dir {out}", 1, KEYS["evaluate"]),
        ("selftest", 1, KEYS["selftest"]),
        ("verify {tiny} --against {tiny}", 2, ""),
        ("inspect nowhere", 2, ""),
    ],
)  # fmt: skip
def test_a_problem_is_a_sentence_beside_the_object_and_an_error_has_none(
    line: str, code: int, keys: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("svdit.evaluation.selftest.formulas", lambda: iter([Check("one", float("nan"), 1.0, 0.0)]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name, *argv = line.format(out=tmp_path, **inputs).split()
    with pytest.raises(SystemExit) as stop:
        command(name, [*argv, "--json"])
    printed = capsys.readouterr()
    assert stop.value.code == code
    assert printed.err.startswith(f"svdit {name}: ") and printed.err.count("\n") == 1
    assert " ".join(json.loads(printed.out or "{}", parse_constant=strict)) == keys


def test_every_path_is_valid_json(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'a\udcff\n\x7f"\\猫.json'
    path.symlink_to(inputs["report"] / "metrics.json")
    command("compare", [str(path), "--json"])
    line = capsys.readouterr().out
    assert line.isascii() and line[:-1].isprintable()
    assert json.loads(line)["rows"][0]["file"] == str(path)


def test_of_several_processes_one_prints_the_object(
    inputs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, errors = Run(lambda: run("generate", inputs, tmp_path, "--json"), tmp_path).end()
    assert codes == [0, 0], errors
    assert json.loads(capfd.readouterr().out)["npz"] == str(tmp_path / "set.npz")
