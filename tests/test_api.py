"""The functions of `import svdit`: each is what the commands do, names are checked, and mistakes are one sentence."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import pixel_model, saved
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

import svdit
from svdit.checkpoints.store import read_header
from svdit.cli import command
from svdit.evaluation import inception
from svdit.images import to_float, write_png
from svdit.quant.linear import quantized_layers
from svdit.sampling.batch import default_sampling, generate
from svdit.sampling.config import recorded

EMBEDDED = ("digits", "digits-sit", "digits-jit")


class Net(nn.Module):
    """A module with two kinds of calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc1, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.relu(self.fc1(self.embed(x))) * scale)


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(8)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "more"),
    [("--preset w8a8", {"config": "w8a8"}), ("--preset w4a8 --skip *.attn.*", {"config": "w4a8", "skip": "*.attn.*"})],
)
@pytest.mark.parametrize("family", ["dit", "jit"])
def test_a_dit_is_quantized_as_by_the_command(
    options: str, more: dict[str, Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdit.api.calibration_size", lambda model: (2, 2))
    path = saved(tmp_path / "a.safetensors") if family == "dit" else "digits-jit"
    output = tmp_path / "q.safetensors"
    small = "--calib-images 2 --calib-steps 2 --no-figures --device cpu"
    command("quantize", [*f"--ckpt {path} {options} {small} --output {output}".split(), "--quiet"])
    model = svdit.load(path)
    report = svdit.quantize_(model, **more)
    assert equal(model, svdit.load(output))
    assert {line.name for line in report.layers} == set(quantized_layers(model))


def test_a_dit_keeps_its_embedders_and_last_layer() -> None:
    model = pixel_model()
    svdit.quantize_(model, "rtn")
    assert type(model.final_layer.linear) is nn.Linear
    assert set(quantized_layers(model)) >= {"blocks.0.attn.qkv", "blocks.0.adaLN_modulation.1"}


def test_a_model_without_null_class_is_calibrated_without_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdit.api.calibration_size", lambda model: (2, 2))
    svdit.quantize_(pixel_model(has_null_class=False), "w8a8")


def test_a_cache_plan_ends_with_quantization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = saved(tmp_path / "a.safetensors", num_classes=10), tmp_path / "c.safetensors"
    command("cache", f"{path} --speedup 1.5 --num-sampling-steps 3 --images 1 --device cpu --output {output}".split())
    model = svdit.load(output)
    assert model.cache_plan
    svdit.quantize_(model, "rtn")
    assert model.cache_plan is None
    assert "the cache plan is omitted" in capsys.readouterr().err


def test_a_transformer_of_diffusers_keeps_what_surrounds_its_blocks() -> None:
    tiny = pytest.importorskip("tiny_diffusers")
    model = tiny.MODELS["PixArt"].model()
    report = svdit.quantize_(model, "w8a8", [tiny.MODELS["PixArt"].inputs(2, tiny.generator(i)) for i in range(4)])
    assert {line.name.split(".")[0] for line in report.layers} == {"transformer_blocks"}
    assert type(model.proj_out) is nn.Linear


def test_the_first_pattern_that_matches_decides(net: Net, batches: list[Tensor]) -> None:
    rank8 = svdit.recipe_for("w4a8", rank=8)
    report = svdit.quantize_(net, {"head": None, "fc*": rank8, "*": "rtn"}, batches)
    assert type(net.head) is nn.Linear
    assert {line.name: (line.weight, line.rank) for line in report.layers} == {
        "embed": ("INT8", 0), "fc1": ("INT4 g64", 8)
    }  # fmt: skip


@pytest.mark.parametrize(
    "loop",
    [
        lambda batches: lambda model: [model(x) for x in batches],
        lambda batches: batches,
        lambda batches: [(x, 1.0) for x in batches],
        lambda batches: [{"x": x, "scale": 1.0} for x in batches],
        lambda batches: torch.utils.data.DataLoader(torch.cat(batches), batch_size=32),  # type: ignore[arg-type]
    ],
    ids=["function", "tensors", "tuples", "dicts", "DataLoader"],
)
def test_a_list_of_batches_is_a_loop(loop: Callable[[Any], Any], net: Net, batches: list[Tensor]) -> None:
    expected = Net().eval()
    svdit.quantize_(expected, "w8a8", lambda model: [model(x) for x in batches])
    svdit.quantize_(net, "w8a8", loop(batches))
    assert equal(net, expected)


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: {"x": x}], ids=["tensor", "dict"])
def test_one_tensor_or_dict_is_one_batch(batch: Callable[[Tensor], Any], net: Net, batches: list[Tensor]) -> None:
    report = svdit.quantize_(net, "w8a8", batch(torch.cat(batches)), skip=["head"])
    assert [line.name for line in report.layers] == ["embed", "fc1"]
    assert {line.rows + line.held_out for line in report.layers} == {256}


