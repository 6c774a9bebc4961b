"""`svdit sample`: the grid, the published order of noise, errors, a closed pipe."""

import gc
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from pixels import saved
from safetensors.torch import save_file

from svdit import images
from svdit.checkpoints import io
from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command, setup
from svdit.cli.sample import default_classes
from svdit.diffusion.guidance import guided
from svdit.diffusion.samplers import ddpm
from svdit.diffusion.schedule import make_schedule
from svdit.errors import UserError
from svdit.model.config import FAMILIES
from svdit.model.dit import DiT
from svdit.model.vae import BLOCKS, CONFIG, VAE, WEIGHTS, VAEConfig
from svdit.quant.config import RECIPES, dit_config
from svdit.quant.quantize import quantize_
from svdit.sampling.batch import default_sampling, generate_images
from svdit.sampling.labels import class_numbers

FAST = ["--num-sampling-steps", "3", "--device", "cpu"]


def test_a_seed_reproduces_the_published_images(tmp_path: Path) -> None:
    """The published script: z for N, copied for both halves of guidance, then fresh noise for 2N at every step."""
    path, output = saved(tmp_path / "tiny.safetensors"), tmp_path / "grids" / "a.png"
    command("sample", ["--ckpt", path, "--seed", "5", "--classes", "4", "0", "2", *FAST, "--output", str(output)])
    model = load_model(path)
    torch.manual_seed(5)
    z = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        x = ddpm(
            guided(model, torch.tensor([4, 0, 2]), 5, 4.0),
            z,
            make_schedule(3),
            noise=lambda: torch.randn(6, 3, 8, 8)[:3],
        )
    expected = images.grid(images.to_uint8(x), 3, scale=16)
    assert np.array_equal(np.asarray(Image.open(output)), expected)


def test_the_grid_holds_the_settings_that_draw_it_again(tmp_path: Path) -> None:
    path, output = saved(tmp_path / "tiny.safetensors"), tmp_path / "a.png"
    command("sample", ["--ckpt", path, "--seed", "5", "--classes", "4", "0", *FAST, "--output", str(output)])
    with Image.open(output) as image:
        settings = json.loads(image.text["settings"])  # type: ignore[attr-defined]
    assert settings["checkpoint"] == "tiny.safetensors"
    labels, again = map(str, settings["classes"]), tmp_path / "b.png"
    options = ["--num-sampling-steps", settings["steps"], "--cfg-scale", str(settings["cfg_scale"]), "--device", "cpu"]
    options += ["--seed", str(settings["seed"]), "--sampler", settings["sampler"], "--output", str(again)]
    command("sample", ["--ckpt", path, "--classes", *labels, *options])
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize(("family", "doubled"), [("sit", True), ("repa", False)])
def test_later_noise_is_drawn_twice_where_the_script_doubles_the_batch(
    family: str, doubled: bool, tmp_path: Path
) -> None:
    path, output = saved(tmp_path / "tiny.safetensors", family=family, **FAMILIES[family]), tmp_path / "a.png"
    line = f"--ckpt {path} --seed 5 --classes 4 0 2 --sampler sde --cfg-scale 2 --output {output}"
    command("sample", [*line.split(), *FAST])
    model, rows = load_model(path), 6 if doubled else 3
    torch.manual_seed(5)
    config, draws = default_sampling(model.config, sampler="sde", steps="3", cfg_scale=2.0), iter((3, rows, rows))
    pixels = generate_images(model, [4, 0, 2], config, noise=lambda: torch.randn(next(draws), 3, 8, 8)[:3])
    assert np.array_equal(np.asarray(Image.open(output)), images.grid(pixels, 3, scale=16))


