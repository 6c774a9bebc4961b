"""Damaged, truncated and foreign files are errors of one sentence; code in files is never executed."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.errors import UserError
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.config import RECIPES, dit_config
from svdit.quant.quantize import quantize_
from svdit.storage.checksum import digest

SUFFIXES = (".safetensors", ".pt")


def test_saving_leaves_no_other_files_and_usual_permissions(tiny: DiT, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "tiny.safetensors")
    (tmp_path / "other").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.safetensors", "other"}
    assert (tmp_path / "tiny.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(UserError, match=r"use a name that ends in \.safetensors or \.pt"):
        save_model(tiny, tmp_path / "tiny.bin")
    with pytest.raises(TypeError):
        save_model(tiny, tmp_path / "bad.pt", provenance={"x": object()})
    assert len(list(tmp_path.iterdir())) == 2


class Evil:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle", "nested"])
def test_pickled_code_is_never_executed(tiny: DiT, tmp_path: Path, layout: str) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    evil = Evil(proof)
    if layout == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        content = {"ema": tiny.state_dict(), "args": evil} if layout == "nested" else evil
        torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy")
    for function in (load_model, read_header):
        with pytest.raises(UserError, match=r"could run code, so it was not loaded; ask its author"):
            function(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if layout != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # without restrictions the file does run code


FOREIGN = {
    "empty": b"",
    "text": b"hello world " * 50,
    "a web page": b"<html>404</html>" * 20,
    "short": b"abc",
    "a zip of something else": b"PK\x03\x04" + b"junk" * 40,
    "a header of wrong length": struct.pack("<Q", 60) + b"{" + b"x" * 80,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files_are_errors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"\({len(content)} bytes\) is not a checkpoint, or an incomplete one"):
        load_model(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"a": torch.ones(2)}, torch.ones(3)], ids=str)
def test_other_contents_are_errors(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"no state dict of tensors|not a checkpoint of a DiT"):
        load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", [0.001, 0.2, 0.9, 0.9999])
def test_truncated_files_are_errors(tiny: DiT, tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"tiny{suffix}"
    save_model(tiny, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match=r"an incomplete one.* copy or download it again"):
        load_model(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("where", ["first tensor byte", "last tensor byte", "configuration"])
def test_one_changed_byte_is_an_error(tiny: DiT, tmp_path: Path, suffix: str, where: str) -> None:
    path = tmp_path / f"tiny{suffix}"
    weight = torch.nn.Parameter(torch.full((64, 64), 1.25))
    tiny.blocks[1].attn.proj.weight = weight
    save_model(tiny, path, name="two-headed")
    content = bytearray(path.read_bytes())
    if where == "configuration":
        at = content.index(b"two-headed")
    else:
        data = bytes(weight.detach().numpy().tobytes())
        at = content.index(data) + (0 if where == "first tensor byte" else len(data) - 1)
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its content does not match its checksum"):
        load_model(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mapped_are_the_layers_with_quantized_activations_only(tiny: DiT, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tiny{suffix}"
    quantize_(tiny, dit_config(RECIPES["rtn"]))
    save_model(tiny, path)
    copied, mapped = load_model(path), load_model(path, mapped=True)
    content = path.read_bytes()
    with path.open("r+b") as file:  # in place, as no program of svdit writes
        for tensor in (tiny.blocks[0].mlp.fc1.residual_codes, tiny.blocks[0].adaLN_modulation[1].residual_codes):
            file.seek(content.index(tensor.numpy().tobytes()))
            file.write(b"\0" * tensor.nbytes)
    for model, zeros in ((copied, False), (mapped, True)):
        assert bool((model.blocks[0].mlp.fc1.residual_codes == 0).all()) is zeros
        assert model.blocks[0].adaLN_modulation[1].residual_codes.any()
    assert torch.equal(mapped.pos_embed, tiny.pos_embed)


@pytest.mark.parametrize("mapped", [False, True])
def test_damage_is_reported_before_what_it_causes(tiny: DiT, tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "tiny.safetensors"
    quantize_(tiny, dit_config(RECIPES["rtn"]))
    save_model(tiny, path)
    content, scales = path.read_bytes(), tiny.blocks[0].mlp.fc1.residual_scales
    start = content.index(scales.numpy().tobytes())
    path.write_bytes(content[:start] + b"\xff" * scales.nbytes + content[start + scales.nbytes :])  # NaN
    with pytest.raises(UserError, match="is damaged: its content does not match its checksum"):
        load_model(path, mapped=mapped)


def test_header_is_read_without_the_tensors(tiny: DiT, tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"tiny{suffix}"
        save_model(tiny, path)
        content = bytearray(path.read_bytes())
        content[content.index(tiny.pos_embed.numpy().tobytes())] ^= 1
        path.write_bytes(content)
        header = read_header(path)  # verifying the tensors would raise
        assert header is not None
        assert header["format_version"] == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_changed_byte_changes_a_model(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"small{suffix}"
    model = DiT(DiTConfig(4, 2, 1, hidden_size=8, depth=1, num_heads=1, num_classes=2))
    save_model(model, path)
    whole = path.read_bytes()

    @settings(max_examples=100)
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def check(at: int, change: int) -> None:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        try:
            again = load_model(path)
        except UserError:
            pass
        else:  # bytes without meaning, such as an archive's dates
            assert again.config == model.config
            assert digest({}, again.state_dict()) == digest({}, model.state_dict())

    check()
