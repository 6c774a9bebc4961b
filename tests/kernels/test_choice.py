"""Which instruction set is chosen: by time, the same in every process, overridden by the environment."""

import json
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from svdit.errors import UserError
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.cpu.choice import TORCH, Choice

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing())
ISAS = ffi.isas()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no override."""
    for name in ("SVDIT_ISA", "SVDIT_ATTENTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "cache_folder", lambda: tmp_path)
    choice.choice.cache_clear()
    yield tmp_path
    choice.choice.cache_clear()


def test_the_fastest_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choice.choice()
    assert first.linears in ISAS
    assert first.attention in (*ISAS, TORCH)
    (path,) = cache.glob("choice-*.json")
    assert json.loads(path.read_text()) == {"linears": first.linears, "attention": first.attention}
    path.write_text(json.dumps({"linears": ISAS[-1], "attention": TORCH}))
    choice.choice.cache_clear()
    monkeypatch.setattr(choice, "fastest", pytest.fail)
    assert choice.choice() == Choice(ISAS[-1], TORCH)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"linears": "sse9", "attention": "torch"}'])
def test_a_choice_that_cannot_be_followed_is_measured_again(
    text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "fastest", lambda isas: Choice(isas[-1], isas[-1]))
    choice.choice()
    (path,) = cache.glob("choice-*.json")
    path.write_text(text)
    choice.choice.cache_clear()
    assert choice.choice() == Choice(ISAS[-1], ISAS[-1])
    assert json.loads(path.read_text()) == {"linears": ISAS[-1], "attention": ISAS[-1]}


def test_another_library_or_processor_has_its_own_choice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "fastest", lambda isas: Choice(isas[0], TORCH))
    for count, name in enumerate(("choice", "processor", "source_hash"), 1):
        if name != "choice":
            monkeypatch.setattr(choice, name, lambda: "another")
        choice.choice.cache_clear()
        choice.choice()
        assert len(list(cache.glob("choice-*.json"))) == count, name


def test_concurrent_processes_agree(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would choose something else; the first one's choice is everybody's."""

    def slow(isas: list[str]) -> Choice:
        time.sleep(0.3)
        return Choice(isas[0], isas[0] if os.getpid() % 2 else TORCH)

    monkeypatch.setattr(choice, "fastest", slow)
    children = []
    for n in range(4):
        if (child := os.fork()) == 0:
            (cache / f"seen{n}").write_text(str(choice.choice()))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len({path.read_text() for path in cache.glob("seen*")}) == 1


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise choice.MissingKernelsError

    monkeypatch.setattr(choice, "fastest", lambda isas: Choice(isas[0], TORCH))
    monkeypatch.setattr(choice, "cache_folder", nowhere)
    assert choice.choice() == Choice(ISAS[0], TORCH)


def test_the_environment_overrides(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "fastest", lambda isas: Choice(isas[0], isas[0]))
    monkeypatch.setenv("SVDIT_ATTENTION", TORCH)
    assert choice.choice() == Choice(ISAS[0], TORCH)
    assert choice.attention_kernels() is None
    assert choice.attention_dtype() == torch.float32
    assert str(choice.choice()) == f"{ISAS[0]}, attention torch"
    monkeypatch.setenv("SVDIT_ISA", ISAS[-1])
    choice.choice.cache_clear()
    assert choice.choice() == Choice(ISAS[-1], TORCH)
    monkeypatch.delenv("SVDIT_ATTENTION")
    choice.choice.cache_clear()
    assert choice.choice() == Choice(ISAS[-1], ISAS[-1])
    assert str(choice.choice()) == ISAS[-1]


@pytest.mark.parametrize(("name", "value"), [("SVDIT_ISA", TORCH), ("SVDIT_ATTENTION", "sse9")])
def test_an_unknown_name_is_a_sentence(name: str, value: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is {value}, but this machine supports .*{ISAS[-1]}"):
        choice.choice()


FP32, BF16 = Choice("portable", TORCH), Choice("portable", "portable")  # types of attention


def test_the_least_time_wins_and_a_near_one_that_attends_in_fp32() -> None:
    assert choice.best({FP32: 2.0, BF16: 1.0}) == BF16
    assert choice.best({FP32: 0.95, BF16: 0.99}) == FP32
    assert choice.best({FP32: 0.94, Choice(TORCH, TORCH): 0.945, BF16: 0.985}) == Choice(TORCH, TORCH)
    assert choice.best({FP32: 0.93, Choice(TORCH, TORCH): 0.95, BF16: 0.985}) == FP32


def test_attention_of_torch_has_to_be_much_faster() -> None:
    """In a model it takes up to 12 % longer than in the block that is timed."""
    assert choice.best({FP32: 0.96, BF16: 0.97}) == BF16


def test_pairs_without_hope_run_once_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    other = Choice(TORCH, TORCH)
    runs = {FP32: 0, other: 0, BF16: 0}

    def trial(pair: Choice, seconds: float) -> choice.Trial:
        def run() -> None:
            runs[pair] += 1
            clock[0] += seconds

        return run

    monkeypatch.setattr(choice.time, "perf_counter", lambda: clock[0])
    seconds = {FP32: 1.0, other: 1.25, BF16: 1.75}
    assert choice.timed({pair: trial(pair, each) for pair, each in seconds.items()}) == seconds
    assert runs == {FP32: 1 + choice.ROUNDS, other: 1 + choice.ROUNDS, BF16: 2}


def test_measurements_are_repeated_until_two_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else runs during the first two."""
    taken: list[dict[Choice, float]] = []
    busy = [{FP32: 2.5, BF16: 2.0}, {FP32: 1.5, BF16: 2.0}]

    def timed(trials: dict[Choice, choice.Trial]) -> dict[Choice, float]:
        taken.append(busy[len(taken)] if len(taken) < len(busy) else {FP32: 1.0, BF16: 2.0})
        return {pair: taken[-1][pair] for pair in trials}

    monkeypatch.setattr(choice, "timed", timed)
    trials = {FP32: lambda: None, BF16: lambda: None}
    assert choice.settled(trials) == FP32 and len(taken) == 3
    busy[:] = [dict(zip((FP32, BF16) if n % 2 else (BF16, FP32), (9.0 - n, 9.5 - n), strict=True)) for n in range(8)]
    taken.clear()
    choice.settled(trials)
    assert len(taken) == choice.REPEATS  # it ends although no two agree


def test_every_pair_computes_a_block() -> None:
    """Attention raises where it cannot read what the layers write."""
    layers = {isa: choice.trial_layers(ffi.kernels(isa)) for isa in (ISAS[0], "portable")}
    for pair in (Choice(*names) for names in product(layers, (*layers, TORCH))):
        choice.block_trial(layers[pair.linears], pair)()
