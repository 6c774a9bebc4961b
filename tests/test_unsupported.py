"""docs/unsupported.md: every row of its tables is tried."""

import copy
import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from pixels import ROOT, pixel_model
from torch import Tensor, nn

import svdit
from svdit.cli import command
from svdit.evaluation import paired
from svdit.kernels import ops
from svdit.quant.linear import SVDLinear, quantized_layers
from svdit.quant.report import QuantReport

BATCHES = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Mixed(nn.Module):
    """Parts that are not linears, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embedding, self.table = nn.Conv1d(1, 1, 3), nn.Embedding(4, 64), nn.Parameter(torch.ones(64))
        self.attention, self.linear = nn.MultiheadAttention(64, 2), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x[:, None])[:, 0].repeat(1, 2)[:, :64] + self.table)


class Doubled(nn.Linear):
    """A linear with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def mixed() -> QuantReport:
    torch.manual_seed(0)
    model = Mixed()
    report = svdit.quantize_(model, "rtn")
    assert list(quantized_layers(model)) == ["linear"]
    assert [type(part) for part in (model.conv, model.embedding)] == [nn.Conv1d, nn.Embedding]
    return report


def peculiar() -> None:
    hooked = nn.Linear(64, 64)
    hooked.register_forward_hook(lambda *arguments: None)
    report = svdit.quantize_(nn.Sequential(Doubled(64, 64), hooked, nn.Linear(64, 64)), "rtn")
    assert [line.name for line in report.layers] == ["2"]
    assert [warning.split()[0] for warning in report.warnings] == ["0", "1"]


def quantized(preset: str = "rtn", width: int = 64) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, 8)).eval()
    svdit.quantize_(model, preset, BATCHES if width == 64 else [torch.randn(64, width)])
    return model


def in_floats() -> None:
    """The C kernels do not support them: they run in fp32, with the values of their codes."""
    for preset in ("fp8", "nvfp4", "mxfp4"):
        layer = quantized(preset)[0]  # type: ignore[index]
        assert isinstance(layer, SVDLinear)
        assert ops.unsupported(layer.spec, (8, 64), "cpu")
        fast = svdit.accelerate(nn.Sequential(copy.deepcopy(layer)), "dequant")
        assert torch.allclose(fast(BATCHES[0]), layer(BATCHES[0]), rtol=1e-4, atol=1e-4)


def accelerated() -> None:
    model = quantized()
    fast = svdit.accelerate(copy.deepcopy(model), "dequant")
    for call in (lambda: svdit.save(fast, "a.pt"), lambda: copy.deepcopy(fast), lambda: fast.to(torch.float16)):
        with pytest.raises(svdit.UserError, match="accelerated"):
            call()
    assert not fast(BATCHES[0].requires_grad_()).requires_grad
    svdit.accelerate(model, "dequant")  # the copy that was kept


def inner_hooks() -> None:
    model, called = pixel_model(), list[str]()
    x = torch.randn(8, 3, 8, 8)
    call = x, torch.arange(8) * 99, torch.arange(8) % 5
    svdit.quantize_(model, "w8a8", [call])
    fast: Any = svdit.accelerate(model)
    fast.blocks[0].qkv.register_forward_hook(lambda *_: called.append("layer"))
    fast.blocks[0].register_forward_hook(lambda *_: called.append("block"))
    fast(*call)
    assert called == ["block"]


def fixed_codes() -> None:
    layer = quantized()[0]  # type: ignore[index]
    assert isinstance(layer, SVDLinear)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


def attention() -> None:
    """No layer of a quantized DiT is inside its attention but the linears before and after."""
    model = pixel_model()
    svdit.quantize_(model, "rtn")
    assert {name.rsplit(".", 1)[1] for name in quantized_layers(model) if ".attn." in name} == {"qkv", "proj"}


def refuses(message: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], None]:
    def run() -> None:
        with pytest.raises(svdit.UserError, match=message):
            call(*arguments, **options)

    return run


def no_plan() -> None:
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit, match="2"):
        command("cache", ["digits-sit", "--speedup", "2", "--sampler", "dopri5", "--device", "cpu", "--output", "c.pt"])
    assert "dopri5" in errors.getvalue()


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def gguf() -> None:
    Path("model.gguf").write_bytes(b"GGUF" + bytes(100))
    refuses("it is a GGUF file", svdit.load, "model.gguf")()