def test_a_target_chooses_bits(net: Net, batches: list[Tensor]) -> None:
    other = Net().eval()
    small = svdit.quantize_(net, "w4a8", batches, target_sqnr=15.0)
    large = svdit.quantize_(other, "w4a8", batches, target_sqnr=35.0)
    assert small.bytes_after < large.bytes_after
    size = large.bytes_after / 1e6 + 0.004
    svdit.quantize_(third := Net().eval(), "w4a8", batches, target_size=size)
    assert sum(tensor.nbytes for tensor in third.state_dict().values()) <= size * 1e6


@pytest.mark.parametrize("name", EMBEDDED)
def test_sample_is_what_generate_returns(name: str) -> None:
    model = svdit.load(name)
    x = svdit.sample(model, ["3", 1], steps=4, cfg_scale=1.5, seed=7)
    z = generate(model, [3, 1], default_sampling(model.config, steps="4", cfg_scale=1.5), seed=7)
    assert x.shape == (2, 1, 8, 8)
    assert torch.equal(x, z.clamp(-1, 1))
    alone = svdit.sample(model, 3, steps=4, cfg_scale=1.5, seed=7)  # floats of another batch size round differently
    assert (alone - x[:1]).abs().max() < 2 / 255 < (x[0] - x[1]).abs().max()


def test_labels_may_be_names_numbers_tensors_or_arrays() -> None:
    model = pixel_model()
    model.class_names = ("ant", "bee", "cat", "dog", "4")
    of = [svdit.sample(model, labels, steps=2) for labels in (
        ["bee", "dog"], [1, 3], ("1", 3), torch.tensor([1, 3]), np.array([1, 3]), iter([1, 3])
    )]  # fmt: skip
    assert all(torch.equal(x, of[0]) for x in of)
    assert svdit.sample(model, "bee", steps=2).shape == (1, 3, 8, 8)


def test_the_callback_sees_every_step() -> None:
    seen = list[tuple[int, tuple[int, ...]]]()
    svdit.sample(pixel_model(), [0], sampler="ddim", steps=5, callback=lambda done, x: seen.append((done, x.shape)))
    assert seen == [(done, (1, 3, 8, 8)) for done in range(1, 6)]


def test_latents_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    names, decoder = list[str](), svdit.load_autoencoder("none")
    double = type("Double", (type(decoder),), {"channels": 4, "decode": lambda self, z: z[:, :3].repeat(1, 1, 2, 2)})
    monkeypatch.setattr(
        "svdit.model.autoencoder.load_autoencoder", lambda name, device: names.append(name) or double("double")
    )
    x = svdit.sample(pixel_model(4), [0, 1], steps=2)
    assert (x.shape, names) == ((2, 3, 16, 16), ["mse"])
    assert x.abs().max() <= 1
    assert torch.equal(svdit.sample(pixel_model(4), [0, 1], steps=2, vae=double("mine")), x)
    assert names == ["mse"]


def test_a_dit_is_saved_and_loaded(tmp_path: Path) -> None:
    model = svdit.load("digits")
    svdit.save(model, tmp_path / "a.pt", provenance={"from": "here"})
    header = read_header(tmp_path / "a.pt") or {}
    assert (header["name"], header["provenance"]) == ("DiT-digits", {"from": "here"})
    assert equal(svdit.load(tmp_path / "a.pt"), model)
    svdit.save(pixel_model(), tmp_path / "b.safetensors")
    assert (read_header(tmp_path / "b.safetensors") or {})["name"] == ""


def test_a_module_is_saved_and_loaded(tmp_path: Path, net: Net, batches: list[Tensor]) -> None:
    svdit.quantize_(net, "w4a8", batches, skip="head")
    svdit.save(net, tmp_path / "net.safetensors")
    other = Net()
    assert svdit.load(tmp_path / "net.safetensors", other) is other
    assert equal(other, net)
    assert torch.equal(other(batches[0]), net(batches[0]))


