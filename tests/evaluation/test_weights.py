"""Where weights are looked for, what is said when they are nowhere, and what is refused."""

from pathlib import Path

import pytest
import torch

from svdit.errors import UserError
from svdit.evaluation import weights
from svdit.evaluation.weights import NAMES, VARIABLE, find_weights, load_weights
from svdit.files import sha256

from .conftest import Touch


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_order_is_path_variable_cache_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"
    hub = put(tmp_path / "torch" / "hub" / "checkpoints" / NAMES[1])
    assert find_weights(None, cache) == hub
    cached = put(cache / NAMES[0])
    assert find_weights(None, cache) == cached
    named = put(tmp_path / "named.pth")
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_weights(None, cache) == named
    given = put(tmp_path / "given.pth")
    assert find_weights(given, cache) == given


def test_nowhere_is_a_message_that_says_all(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        find_weights(None, tmp_path / "cache")
    for part in (str(tmp_path / "cache"), "hub/checkpoints", "curl -LO", NAMES[0], VARIABLE, "--paired_dir", "random"):
        assert part in str(caught.value)


def test_a_named_file_must_exist(tmp_path: Path):
    with pytest.raises(UserError, match=r"no Inception weights file .*missing\.pth"):
        find_weights(tmp_path / "missing.pth", tmp_path)


def test_download_happens_only_when_asked_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(url: str, target: str, hash_prefix: str) -> None:
        Path(target).write_bytes(b"half")
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(UserError, match=r"could not be fetched from https://.*: invalid hash value"):
        find_weights(None, tmp_path / "cache", download=True)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, target, hash_prefix: put(Path(target)))
    assert find_weights(None, tmp_path / "cache", download=True) == tmp_path / "cache" / NAMES[0]


def test_state_comes_with_the_files_hash(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    state, digest = load_weights(tmp_path / "w.pth")
    assert state["a"].tolist() == [1, 1]
    assert digest == sha256(tmp_path / "w.pth")


@pytest.mark.parametrize("how", ["text", "code", "no state dict"])
def test_foreign_and_malicious_files_are_refused_and_not_run(tmp_path: Path, how: str):
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    if how == "text":
        path.write_text("hello")
    elif how == "code":
        torch.save(Touch(trace), path)
    else:
        torch.save({"model": {"a": torch.ones(1)}}, path)
    with pytest.raises(UserError, match=r"w\.pth.*(cannot be read as a weights file|does not hold a state dict)"):
        load_weights(path)
    assert not trace.exists()


def test_the_known_hash_is_the_one_in_the_file_name():
    assert weights.SHA256[:8] in NAMES[0]
    assert weights.SHA256[:8] in NAMES[1]