def text_models() -> None:
    """Nothing but class labels is an input of sampling."""
    assert "labels" in inspect.signature(svdit.generate).parameters
    refuses("no class a dog", svdit.sample, pixel_model(), "a dog")()


def lpips() -> None:
    assert {url.rsplit("/", 1)[1] for url in paired.LPIPS_URLS} == {"vgg16-397923af.pth", "weights-vgg16-lpips.pth"}


def no_static_scales() -> None:
    layer = quantized("w8a8")[0]  # type: ignore[index]
    one, ten = layer(BATCHES[0]), layer(10 * BATCHES[0])
    centred = layer(0 * BATCHES[0])
    assert torch.allclose(ten - centred, 10 * (one - centred), rtol=0.05, atol=0.05 * float(ten.detach().abs().max()))


def wide() -> None:
    refuses("cannot be quantized to INT4 g64: rows of 96", quantized, "w4a8", 96)()
    quantized("w8a8", 96)
    quantized("w4a8-channel", 96)


def sde() -> None:
    model = svdit.load("digits-sit")
    refuses("time_shift is 0.5 and the sampler sde", svdit.sample, model, 0, time_shift=0.5)()
    loud = pixel_model(family="sit", prediction="velocity", time="noise_to_data", path="linear", noise_scale=2.0)
    refuses("an SDE needs noise of standard deviation 1", svdit.sample, loud, 0)()


ROWS: dict[str, Callable[[], Any]] = {  # the beginning of the first cell: what is tried
    "convolutions": mixed,
    "a model without": refuses("no nn.Linear", svdit.quantize_, sequential(nn.Conv1d(1, 1, 3)), "rtn"),
    "`nn.MultiheadAttention`": lambda: mixed().skipped["attention"],
    "subclasses of": peculiar,
    "a model that is itself": refuses("is itself a Linear", svdit.quantize_, nn.Linear(64, 8), "rtn"),
    "a model that is already": lambda: refuses("already quantized", svdit.quantize_, quantized(), "rtn")(),
    "weights on the meta": refuses("meta device", svdit.quantize_, sequential(nn.Linear(64, 8, device="meta")), "rtn"),
    "widths that 64": wide,
    "the products of attention": attention,
    "sampling and evaluation": text_models,
    "integers of": lambda: [refuses("bits cannot be stored", svdit.Format, bits)() for bits in (1, 9)],
    "static activation": no_static_scales,
    "FP8, NVFP4": in_floats,
    "a size or quality": refuses(
        "chooses bits of integers", svdit.quantize_, sequential(nn.Linear(64, 8)), "fp8", BATCHES, target_size=1
    ),
    "requantizing": accelerated,
    "forward hooks on layers": inner_hooks,
    "training the weights": fixed_codes,
    "guidance of a": lambda: refuses(
        "no null class", svdit.sample, pixel_model(has_null_class=False), 0, cfg_scale=1.5
    )(),
    "a sampler of another": lambda: [
        refuses("not for models of the family", svdit.sample, svdit.load(name), 0, sampler=sampler)()
        for name, sampler in (("digits", "euler"), ("digits", "sde"), ("digits-sit", "ddpm"), ("digits-jit", "ddim"))
    ],
    "SDE samplers": sde,
    "feature caching": no_plan,
    "FID from": refuses("choose one of inception, random", svdit.evaluate, "a", "b", "clip"),
    "LPIPS": lpips,
    "other formats": gguf,
}


def first_cells() -> list[str]:
    lines = (ROOT / "docs" / "unsupported.md").read_text(encoding="utf-8").splitlines()
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| what ")]


def test_every_row_is_tried() -> None:
    cells = first_cells()
    assert len(cells) == len(ROWS)
    assert [[name for name in ROWS if cell.startswith(name)] for cell in cells] == [[name] for name in ROWS]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ROWS[name]()


@pytest.mark.parametrize("device", ["mps", "xpu", "hip"])
def test_other_devices_are_refused(device: str) -> None:
    refuses("is not supported; choose cpu", svdit.load, "digits", device=device)()
