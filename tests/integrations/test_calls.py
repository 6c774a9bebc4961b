"""Calls of a model, recorded and replayed: the same arguments, a bounded number, and what cannot be recorded."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svdit.errors import UserError
from svdit.files import PREFIX, SUFFIX
from svdit.integrations.calls import Calls


class Model(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen: list[Any] = []

    def forward(self, x: Any, *more: Any, **options: Any) -> None:
        self.seen.append((x, *more, options))
        if isinstance(x, torch.Tensor):
            self.used(x)


def replayed(calls: Calls) -> list[Any]:
    model = Model()
    calls.loop(lambda: nullcontext(lambda done, total: None))(model)
    return model.seen


def test_calls_are_replayed_as_they_were(tmp_path: Path) -> None:
    model, calls = Model(), Calls(tmp_path, "a", 10)
    shared = torch.ones(10_000, 4)[:2]
    nested = {"a": [torch.arange(3), (1, 2.5)], "b": None, "size": torch.Size([2]), "dtype": torch.bfloat16, "s": "x"}

    def change() -> None:
        model(shared, "text", True, **nested)
        shared.zero_()

    calls.record(model, [change])
    assert calls.files()[0].stat().st_size < 10_000  # a view is stored without its base
    [(x, text, flag, options)] = replayed(calls)
    assert torch.equal(x, torch.ones(2, 4)) and text == "text" and flag is True
    assert torch.equal(options["a"][0], torch.arange(3)) and options["a"][1] == (1, 2.5)
    assert {key: options[key] for key in ("b", "size", "dtype", "s")} == {
        "b": None, "size": torch.Size([2]), "dtype": torch.bfloat16, "s": "x"
    }  # fmt: skip
    assert calls.reached == ["used"] and not model._forward_pre_hooks and not model.used._forward_pre_hooks


def test_a_sample_of_the_calls_is_kept(tmp_path: Path) -> None:
    """Every call with the same probability: the mean number is that of all, within 5 standard errors."""
    numbers = []
    for seed in range(30):
        model, calls = Model(), Calls(tmp_path / str(seed), "a", 5)
        calls.record(model, [lambda i=i, model=model: model(torch.full((1, 4), float(i))) for i in range(40)], seed)
        assert len(calls.files()) == 5
        numbers += [float(x[0, 0]) for x, _ in replayed(calls)]
    assert len({*numbers}) > 30
    error = (40**2 - 1) ** 0.5 / 12**0.5 / len(numbers) ** 0.5
    assert abs(sum(numbers) / len(numbers) - 19.5) < 5 * error


def test_a_finished_recording_is_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls(tmp_path, "a", 3)
    assert not calls.load()
    calls.record(model := Model(), [lambda: model(torch.ones(1, 4))])
    again = Calls(tmp_path, "a", 3)
    assert again.load() and again.reached == ["used"]
    with pytest.raises(UserError, match="is from a run with other settings or another version; delete it"):
        Calls(tmp_path, "b", 3).load()
    content = bytearray(calls.files()[0].read_bytes())
    content[len(content) // 2] ^= 1
    calls.files()[0].write_bytes(content)
    assert not again.load() and "is damaged; the calls are recorded again" in capsys.readouterr().err
    (tmp_path / "calls.json").write_text("{")
    assert not again.load() and "is damaged" in capsys.readouterr().err
    (tmp_path / "00007.pt").touch()  # of an interrupted run that kept more calls
    (tmp_path / f"{PREFIX}killed{SUFFIX}").mkdir()
    calls.record(model, [lambda: model(torch.ones(1, 4))])
    assert len(replayed(calls)) == 1
    calls.remove()
    assert not tmp_path.exists()


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    calls, model = Calls(tmp_path, "a", 3), Model()
    with pytest.raises(UserError, match="passes a Generator to its Model, which cannot be recorded"):
        calls.record(model, [lambda: model(torch.ones(1, 4), cache=torch.Generator())])
    with pytest.raises(UserError, match="the pipeline never called its Model; choose another component"):
        calls.record(model, [lambda: None])
    assert not calls.load()
