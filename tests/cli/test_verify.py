"""`svdit verify` and `svdit inspect` on files that are right, changed, or of another source."""

from pathlib import Path

import pytest
import torch
from conftest import randomize

from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.cli import command
from svdit.kernels import ops
from svdit.model.dit import DiT, DiTConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomize(DiT(DiTConfig(4, 2, 4, hidden_size=64, depth=2, num_heads=2, num_classes=5)))
    assert isinstance(model, DiT)
    path = tmp_path_factory.mktemp("verify") / "tiny.safetensors"
    save_model(model, path)
    return path


def quantized(source: Path, *flags: str) -> Path:
    """Quantized with these flags, once."""
    path = source.with_name(f"q{'-'.join(flags)}.safetensors")
    if not path.exists():
        always = "--preset w4a8 --rank 4 --calib-images 2 --calib-steps 2 --factors int8 --no-figures"
        command("quantize", ["--ckpt", str(source), "--output", str(path), *always.split(), *flags])
    return path


@pytest.fixture
def files(source: Path) -> tuple[Path, Path]:
    return source, quantized(source)


def verify(quantized: Path, source: Path) -> None:
    command("verify", [str(quantized), "--against", str(source)])


def tamper(path: Path, tensor: str) -> Path:
    """The same file with one tensor changed, its checksum made right again."""
    model, header = load_model(path), read_header(path)
    assert header is not None
    state = model.state_dict()
    state[tensor].copy_(state[tensor].flip(0))
    changed = path.with_name("changed.safetensors")
    save_model(model, changed, provenance=header["provenance"])
    return changed


@pytest.mark.parametrize("flags", [(), ("--adaln", "fp16"), ("--adaln", "int4")], ids=str)
def test_what_was_made_is_verified(source: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    path = quantized(source, *flags)
    verify(path, source)
    assert f"{8 if 'fp16' in flags else 11} quantized layers as recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ("blocks.0.attn.qkv.residual_codes", "blocks.0.attn.qkv of"),
        ("blocks.1.mlp.fc2.l1_scales", "blocks.1.mlp.fc2 of"),
        ("x_embedder.proj.bias", "x_embedder.proj.bias differs"),
        ("final_layer.linear.weight", "final_layer.linear.weight differs"),
        ("blocks.0.mlp.fc2.bias", "the bias of blocks.0.mlp.fc2"),
        ("blocks.1.attn.proj.bias", "the bias of blocks.1.attn.proj"),
        ("blocks.1.mlp.fc1.bias", "the bias of blocks.1.mlp.fc1"),
        ("blocks.0.attn.qkv.bias", "the bias of blocks.0.attn.qkv"),
        ("blocks.0.adaLN_modulation.1.bias", "the bias of blocks.0.adaLN"),
        ("blocks.0.mlp.fc1.in_shift", "the bias of blocks.0.mlp.fc1"),
        ("blocks.0.mlp.fc1.in_scale", "blocks.0.mlp.fc1 of"),
    ],
)
def test_a_change_is_found(
    files: tuple[Path, Path], tensor: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad(), pytest.raises(SystemExit) as stop:
        verify(tamper(files[1], tensor), files[0])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_another_source_is_refused(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        other = tamper(files[0], "x_embedder.proj.bias")
    with pytest.raises(SystemExit):
        verify(files[1], other)
    assert "is not the source" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        verify(files[0], files[0])
    assert "records no weight errors" in capsys.readouterr().err


def test_inspect_tells_format_layers_and_origin(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", [str(files[1])])
    said = capsys.readouterr().out
    for part in (
        "11 quantized",
        "INT4 g64",
        "rank 4, INT8",
        "Hadamard 64",
        f"runs here by: {ops.describe(ops.choose())}",
        "quantization.preset: w4a8",
        "sha256",
    ):
        assert part in said
    command("inspect", [str(files[0])])
    assert "all at full precision" in capsys.readouterr().out
