"""Where weights are searched, the message when they are missing, and which files are refused."""

from pathlib import Path

import pytest
import torch

from svdit.errors import UserError
from svdit.evaluation import weights
from svdit.evaluation.weights import NAMES, VARIABLE, find_weights, load_weights
from svdit.files import sha256

from .conftest import Touch


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_message_names_the_places_and_the_alternatives(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        find_weights(None, tmp_path / "cache")
    for part in (str(tmp_path / "cache"), "hub/checkpoints", "curl -LO", NAMES[0], VARIABLE, "--paired_dir", "random"):
        assert part in str(caught.value)


def test_a_named_file_must_exist(tmp_path: Path):
    with pytest.raises(UserError, match=r"no Inception weights file .*missing\.pth"):
        find_weights(tmp_path / "missing.pth", tmp_path)


def test_download_only_on_request_and_only_of_the_known_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = tmp_path / "content"
    content.write_bytes(b"other")
    monkeypatch.setattr(weights, "URL", content.as_uri())
    with pytest.raises(UserError, match=r"content of file://.* is damaged .*pass --feature-extractor-weights"):
        find_weights(None, tmp_path / "cache", download=True)
    assert not list((tmp_path / "cache").glob("*.pth"))
    monkeypatch.setattr(weights, "SHA256", sha256(content))
    assert find_weights(None, tmp_path / "cache", download=True) == tmp_path / "cache" / NAMES[0]
    assert (tmp_path / "cache" / NAMES[0]).read_bytes() == b"other"


def test_state_is_loaded_with_the_files_hash(tmp_path: Path):
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
    with pytest.raises(UserError, match=r"w\.pth.*(cannot be read as a weights file|does not contain a state dict)"):
        load_weights(path)
    assert not trace.exists()


def test_the_known_hash_is_the_one_in_the_file_name():
    assert weights.SHA256[:8] in NAMES[0]
    assert weights.SHA256[:8] in NAMES[1]
