"""`svdit verify` and `svdit inspect` on files that are right, changed, or of another source."""

from pathlib import Path

import pytest
import torch

from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.cli import command
from svdit.model.dit import DiT


@pytest.fixture
def files(tiny: DiT, tmp_path: Path) -> tuple[Path, Path]:
    source, quantized = tmp_path / "tiny.safetensors", tmp_path / "q.safetensors"
    save_model(tiny, source)
    flags = "--preset w4a8 --rank 4 --calib-images 2 --calib-steps 2 --factors int8 --no-figures"
    command("quantize", ["--ckpt", str(source), "--output", str(quantized), *flags.split()])
    return source, quantized


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


def test_what_was_made_is_verified(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    verify(files[1], files[0])
    assert "11 quantized layers as recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ("blocks.0.attn.qkv.residual_codes", "blocks.0.attn.qkv of"),
        ("blocks.1.mlp.fc2.l1_scales", "blocks.1.mlp.fc2 of"),
        ("x_embedder.proj.bias", "x_embedder.proj.bias differs"),
        ("final_layer.linear.weight", "final_layer.linear.weight differs"),
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
    for part in ("11 quantized", "INT4 g64", "rank 4, INT8", "Hadamard 64", "quantization.preset: w4a8", "sha256"):
        assert part in said
    command("inspect", [str(files[0])])
    assert "all at full precision" in capsys.readouterr().out
