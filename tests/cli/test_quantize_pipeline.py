"""`svdit quantize --pipeline`: a whole pipeline in and out; an interrupted run resumes; mistakes are sentences."""

import json
import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from svdit.cli import command, parser
from svdit.cli.pipeline_job import Job
from svdit.integrations.diffusers import published_timesteps_
from svdit.quant import quantize as module
from svdit.quant.linear import quantized_layers
from svdit.report.page_inputs import read_inputs

import diffusers  # isort: skip

FAST = ["--calib-images", "2", "--images", "2", "--device", "cpu", "--quiet"]
SMALL = ["--call", "num_inference_steps=3"]


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved("DiT", tmp_path_factory.mktemp("pipelines") / "dit")


def quantize(pipeline: Path, output: Path, *more: str) -> None:
    command("quantize", ["--pipeline", str(pipeline), "--output", str(output), *FAST, *SMALL, *more])


@pytest.fixture(scope="module")
def done(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized pipeline; its name ends as a version does."""
    output = tmp_path_factory.mktemp("out") / "dit-2.5"
    quantize(dit, output, "--preset", "w8a8")
    return output


def images(pipeline: Any, **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**options, num_inference_steps=3, generator=torch.Generator().manual_seed(3), output_type="np")[0]


def test_the_output_is_a_whole_pipeline(dit: Path, done: Path) -> None:
    before, after = (diffusers.DiffusionPipeline.from_pretrained(path) for path in (dit, done))
    assert sorted(quantized_layers(after.transformer)) == sorted(
        name
        for name, module in before.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks") and ".emb." not in name
    )
    a, b = (images(pipeline, class_labels=[7]) for pipeline in (before, after))
    assert 0 < np.abs(a - b).mean() < 0.02 < a.std()
    assert (done / "vae" / "config.json").read_bytes() == (dit / "vae" / "config.json").read_bytes()
    assert sorted(file.name for file in done.parent.iterdir()) == [
        "dit-2.5", "dit-2.5.images.png", "dit-2.5.report.json"
    ]  # fmt: skip


def test_the_report(done: Path) -> None:
    report = json.loads(done.with_name("dit-2.5.report.json").read_text())
    assert len(report["layers"]) == 14 and all(line["rows"] for line in report["layers"])
    assert report["reasons"]["pos_embed.proj"] == "convolution" and list(report["reasons"]) == report["kept"]
    assert report["reasons"]["proj_out_2"] == "outside of the blocks"
    assert len(report["psnr"]) == 2 and all(30 < value < 100 for value in report["psnr"])
    assert report["settings"]["pipeline"] == "DiTPipeline" and report["settings"]["preset"] == "w8a8"
    assert read_inputs([done.with_name("dit-2.5.report.json")]).runs[0].layers == report["layers"]
    with Image.open(done.with_name("dit-2.5.images.png")) as picture:
        assert min(picture.size) > 200


def test_output_with_json_and_the_table(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(dit, tmp_path / "a", "--preset", "rtn", "--images", "0", "--json", "--skip", "*.to_q")
    data = json.loads(capsys.readouterr().out)
    assert data["images"] is None and data["psnr"] == [] and data["output"] == str(tmp_path / "a")
    assert data["reasons"]["transformer_blocks.0.attn1.to_q"] == "skipped"
    assert not (tmp_path / "a.images.png").exists()
    loud = [word for word in FAST if word != "--quiet"]
    command("quantize", ["--pipeline", str(dit), "--output", str(tmp_path / "b"), *loud, *SMALL, "--preset", "rtn"])
    out = capsys.readouterr().out
    assert "left alone, convolution: pos_embed.proj" in out and "PSNR of images to those of full precision" in out


def test_an_interrupted_run_resumes(
    dit: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    solved, calls = list[str](), list[int]()
    solve, call = module.quantize_linear, diffusers.DiTPipeline.__call__

    def counted(name: str, *rest: Any) -> Any:
        if len(solved) == 5 and len(calls) < 5:
            raise KeyboardInterrupt
        solved.append(name)
        return solve(name, *rest)

    @wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(len(solved))
        return call(*arguments, **options)

    monkeypatch.setattr(module, "quantize_linear", counted)
    monkeypatch.setattr(diffusers.DiTPipeline, "__call__", run)
    with pytest.raises(SystemExit):
        quantize(dit, tmp_path / "out", "--preset", "w8a8")
    assert len(calls) == 4 and len(solved) == 5  # two images to calibrate, and two to compare
    with pytest.raises(SystemExit):
        quantize(dit, tmp_path / "out", "--preset", "w4a8")
    assert "out.partial/calls is from a run with other settings" in capsys.readouterr().err
    calls.append(-1)

    def interrupted(job: Job) -> list[float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Job, "compare", interrupted)
        with pytest.raises(SystemExit):
            quantize(dit, tmp_path / "out", "--preset", "w8a8")
    assert not (tmp_path / "out").exists()  # it comes last, so that the comparison can be made up for
    quantize(dit, tmp_path / "out", "--preset", "w8a8")
    assert len(solved) == len(set(solved)) == 14
    assert calls[5:] == [14, 14]  # only the images of the quantized model
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [
        "out", "out.images.png", "out.report.json"
    ]  # fmt: skip
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (done / file).read_bytes()


def test_a_variant_in_the_cache_of_hugging_face(dit: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--x--y" / "snapshots" / "abc"
    diffusers.DiffusionPipeline.from_pretrained(dit, dtype=torch.bfloat16).save_pretrained(cache, variant="bf16")
    quantize(cache.parents[1], tmp_path / "out", "--preset", "rtn", "--images", "1")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16 and quantized_layers(pipeline.transformer)
    assert pipeline.transformer.proj_out_2.weight.dtype == torch.bfloat16


def test_prompts_of_a_dit_are_class_labels(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    for text, message in (
        ("cat\n", "'cat' is no class label; write one from 0 to 999"),
        (" \n", "is empty; write one"),
    ):
        prompts.write_text(text)
        with pytest.raises(SystemExit) as error:
            quantize(dit, tmp_path / "out", "--prompts", str(prompts))
        assert error.value.code == 2 and message in capsys.readouterr().err
    prompts.write_text("1\n\n999\n")
    labels: list[int] = []
    call = diffusers.DiTPipeline.__call__

    @wraps(call)
    def recorded(self: Any, class_labels: list[int], **options: Any) -> Any:
        labels.extend(class_labels)
        return call(self, class_labels, **options)

    monkeypatch.setattr(diffusers.DiTPipeline, "__call__", recorded)
    quantize(
        dit, tmp_path / "out", "--preset", "rtn", "--prompts", str(prompts), "--calib-images", "3", "--images", "0"
    )
    assert labels == [1, 999, 1]


MISTAKES = [
    (["--pipeline", "{dit}/transformer"], "has no model_index.json; pass the folder of a whole pipeline"),
    (["--pipeline", "nowhere"], "there is no folder nowhere"),
    (["--component", "vae2"], "has no component 'vae2' that is a model of diffusers; choose --component from"),
    (["--component", "vae"], "an AutoencoderKL has no blocks with linear layers|never called its AutoencoderKL"),
    (["--variant", "fp16"], "has no variant 'fp16' but no variants"),
    (["--output", "{dit}"], "which exists; choose a new folder"),
    (["--preset", "w3"], "invalid choice: 'w3'"),
    (["--skip", "*.to_z"], "'*.to_z' matches no linear layer of this model"),
    (["--call", "steps=3"], "a DiTPipeline has no option steps; choose from class_labels, guidance_scale"),
    (["--call", "height"], "--call has 'height'; write NAME=VALUE"),
    (["--call", "num_inference_steps=many"], "the DiTPipeline cannot run"),
    (["--call", "guidance_scale=1", "num_inference_steps=0"], "the DiTPipeline cannot run"),
    (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--calib-images", "0"], "'0' is not an integer from 1"),
    (["--device", "tpu"], "'tpu' is not supported; choose cpu"),
    (["--ckpt", "x"], "unrecognized arguments: --ckpt"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    dit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        quantize(dit, tmp_path / "out", *(each.format(dit=dit) for each in arguments))
    err = capsys.readouterr().err.strip()
    assert error.value.code == 2 and any(part in err for part in message.split("|")) and "\n" not in err, err
    assert not list(tmp_path.glob("out*.*")) or list(tmp_path.iterdir()) == [tmp_path / "out.partial"]


def test_unknown_and_damaged_pipelines(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(change: dict[str, Any], message: str, remove: str = "") -> None:
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        shutil.copytree(dit, tmp_path / "p")
        index = json.loads((dit / "model_index.json").read_text())
        (tmp_path / "p" / "model_index.json").write_text(json.dumps({**index, **change}))
        if remove:
            (tmp_path / "p" / remove).write_text("damaged")
        with pytest.raises(SystemExit) as error:
            quantize(tmp_path / "p", tmp_path / "out")
        err = capsys.readouterr().err.strip()
        assert error.value.code == 2 and message in err and "\n" not in err, err

    refused({"_class_name": "NewPipeline"}, "has no pipeline NewPipeline; upgrade diffusers")
    refused({"_class_name": "AutoencoderKL"}, "diffusers cannot load")
    refused({"_class_name": "StableDiffusionImg2ImgPipeline"}, "diffusers cannot load")
    refused({}, "is damaged", "transformer/diffusion_pytorch_model.safetensors")
    refused({}, "diffusers cannot load", "vae/diffusion_pytorch_model.safetensors")
    refused({}, "diffusers cannot load", "scheduler/scheduler_config.json")


TEXT = ["--call", "height=16", "width=16", "num_inference_steps=2"]
OPTIONS = {
    "PixArt": ["use_resolution_binning=false", "clean_caption=false", "max_sequence_length=8"],
    "SD3": ["max_sequence_length=8"],
    "Flux": ["max_sequence_length=8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_pipelines_with_text_encoders(name: str, preset: str, tmp_path: Path) -> None:
    source, output = tiny_pipelines.saved(name, tmp_path / name), tmp_path / "out"
    arguments = [*TEXT, *OPTIONS[name], "--preset", preset, *FAST]
    command("quantize", ["--pipeline", str(source), "--output", str(output), *arguments])
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert all(15 < value < 100 for value in report["psnr"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(output)
    options = {key: json.loads(value) for key, value in (pair.split("=") for pair in [*TEXT[1:], *OPTIONS[name]])}
    del options["num_inference_steps"]
    assert np.isfinite(images(pipeline, prompt="a red fox", **options)).all()


def test_help_names_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("quantize", ["--pipeline", ".", "--help"])
    assert "--calib-calls" in capsys.readouterr().out
    assert "--ckpt" in parser("quantize").format_help() and "--pipeline" in parser("quantize").format_help()


def test_a_corrected_embedding_stays_corrected(done: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(done)
    before = images(pipeline, class_labels=[7])
    published_timesteps_(pipeline.transformer)
    assert np.abs(images(pipeline, class_labels=[7]) - before).mean() > 0
