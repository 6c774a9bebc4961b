"""The early checksum is the one in the header, for every type; files that changed or are others have none."""

from pathlib import Path

import pytest
import torch

from svdit.checkpoints import io
from svdit.errors import UserError
from svdit.kernels.reference import SCALE_DTYPES
from svdit.storage import ahead

TENSORS = {"b": torch.arange(7, dtype=torch.float32), "a": torch.ones(2, 3, dtype=torch.int8), "c": torch.tensor(1.5)}


@pytest.fixture(autouse=True)
def _no_other_futures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "futures", {})


def written(path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    io.write(path, tensors, {"name": "Größe", "config": {"z": 1, "a": [0.1, None]}})
    return path


@pytest.mark.parametrize("batch", [0, 8, 1 << 20])
def test_the_digest_is_that_of_the_header(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "BATCH", batch)
    dtypes = [getattr(torch, name) for name in ahead.DTYPES.values()]
    tensors = {f"{i}": torch.zeros(3, i % 4, dtype=torch.float32).to(dtype) for i, dtype in enumerate(dtypes)}
    path = written(tmp_path / "a.safetensors", {**TENSORS, **tensors})
    header = io.read_header(path)
    assert header and ahead.digest(path) == header["sha256"]


def test_no_type_that_layers_have_is_left_out() -> None:
    stored = {"torch.int8", "torch.uint8", "torch.bfloat16", "torch.float32", *map(str, SCALE_DTYPES.values())}
    assert stored <= {f"torch.{name}" for name in ahead.DTYPES.values()}


def test_a_started_digest_is_used_and_finds_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.safetensors")
    ahead.start(path)
    ahead.start(path)  # once
    with monkeypatch.context() as patch:
        patch.setattr(io, "digest_of", lambda parts: pytest.fail("hashed twice"))
        with io.verified(path) as contents:
            assert contents.tensors["b"].equal(TENSORS["b"])
    assert not ahead.futures
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    ahead.start(path)
    with pytest.raises(UserError, match="does not match its checksum"), io.verified(path):
        pass


def test_a_file_that_changed_is_hashed_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    ahead.start(path)
    written(path, {"a": torch.zeros(50)})
    assert ahead.started(path) is None
    with io.verified(path) as contents:
        assert contents.tensors.keys() == {"a"}


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\xff" * 50, b"\x02" + b"\0" * 7 + b"{}", b"\x05" + b"\0" * 7 + b"[[[[["]
)
def test_other_files_have_no_digest(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert ahead.digest(path) is None


def test_other_formats_are_read_as_before(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt")
    for each in (path, tmp_path / "missing", tmp_path):
        ahead.start(each)
    assert len(ahead.futures) == 1
    with io.verified(path) as contents:
        assert contents.tensors["b"].equal(TENSORS["b"])
