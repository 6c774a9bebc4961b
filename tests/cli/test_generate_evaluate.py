"""`svdit generate --evaluate`: the numbers of `svdit evaluate` on the same images in files; errors before sampling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Means
from pixels import saved
from worlds import Run

from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command
from svdit.compat import apply_svd_to_dit
from svdit.evaluation import inception
from svdit.sampling import dataset

STEPS = ["--num-sampling-steps", "3", "--device", "cpu", "--per-proc-batch-size", "4"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inception, "random_extractor", Means)
    monkeypatch.delenv("SVDIT_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    np.savez("real.npz", arr_0=np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8))
    model = apply_svd_to_dit(load_model(saved(tmp_path / "tiny.safetensors")), 0.5)
    save_model(model, "quantized.safetensors", name="tiny")  # type: ignore[arg-type]


def run(name: str, *argv: str) -> int:
    """The exit code."""
    try:
        command(name, list(argv))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def generate(folder: str, *argv: str, count: int = 10) -> int:
    """The exit code of the command for 10 images of a quantized model."""
    paths = ["--ckpt", "quantized.safetensors", "--sample-dir", folder, "--num-fid-samples", str(count)]
    return run("generate", *paths, *STEPS, *argv)


def evaluated(folder: str, *argv: str, count: int = 10) -> int:
    return generate(folder, "--evaluate", "real.npz", "--feature-extractor", "random", *argv, count=count)


def metrics(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics.json").read_text())["metrics"]


def test_the_numbers_are_those_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("files", count=10) == 0
    assert evaluated("set", "--cache-dir", "cache", "--paired-dir", "files") == 0
    table = capsys.readouterr().out
    options = ["--feature-extractor", "random", "--cache-dir", "cache", "--batch-size", "4", "--paired-dir", "files"]
    assert run("evaluate", "--real_dir", "real.npz", "--fake_dir", "files", "--output", "results", *options) == 0
    assert metrics("set") == metrics("results")
    assert metrics("set")["identical_pairs"]["value"] == 10
    assert "random_fid" in table and f"10 generated images of {Path('set').resolve()}" in table
    assert run("compare", "results", "set") == 0
    assert "paired by seed" in capsys.readouterr().out
    assert {path.name for path in Path("set").iterdir()} == {
        "features", "manifest.json", "metrics.json", "metrics.md", "grid_fake.png",
    }  # fmt: skip
    assert json.loads(Path("set/manifest.json").read_text())["storage"] == "features"
    assert not Path("set.npz").exists()
    assert run("evaluate", "--real_dir", "real.npz", "--fake_dir", "set", *options) == 2
    assert "none were stored, only metrics; see set/metrics.json" in capsys.readouterr().err


def test_a_rerun_samples_nothing_and_a_larger_one_only_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    genuine = dataset.generate_images

    def noting(model: Any, labels: list[int], *rest: Any, **options: Any) -> Any:
        drawn.append(len(labels))
        return genuine(model, labels, *rest, **options)

    monkeypatch.setattr(dataset, "generate_images", noting)
    assert [evaluated("set", count=n) for n in (6, 6, 10)] == [0, 0, 0]
    assert drawn == [4, 2, 4]
    assert evaluated("alone") == 0
    assert metrics("set") == metrics("alone")


def test_processes_evaluate_what_one_draws(tmp_path: Path) -> None:
    assert generate("files", count=6) == 0
    codes, errors = Run(lambda: generate("set", "--evaluate", "files", "--metrics", "paired", count=6), tmp_path).end()
    assert codes == [0, 0], errors
    assert metrics("set")["identical_pairs"]["value"] == 6


def test_an_unavailable_named_metric_ends_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated("set", "--metrics", "fid,prc", count=4) == 1
    assert "svdit generate: requested but unavailable: prc" in capsys.readouterr().err
    assert metrics("set")["random_fid"]["value"] > 0


@pytest.mark.parametrize(
    ("folder", "argv", "message"),
    [
        ("set", ["--evaluate", "nothing"], "there is no folder or file nothing"),
        ("set", ["--evaluate", "real.npz"], "need the 2015 Inception weights"),
        ("set", ["--evaluate", "real.npz", "--tar"], "argument --tar: not allowed with argument --evaluate"),
        ("set", ["--evaluate", "real.npz", "--no-png"], "argument --no-png: not allowed with argument --evaluate"),
        ("set", ["--evaluate", "real.npz", "--metrics", "fidd"], "there is no metric 'fidd'"),
        ("set", ["--evaluate", "real.npz", "--metrics", "lpips"], "LPIPS needs"),
        ("set", ["--evaluate", "real.npz", "--metrics", "fid", "--paired_dir", "x"], "--paired_dir has no effect"),
        ("set", ["--evaluate", "real.npz", "--cache-dir", "real.npz"], "cannot write into the folder"),
        ("images", ["--evaluate", "images"], "--sample-dir is images, which is also the input images"),
        ("images/set", ["--evaluate", "images"], "--sample-dir is images/set, inside the images of"),
    ],
)
def test_mistakes_end_before_sampling(
    folder: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("images").mkdir()
    monkeypatch.setattr(dataset, "generate_images", None)
    extractor = [] if "weights" in message else ["--feature-extractor", "random"]
    assert generate(folder, *argv, *extractor) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert all(line.startswith("note: ") for line in notes)
    assert not Path("set").exists()


def test_options_without_effect_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("set", "--metrics", "fid", "--download", count=2) == 0
    assert "note: --metrics, --download without effect: there is no --evaluate" in capsys.readouterr().err
