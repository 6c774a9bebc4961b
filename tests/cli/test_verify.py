"""`svdit verify` and `svdit inspect` on files that are right, changed, or of another source."""

import json
from pathlib import Path

import pytest
import torch
from conftest import randomize

from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.cli import command
from svdit.kernels import ops
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.linear import quantized_layers


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


def test_a_new_model_whose_adaln_is_zero_is_quantized_and_verified(tmp_path: Path) -> None:
    model = DiT(DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, num_classes=5))
    torch.nn.init.zeros_(model.blocks[0].attn.proj.weight)
    save_model(model, tmp_path / "new.safetensors")
    options = "--preset w4a4 --rank 4 --calib-images 2 --calib-steps 2 --adaln int4"
    paths = ["--ckpt", str(tmp_path / "new.safetensors"), "--output", str(tmp_path / "q.safetensors")]
    command("quantize", [*paths, *options.split()])
    report = json.loads((tmp_path / "q.report.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity
    errors = {line["name"].split(".", 2)[2]: line["weight_error"] for line in report["layers"]}
    assert errors["attn.proj"] == errors["adaLN_modulation.1"] == 0 < errors["attn.qkv"]
    verify(tmp_path / "q.safetensors", tmp_path / "new.safetensors")


@pytest.mark.parametrize("flags", [(), ("--adaln", "fp16"), ("--adaln", "int4")], ids=str)
def test_a_fresh_file_is_verified(source: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    path = quantized(source, *flags)
    verify(path, source)
    assert f"{8 if 'fp16' in flags else 11} quantized layers match the record" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ("blocks.0.attn.qkv.residual_codes", "blocks.0.attn.qkv of"),
        ("blocks.1.mlp.fc2.l1_scales", "blocks.1.mlp.fc2 of"),
        ("x_embedder.proj.bias", "x_embedder.proj.bias is not quantized, but differs"),
        ("final_layer.linear.weight", "final_layer.linear.weight is not quantized, but differs"),
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


def test_inspect_shows_format_layers_and_provenance(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command("inspect", [str(files[1])])
    output = capsys.readouterr().out
    for part in (
        "11 quantized",
        "INT4 g64",
        "4 INT8",
        "Hadamard 64",
        f"backend on this machine: {ops.describe(ops.choose())}",
        "preset=w4a8",
        "sha256",
    ):
        assert part in output
    assert max(map(len, output.splitlines())) <= 80
    command("inspect", [str(files[0])])
    assert "layers: none quantized" in capsys.readouterr().out


def test_inspect_starts_with_a_summary_and_breaks_names_that_are_longer_than_a_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / f"{'a long name ' * 4}{'without_spaces_' * 10}.safetensors"
    link.symlink_to(files[1])
    command("inspect", [str(link)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("file: a long name")
    assert f"{'without_spaces_' * 10}.safetensors" in "".join(line.strip() for line in lines[:5])
    starts = [
        next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("model:", "layers: 11", "layer ")
    ]
    assert starts == sorted(starts)


def test_inspect_shows_shapes_and_sizes_without_building_a_model(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(files[1])
    sizes = {
        name: (layer.out_features, layer.in_features, sum(t.nbytes for t in layer.state_dict().values()))
        for name, layer in quantized_layers(model).items()
    }
    pickled = files[1].with_suffix(".pt")
    save_model(model, pickled)
    published = files[0].with_name("published.pt")
    torch.save(load_model(files[0]).state_dict(), published)
    monkeypatch.setattr(DiT, "__init__", None)
    for path in (files[1], pickled):
        command("inspect", [str(path)])
        rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
        for name, (rows_, columns, nbytes) in sizes.items():
            assert rows[name][1:4] == [str(rows_), "×", str(columns)]
            assert rows[name][-1] == f"{nbytes / 1e3:.1f}"
    with pytest.raises(SystemExit):
        command("inspect", [str(published), "--family", "dit"])
    assert "no named model has depth 2 and width 64" in capsys.readouterr().err
    command("inspect", ["digits", "--model", "DiT-digits"])
    assert "hidden_size=128" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command("inspect", ["digits", "--model", "DiT-S/2"])
    assert "DiT-S/2" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--num-bits 3", "--num-bits 3 --whiten --calib-images 1 --calib-steps 1"])
def test_inspect_shows_factors_without_a_residual(source: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = source.with_name("factors.safetensors")
    command("quantize", f"--ckpt {source} --output {path} --rank-ratio 0.5 --no-figures {flags}".split())
    capsys.readouterr()
    command("inspect", [str(path)])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["blocks.0.mlp.fc1"][1:7] == ["256", "×", "64", "–", "float", "32"]
