"""Weights in the files of other tools: nested, prefixed, sharded; otherwise the message lists what the file holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from svdit.checkpoints.foreign import state_dict
from svdit.checkpoints.io import contents, fingerprint
from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.files import sha256
from svdit.model.dit import DiT

State = dict[str, torch.Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "a.b.module.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_that_every_name_has_are_removed(tiny: DiT, tmp_path: Path, prefix: str, suffix: str) -> None:
    state, path = prefixed(tiny.state_dict(), prefix), tmp_path / f"x.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"ema": state}, path)
    loaded = load_model(path, num_heads=2, family="dit").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tiny.state_dict().items())


def test_wrappers_inside_of_names_are_removed(tiny: DiT) -> None:
    state = tiny.state_dict()
    for inner in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"):
        wrapped = {key.replace("blocks.0.", f"blocks.0.{inner}."): tensor for key, tensor in state.items()}
        assert state_dict(wrapped, Path("x")).keys() == state.keys()


NESTED: dict[str, Callable[[State, State], Any]] = {
    **{key: lambda s, o, key=key: {key: s, "epoch": 1} for key in ("ema", "model", "state_dict", "module", "net", "x")},
    "empty ema": lambda s, o: {"ema": {}, "model": s},
    "ema before model": lambda s, o: {"model": o, "model_ema": s},
    "ema without a state dict": lambda s, o: {"ema": {"decay": 0.9, "shadow": [torch.ones(2)]}, "model": s},
    "deep": lambda s, o: {"state": {"ema": {"module": prefixed(s, "module.")}}, "model": o},
    "with numbers": lambda s, o: {"model": {**s, "step": 3}},
    "beside other modules": lambda s, o: {**prefixed(s, "net."), "loss.weight": torch.ones(2)},
    "ema names in a flat dict": lambda s, o: {**prefixed(o, "net."), **prefixed(s, "ema.")},
}


@pytest.mark.parametrize("layout", NESTED.values(), ids=NESTED)
def test_state_dicts_are_found_in_any_nesting(tiny: DiT, tmp_path: Path, layout: Callable[[State, State], Any]) -> None:
    state = tiny.state_dict()
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save(layout(state, other), tmp_path / "x.pt")
    loaded = load_model(tmp_path / "x.pt", num_heads=2, family="dit").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_otherwise_the_message_lists_what_the_file_holds(tmp_path: Path) -> None:
    torch.save({"ema": {}, "epoch": 3, "\x1b[31mred": [1]}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"3 entries: 'ema' \(dict\), 'epoch' \(int\), '\\x1b\[31mred' \(list\); pass"):
        load_model(tmp_path / "x.pt")
    torch.save({"conv.weight": torch.ones(2), "fc.bias": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"no tensor 'x_embedder\.proj\.weight' among its 2 \('conv\.weight', …\)"):
        load_model(tmp_path / "x.pt")


def test_dicts_that_contain_themselves_are_searched_once() -> None:
    content: dict[str, Any] = {"a": {}}
    for _ in range(40):
        content = dict.fromkeys("abcdef", content)
    content["a"]["self"] = content
    with pytest.raises(UserError, match="a dict of 6 entries"):
        state_dict(content, Path("x"))


def sharded(state: State, folder: Path, kind: str = "safetensors") -> Path:
    """Write the state in two shards; returns the index."""
    folder.mkdir(exist_ok=True)
    names, where = list(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.{kind}"
        content = {name: state[name] for name in part}
        save_file(content, folder / file) if kind == "safetensors" else torch.save(content, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_joins_its_shards(tiny: DiT, tmp_path: Path, kind: str) -> None:
    index = sharded(prefixed(tiny.state_dict(), "module."), tmp_path, kind)
    loaded = load_model(index, num_heads=2, family="dit").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tiny.state_dict().items())
    before = fingerprint(index)
    shard = tmp_path / f"model-00002-of-00002.{kind}"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert fingerprint(index) != before != sha256(index)


def edited(index: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_an_index_names_no_file_outside_of_its_folder(tiny: DiT, tmp_path: Path, target: str) -> None:
    index = edited(sharded(tiny.state_dict(), tmp_path / "x"), lambda files: files.update(pos_embed=target))
    save_file({"pos_embed": tiny.pos_embed.data}, tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match=r"which is outside of its folder; download it again"):
        contents(index)


def test_incomplete_shards_are_named(tiny: DiT, tmp_path: Path) -> None:
    index = sharded(tiny.state_dict(), tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names the shard model-00002-of-00002.safetensors, which is not there"):
        contents(index)
    index = edited(sharded(tiny.state_dict(), tmp_path), lambda files: files.update(more=next(iter(files.values()))))
    with pytest.raises(UserError, match="lacks 'more'; download it again"):
        contents(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": []}', "\xff"])
def test_other_json_is_no_index(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="is not an index of shards"):
        contents(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64])
def test_weights_quantized_by_other_tools_are_refused(tiny: DiT, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {**tiny.state_dict(), "blocks.0.mlp.fc1.weight": torch.ones(256, 64, dtype=dtype)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"has blocks\.0\.mlp\.fc1\.weight as {dtype}, as other tools quantize; pass"):
        load_model(tmp_path / "x.pt", num_heads=2, family="dit")


def test_placeholders_have_the_names_of_their_classes(tmp_path: Path) -> None:
    torch.save({"params": np.ones(3), "out": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"'params' \(ndarray\), 'out' \(PosixPath\)"):
        load_model(tmp_path / "x.pt")


def test_a_changed_byte_of_another_tools_archive_is_found(tiny: DiT, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(tiny.pos_embed.numpy().tobytes()) + 40] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its content does not match its checksum; copy or download"):
        load_model(tmp_path / "x.pt", num_heads=2, family="dit")


def test_names_that_are_no_strings_are_an_error(tiny: DiT, tmp_path: Path) -> None:
    torch.save({"svdit": {"format_version": 1}, "model": {1: torch.ones(1), "a": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="contains no state dict of tensors"):
        load_model(tmp_path / "x.pt")
