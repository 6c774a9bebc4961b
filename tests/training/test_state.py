"""A run's file: all of it comes back, or one sentence says why not."""

import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.training.state import State, fresh, restore_, save


def stepped(model: DiT) -> State:
    state = fresh(model, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.step, state.seconds = 7, 1.5
    return state


def test_everything_comes_back(tiny: DiT, tmp_path: Path) -> None:
    state = stepped(tiny)
    save(state, tmp_path / "last.pt", {"lr": 0.1})
    other = fresh(DiT(tiny.config), lr=0.1)
    restore_(other, tmp_path / "last.pt", {"lr": 0.1})
    assert (other.step, other.seconds) == (7, 1.5)
    for a, b in ((state.model, other.model), (state.ema, other.ema)):
        assert all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())
    moments = [s.optimizer.state_dict()["state"][0]["exp_avg"] for s in (state, other)]
    assert torch.equal(*moments)
    assert not torch.equal(state.model.y_embedder.embedding_table.weight, state.ema.y_embedder.embedding_table.weight)


def test_other_options_and_broken_files_are_refused(tiny: DiT, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state = stepped(tiny)
    save(state, path, {"lr": 0.1, "seed": 3})
    with pytest.raises(UserError, match=r"last\.pt was trained with seed 3, not 4"):
        restore_(state, path, {"lr": 0.1, "seed": 4})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum; move it away"):
        restore_(state, path, {"lr": 0.1, "seed": 3})
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match="move it away to start again"):
        restore_(state, path, {"lr": 0.1, "seed": 3})
    torch.save({"model": Fraction(1)}, path)
    with pytest.raises(UserError, match=r"contains pickled objects other than tensors .*fractions.* not loaded; move"):
        restore_(state, path, {"lr": 0.1, "seed": 3})


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"model": {}},
        {"epoch": 3, "state_dict": {"w": torch.ones(2)}},
        {"model": OrderedDict(), "ema": OrderedDict(), "opt": {}, "step": "7", "seconds": 1.5, "binding": {}},
    ],
)
def test_a_file_of_another_program_is_one_sentence(tiny: DiT, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt was not written by `svdit train`; choose another folder"):
        restore_(fresh(tiny, lr=0.1), tmp_path / "last.pt", {})


@pytest.mark.parametrize("part", ["model", "opt"])
def test_tensors_that_do_not_fit_are_one_sentence(tiny: DiT, tmp_path: Path, part: str) -> None:
    state = stepped(tiny)
    save(state, tmp_path / "last.pt", {})
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    content[part].pop(next(iter(content[part])))
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt does not fit the model"):
        restore_(state, tmp_path / "last.pt", {})


def test_a_file_that_unpacks_to_more_than_it_has_is_refused(tiny: DiT, tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(2**20)}, tmp_path / "plain.pt")
    source, target = zipfile.ZipFile(tmp_path / "plain.pt"), tmp_path / "last.pt"
    with source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(UserError, match=r"has compressed tensors .*; move it away"):
        restore_(stepped(tiny), tmp_path / "last.pt", {})
