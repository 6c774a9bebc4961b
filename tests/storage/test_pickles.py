"""Files of torch.save are data: descriptive objects become placeholders, others are named, and memory has a bound."""

import argparse
import collections
import datetime
import enum
import io
import pickle
import resource
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.storage import pickles

LEGACY = {"zip": True, "legacy": False}
DESCRIPTIVE = {
    "path": Path("x"), "numpy scalar": np.float64(2.3), "numpy array": np.arange(5), "dtype": np.dtype("int8"),
    "namespace": argparse.Namespace(lr=1.0), "date": datetime.datetime(2024, 1, 2), "set": frozenset({1, 2}),
    "simple namespace": types.SimpleNamespace(a=1), "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2]), "range": range(4), "version": torch.__version__,
    "generator": np.random.RandomState(0),
}  # fmt: skip


@pytest.mark.parametrize("is_zip", LEGACY.values(), ids=LEGACY)
def test_files_are_what_their_content_says(is_zip: bool, tmp_path: Path) -> None:
    """Torch takes every file of that name for one of safetensors."""
    path = tmp_path / "of_torch.safetensors"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    assert pickles.load(path)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("is_zip", LEGACY.values(), ids=LEGACY)
@pytest.mark.parametrize("value", DESCRIPTIVE.values(), ids=DESCRIPTIVE)
def test_descriptive_objects_do_not_hide_the_tensors(value: object, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "with_objects.pt"
    torch.save({"args": [value], "ema": {"a": torch.ones(3)}}, path, _use_new_zipfile_serialization=is_zip)
    loaded = pickles.load(path)
    assert loaded["ema"]["a"].tolist() == [1, 1, 1]
    assert isinstance(loaded["args"][0], pickles.Placeholder | dict | list | set)


class Level(enum.Enum):
    HIGH = 1


@pytest.mark.parametrize("is_zip", LEGACY.values(), ids=LEGACY)
@pytest.mark.parametrize(
    ("value", "name"),
    [(torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (Level.HIGH, "test_pickles.Level"), (print, "print")],
    ids=str,
)
def test_other_objects_are_named(value: object, name: str, is_zip: bool, tmp_path: Path) -> None:
    torch.save({"config": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=rf"objects other than tensors \('.*{name}.*could run code") as error:
        pickles.load(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert "PyTorch 2" not in str(error.value)


class Call:
    """Calls `function` when unpickled without restrictions."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("function", [bytearray, eval, exec, getattr, __import__, open])
def test_no_function_of_python_is_called(function: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"x": Call(function, 5)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="could run code"):
        pickles.load(tmp_path / "x.pt")


def compressed(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of torch.save whose entries are compressed."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))


def test_compressed_tensors_are_not_unpacked(tmp_path: Path) -> None:
    compressed(tmp_path / "bomb.pt", {"a": torch.zeros(2**22)})
    with pytest.raises(UserError, match=r"\(\d{5} bytes\) has compressed tensors \(1677\d{4} bytes\)"):
        pickles.load(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(1).expand(2**40)},
        {"a": torch.zeros(1).as_strided((2**20, 2**20), (0, 0))},
        {str(i): row for i, row in enumerate(torch.zeros(2**18).expand(1000, -1))},
    ],
    ids=["expanded", "strides", "repeated"],
)
def test_tensors_larger_than_their_file_are_errors(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"has \d+ bytes, but its tensors claim \d+: they repeat"):
        pickles.check_memory(tmp_path / "bomb.pt", pickles.load(tmp_path / "bomb.pt"), 2**20)


def test_tied_tensors_are_allowed(tmp_path: Path) -> None:
    weight = torch.zeros(2**20)
    torch.save({"a": weight, "b": weight, "c": weight[:10]}, tmp_path / "tied.pt")
    pickles.check_memory(tmp_path / "tied.pt", pickles.load(tmp_path / "tied.pt"), 2**22)


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_storage_are_errors(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"could run code"):
        pickles.load(tmp_path / "x.pt")


def test_bombs_use_no_memory(tmp_path: Path) -> None:
    compressed(tmp_path / "zip.pt", {"x_embedder.proj.weight": torch.zeros(2**22)})
    torch.save({"x_embedder.proj.weight": torch.zeros(1).expand(2**40)}, tmp_path / "expanded.pt")
    torch.save({"x": Call(bytearray, 2**31)}, tmp_path / "bytes.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in tmp_path.glob("*.pt"):
        with pytest.raises(UserError):
            load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kilobytes


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UserError, match="is not a checkpoint, or an incomplete one"):
        pickles.load(tmp_path / "x.pkl")


def nested(kind: Callable[[Any], Any], depth: int) -> Any:
    """A value that contains the previous one twice, at every level."""
    value: Any = kind([1])
    for _ in range(depth):
        value = kind([value, value])
    return value


@pytest.mark.parametrize("is_zip", LEGACY.values(), ids=LEGACY)
@pytest.mark.parametrize(
    "content",
    [{"svdit": nested(list, 60)}, [nested(tuple, 60)], {"ema": nested(list, 40)}],
    ids=["header", "tuple", "list"],
)
def test_nesting_without_end_is_refused(content: Any, is_zip: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "deep.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="without end"):
        load_model(tmp_path / "deep.pt")


def test_keys_that_would_be_hashed_forever_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with a lower limit: such a key cannot be built to be saved."""
    monkeypatch.setattr(pickles, "ENTRIES", 10_000)
    for key in (nested(tuple, 16), tuple([tuple([(1, 2)] * 200)] * 200)):
        torch.save({key: 1}, tmp_path / "deep.pt")
        with pytest.raises(UserError, match="tuples nested without end"):
            pickles.check(tmp_path / "deep.pt")


def test_deep_dicts_are_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(200):
        content = {"a": content}
    torch.save(content, tmp_path / "deep.pt")
    with pytest.raises(UserError, match="nests its entries without end"):
        load_model(tmp_path / "deep.pt")


def test_many_small_objects_are_allowed(tmp_path: Path) -> None:
    history = {"losses": [float(i) for i in range(10_000)], "groups": [{"betas": (0.9, 0.999)}] * 100}
    torch.save({"history": history, "ema": {"a": torch.ones(1)}}, tmp_path / "x.pt")
    assert pickles.load(tmp_path / "x.pt")["history"] == history