def test_classes_have_names_where_the_checkpoint_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name comes before a number: classes from folders 1, 2, 4 … are asked for as they were called."""
    model = load_model(saved(tmp_path / "tiny.safetensors"))
    model.class_names = ("1", "2", "4", "cat", "dog fish")
    assert class_numbers(["cat", "2", "1", "dog fish", "3", "0", "002"], model) == [3, 1, 0, 4, 3, 0, 1]
    assert class_numbers([np.int64(3), torch.tensor(4), np.uint8(0)], model) == [3, 4, 0]
    assert class_numbers(np.int64(3), model) == class_numbers(torch.tensor([3]), model) == [3]
    for label in (True, 1.0, np.True_, np.float64(1), torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(UserError, match="there is no class"):
            class_numbers([label], model)  # type: ignore[list-item]
    save_model(model, tmp_path / "named.safetensors")
    argv = ["--ckpt", str(tmp_path / "named.safetensors"), *FAST, "--output", str(tmp_path / "a.png")]
    command("sample", [*argv, "--classes", "cat", "4"])
    by_name = Image.open(tmp_path / "a.png").tobytes()
    command("sample", [*argv, "--classes", "3", "2", "--ckpt", str(tmp_path / "tiny.safetensors")])
    assert Image.open(tmp_path / "a.png").tobytes() == by_name
    with pytest.raises(SystemExit, match="2"):
        command("sample", [*argv, "--classes", "bird"])
    assert "there is no class bird; this model has the classes 0 to 4, named 1 … dog fish" in capsys.readouterr().err


def test_eight_classes_in_two_rows_are_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = saved(tmp_path / "tiny.safetensors", num_classes=10), tmp_path / "a.png"
    command("sample", ["--ckpt", path, *FAST, "--output", str(output)])
    assert Image.open(output).size == (4 * 130 + 2, 2 * 130 + 2)
    assert capsys.readouterr().out == f"{output}\n"


def test_default_classes() -> None:
    assert default_classes(1000) == [207, 360, 387, 974, 88, 979, 417, 279]
    assert default_classes(10) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert default_classes(3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--classes", "5"], "there is no class 5; this model has the classes 0 to 4"),
        (["--num-sampling-steps", "many"], "'many' is not a number of sampling steps"),
        (["--num-sampling-steps", "2000"], "2000 sampling steps do not fit into 1000 timesteps"),
        (["--num-sampling-steps", "ddim10,20"], "'ddim10,20' is not a number of sampling steps"),
        (["--classes", str(2**63 - 1)], "there is no class"),
        (["--output", "{folder}/folder.png"], "which is a folder"),
        (["--output", "a.jpg"], "--output is a.jpg; choose a name that ends in .png"),
        (["--output", "{file}/a.png"], "cannot write into the folder"),
        (["--vae", "mse"], "the vae is mse, but the model has 3 channels"),
        (["--ckpt", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = saved(tmp_path / "tiny.safetensors"), tmp_path / "file"
    file.touch()
    (tmp_path / "folder.png").mkdir()
    argv = [part.format(file=file, folder=tmp_path) for part in argv]
    with pytest.raises(SystemExit) as exit_:
        command("sample", ["--ckpt", path, "--output", str(tmp_path / "a.png"), *argv])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("svdit sample: ")
    assert sentence in message
    assert message.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


SLOW = {"diffusers", "huggingface_hub", "matplotlib", "scipy", "sklearn", "sympy", "torchvision", "transformers"}
SLOW |= {"torch._dynamo", "torch._inductor"}  # torch's compiler


def test_nothing_slow_is_imported_from_start_to_image(tmp_path: Path, tiny: DiT) -> None:
    quantize_(tiny, dit_config(replace(RECIPES["rtn"], low_rank="svd", rank=4)))
    save_model(tiny, tmp_path / "tiny.safetensors")
    config = VAEConfig((8, 8, 8, 8), norm_num_groups=4)
    (tmp_path / "vae").mkdir()
    blocks = {key: [block] * 4 for key, block in BLOCKS.items()}
    (tmp_path / "vae" / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderKL", **blocks, **asdict(config)}))
    save_file(randomize(VAE(config)).state_dict(), tmp_path / "vae" / WEIGHTS)
    code = "import sys; from svdit.cli import command; command('sample', sys.argv[1:]); print(*sys.modules)"
    argv = ["--ckpt", "tiny.safetensors", "--vae", "vae", *FAST]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output, modules = done.stdout.splitlines()
    assert (tmp_path / output).is_file()
    assert "torch" in modules.split()
    assert sorted(SLOW.intersection(modules.split())) == []


@pytest.mark.parametrize(("cls", "code"), [("1", 0), ("none", 2)])
def test_loading_collects_nothing_and_hashes_once(
    cls: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected, load = list[bool](), setup.load_checkpoint
    monkeypatch.setattr(setup, "load_checkpoint", lambda *a, **kw: collected.append(gc.isenabled()) or load(*a, **kw))
    monkeypatch.setattr(io, "digest_of", lambda parts: pytest.fail("hashed again"))
    argv = [
        "--ckpt",
        saved(tmp_path / "tiny.safetensors"),
        *FAST,
        "--classes",
        cls,
        "--output",
        str(tmp_path / "a.png"),
    ]
    with nullcontext() if code == 0 else pytest.raises(SystemExit, match="2"):
        command("sample", argv)
    assert collected == [False] and gc.isenabled()