def test_psnr_is_scikit_images() -> None:
    a, b = (torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2.0) for x, y in zip(a, b, strict=True)]
    assert svdit.psnr(a, b) == pytest.approx(np.mean(expected), rel=1e-6)
    assert svdit.psnr(a, a) == 100
    assert svdit.psnr(a * 5, a.sign()) == pytest.approx(svdit.psnr((a * 5).clamp(-1, 1), a.sign()))


def test_psnr_of_eight_bits_is_that_of_evaluate(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (2, 4, 16, 16, 3)).astype(np.uint8)
    for name, images in zip(("a", "b"), pixels, strict=True):
        for i, image in enumerate(images):
            write_png(tmp_path / name / f"{i}.png", image)
    report = svdit.evaluate(None, tmp_path / "a", paired=tmp_path / "b")
    assert svdit.psnr(*(to_float(images) for images in pixels)) == pytest.approx(report.metrics["psnr"].value, rel=1e-6)


def test_images_become_one_png(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 1, 64, 64)
    svdit.save_image(x, tmp_path / "a.png", columns=2)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (2 * 130 + 2, 2 * 130 + 2, 3)
    assert [int(pixels[2 + 130 * (i // 2) + 5, 2 + 130 * (i % 2) + 5, 0]) for i in range(3)] == [0, 128, 255]


def test_evaluate_knows_the_networks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    network = object()
    monkeypatch.setattr(inception, "random_extractor", lambda: network)
    monkeypatch.setattr("svdit.api.compare_sets", lambda *arguments: asked.append(arguments))
    svdit.evaluate("real", "fake", "random", metrics="fid,kid", cache="~/x", device="cpu", num_images=5)
    real, fake, given, options = asked.pop()
    assert (real, fake, given) == ("real", "fake", network)
    assert (options.metrics, options.num_images, options.device) == (("fid", "kid"), 5, torch.device("cpu"))
    assert options.cache == Path("~/x").expanduser()
    svdit.evaluate(None, "fake", paired="p")  # needs no network, so no weights
    assert asked.pop()[2:] == (None, svdit.Options(metrics=("paired",), paired="p"))
    svdit.evaluate("real", "fake", network, svdit.Options(seed=3))  # type: ignore[arg-type]
    assert asked.pop()[2:] == (network, svdit.Options(seed=3))


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "preset": (lambda: svdit.quantize_(Net(), "W8A9", [torch.ones(1, 64)]), r"no preset 'W8A9'; .*did you mean w8a8\?"),
    "preset in a dict": (lambda: svdit.quantize_(Net(), {"*": "w8"}, []), r"no preset 'w8'; .*did you mean w8a8\?"),
    "no preset": (lambda: svdit.quantize_(Net(), 8), "there is no preset 8; choose one of w8a8"),  # type: ignore[arg-type]
    "skip": (lambda: svdit.quantize_(Net(), "rtn", skip=["haed"]), r"'haed' matches no linear layer.*head"),
    "no loop": (lambda: svdit.quantize_(Net()), "needs calibration; pass a forward loop"),
    "generator": (lambda: svdit.quantize_(Net(), "w8a8", (x for x in [1])), "is a generator; pass a function"),
    "text": (lambda: svdit.quantize_(Net(), "w8a8", "loop"), "is a str; pass a function"),
    "model": (lambda: svdit.quantize_("digits"), "quantize_ got a str; pass a Module"),  # type: ignore[arg-type]
    "targets": (
        lambda: svdit.quantize_(Net(), "w4a8", [torch.ones(1, 64)], target_size=1, target_sqnr=2),
        "target_size is 1 and target_sqnr 2; pass one",
    ),
    "target of nothing": (lambda: svdit.quantize_(Net(), "rtn", target_size=1), "a target needs calibration"),
    "target of floats": (
        lambda: svdit.quantize_(Net(), "fp8", [torch.ones(1, 64)], target_size=1),
        "chooses bits of integers, but",
    ),
    "checkpoint": (lambda: svdit.load("digit"), r"no checkpoint digit; .*did you mean digits\?"),
    "device": (lambda: svdit.load("digits", device="gpu"), "device 'gpu' is not supported; choose cpu"),
    "family": (lambda: svdit.load("digits", family="sitt"), "has family dit and not sitt"),
    "options": (lambda: svdit.load("digits", Net(), family="sit"), "family are options of a DiT"),
    "order": (lambda: svdit.save("a.pt", Net()), "save got a str; pass the model first"),  # type: ignore[arg-type]
    "suffix": (lambda: svdit.save(Net(), "net.bin"), "net.bin"),
    "path": (lambda: svdit.sample("digits", [0]), "sample got a str; pass a DiT"),  # type: ignore[arg-type]
    "module": (lambda: svdit.sample(nn.Linear(1, 1), [0]), "sample got a Linear; pass a DiT"),  # type: ignore[arg-type]
    "no class": (lambda: svdit.sample(pixel_model(), []), "there are no labels; pass at least one"),
    "class": (lambda: svdit.sample(pixel_model(), [5]), "no class 5; this model has the classes 0 to 4"),
    "class -1": (lambda: svdit.sample(pixel_model(), -1), "no class -1"),
    "class 1.5": (lambda: svdit.sample(pixel_model(), torch.tensor([1.5])), "no class 1.5"),
    "class name": (lambda: svdit.sample(pixel_model(), ["cat"]), "no class cat"),
    "labels": (lambda: svdit.sample(pixel_model(), None), "labels is None; pass a list"),  # type: ignore[arg-type]
    "sampler": (lambda: svdit.sample(pixel_model(), 0, sampler="dimm"), r"no sampler 'dimm'; .*did you mean ddim\?"),
    "other's sampler": (lambda: svdit.sample(pixel_model(), 0, sampler="euler"), "not for models of the family dit"),
    "steps": (lambda: svdit.sample(pixel_model(), 0, steps="many"), "'many' is not a number of sampling steps"),
    "steps 0": (lambda: svdit.sample(pixel_model(), 0, steps=0), "'0'"),
    "seed -1": (lambda: svdit.sample(pixel_model(), 0, steps=2, seed=-1), "the seed is -1; choose a whole number"),
    "seed 1.9": (lambda: svdit.sample(pixel_model(), 0, steps=2, seed=1.9), "the seed is 1.9"),  # type: ignore[arg-type]
    "scale": (lambda: svdit.SamplingConfig(cfg_scale="4"), "cfg_scale is '4'; choose a number"),  # type: ignore[arg-type]
    "channels": (lambda: svdit.SamplingConfig(cfg_channels="three"), "cfg_channels is 'three'"),  # type: ignore[arg-type]
    "interval": (lambda: svdit.SamplingConfig(cfg_interval=(0,)), r"cfg_interval is \(0,\); choose two"),  # type: ignore[arg-type]
    "form": (lambda: svdit.sample(svdit.load("digits-sit"), 0, sde_form="sgima"), r"SDE form .*did you mean sigma\?"),
    "vae": (lambda: svdit.sample(pixel_model(), 0, vae="mse"), "the vae is mse, but the model has 3 channels"),
    "no vae": (lambda: svdit.sample(pixel_model(4), 0, vae="none"), "the vae is none, but .*choose ema or mse"),
    "shape": (lambda: svdit.psnr(torch.ones(1, 3, 8, 8), torch.ones(3, 8, 8)), r"\(1, 3, 8, 8\) and \(3, 8, 8\)"),
    "latents": (lambda: svdit.save_image(torch.ones(1, 4, 8, 8), "a.png"), r"\(1, 4, 8, 8\)"),
    "uint8": (lambda: svdit.psnr(*[torch.ones(1, 3, 8, 8, dtype=torch.uint8)] * 2), "torch.uint8; pass floats in"),
    "0 to 255": (lambda: svdit.psnr(torch.ones(1, 3, 8, 8), 255 * torch.ones(1, 3, 8, 8)), "reach 255; pass floats"),
    "uint8 picture": (lambda: svdit.save_image(torch.ones(1, 3, 8, 8).byte(), "a.png"), "torch.uint8; pass floats in"),
    "setting": (lambda: svdit.sample(pixel_model(), 0, sampl="ddim"), r"no setting 'sampl'; .*did you mean sampler\?"),
    "option": (lambda: svdit.evaluate(None, "b", pair="a"), r"no option 'pair'; .*did you mean paired\?"),
    "rank": (
        lambda: svdit.quantize_(Net(), "w8a8", [], rank=8),
        r'rank is part of a recipe; pass recipe_for\("w8a8", r',
    ),
    "quantize_": (lambda: svdit.quantize_(Net(), "rtn", workdir="a"), r"no option 'workdir'.*did you mean work_dir\?"),
    "recipe": (lambda: svdit.recipe_for("w8a8", ranks=8), r"no field of a recipe 'ranks'.*did you mean rank\?"),
    "of a DiT": (lambda: svdit.load("digits", famly="dit"), r"no option of a DiT 'famly'.*did you mean family\?"),
    "jpg": (lambda: svdit.save_image(torch.ones(1, 3, 8, 8), "a.jpg"), "a.jpg"),
    "metric": (lambda: svdit.evaluate("a", "b", metrics=["fdi"]), r"no metric 'fdi'; .*did you mean fid\?"),
    "features": (lambda: svdit.evaluate("a", "b", "incepton"), r"no feature extractor .*did you mean inception\?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_choices(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = MISTAKES[name]
    with pytest.raises(svdit.UserError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_names_the_nearest(net: Net) -> None:
    svdit.quantize_(net, "rtn")
    with pytest.raises(svdit.UserError, match=r"no backend 'dequants'; .*did you mean dequant\?"):
        svdit.accelerate(net, "dequants")


def test_a_backend_is_checked_where_nothing_is_to_be_accelerated(net: Net) -> None:
    assert svdit.accelerate(net) is net
    with pytest.raises(svdit.UserError, match="no backend 'dequants'"):
        svdit.accelerate(net, "dequants")
    svdit.quantize_(net, "rtn")
    fast = svdit.accelerate(net, "dequant")
    assert svdit.accelerate(fast) is fast
    with pytest.raises(svdit.UserError, match="is accelerated already; load it again"):
        svdit.accelerate(fast, "reference")
    with pytest.raises(svdit.UserError, match="is accelerated already; load it again"):
        svdit.accelerate(fast, debug=True)


def test_a_model_that_was_accelerated_is_empty() -> None:
    model = svdit.load("digits")
    svdit.quantize_(model, "rtn")
    svdit.accelerate(model, "dequant")
    with pytest.raises(svdit.UserError, match="was accelerated and is empty"):
        svdit.accelerate(model)


def test_steps_may_be_a_number() -> None:
    assert svdit.SamplingConfig("euler", 50) == svdit.SamplingConfig("euler", "50")  # type: ignore[arg-type]


def test_a_cache_plan_that_is_not_followed_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model = pixel_model()
    sampling = recorded(default_sampling(model.config, sampler="ddim", steps="9"))
    model.cache_plan = SimpleNamespace(sampling=sampling)  # type: ignore[assignment]
    svdit.sample(model, 0, steps=2, sampler="ddim")
    assert "note: the cache plan is not followed: it is for steps 9, not 2" in capsys.readouterr().err


def test_an_accelerated_model_is_not_saved(net: Net, tmp_path: Path) -> None:
    svdit.quantize_(net, "rtn")
    with pytest.raises(svdit.UserError, match="save the quantized model before accelerating it"):
        svdit.save(svdit.accelerate(net, "dequant"), tmp_path / "a.pt")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {"compiled": torch.compile, "data parallel": nn.DataParallel}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_quantized_and_saved_like_those_inside(wrapper: str, tmp_path: Path) -> None:
    wrap, plain, inside = WRAPPERS[wrapper], pixel_model(), pixel_model()
    svdit.quantize_(plain, "rtn")
    svdit.quantize_(wrap(inside), "rtn")
    assert quantized_layers(inside).keys() == quantized_layers(plain).keys()
    svdit.save(wrap(inside), tmp_path / "dit.safetensors", name="mine")
    assert (read_header(tmp_path / "dit.safetensors") or {})["name"] == "mine"
    assert svdit.load(tmp_path / "dit.safetensors").config == plain.config
    net = Net()
    svdit.quantize_(wrap(net), "rtn")
    for save in (svdit.save, svdit.save_quantized):
        save(wrap(net), tmp_path / "net.safetensors")
        loaded = Net()
        svdit.load(tmp_path / "net.safetensors", wrap(loaded))
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in net.state_dict().items())
    assert isinstance(svdit.accelerate(wrap(inside)), type(svdit.accelerate(plain)))
    with pytest.raises(svdit.UserError, match=r"pass a DiT, .*; model\.compile\(\) compiles it"):
        svdit.sample(torch.compile(pixel_model()), 0)  # type: ignore[arg-type]
