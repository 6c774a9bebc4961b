"""A world of one, and worlds of two and three real processes over gloo."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import free_port, in_world

from svdit import distributed
from svdit.distributed import (
    Counter,
    all_sum,
    barrier,
    check_shared,
    claimed,
    gather,
    on_first,
    rank,
    session,
    shard,
    world_size,
)
from svdit.errors import UserError


def everything() -> tuple[Any, ...]:
    barrier()
    total = all_sum(torch.tensor([1.0, rank()], dtype=torch.float64))
    return rank(), world_size(), list(shard(7)), total.tolist(), gather({"rank": rank()})


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_indices_and_agree_on_sums(world: int):
    found = in_world(world, everything)
    ranks = list(range(world))
    assert [each[0] for each in found] == ranks
    assert {each[1] for each in found} == {world}
    assert sorted(i for each in found for i in each[2]) == list(range(7))  # none twice, none missing
    for each in found:
        assert each[3] == [world, sum(ranks)]
        assert each[4] == [{"rank": i} for i in ranks]


def test_one_process_needs_no_session():
    assert (rank(), world_size(), list(shard(3)), gather("x")) == (0, 1, [0, 1, 2], ["x"])
    assert all_sum(torch.ones(2)).tolist() == [1, 1]
    barrier()


def one_fails() -> tuple[int, str]:
    calls: list[int] = []

    def refuse() -> None:
        raise UserError("another process is writing")

    value = on_first(lambda: calls.append(rank()) or 7)
    with pytest.raises(UserError) as caught:
        on_first(refuse)
    assert calls == ([0] if rank() == 0 else [])
    return value, str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_every_process_gets_the_first_ones_result_or_error(world: int):
    assert in_world(world, one_fails) == [(7, "another process is writing")] * world


def claims() -> tuple[list[int], list[int], int]:
    """Of two rounds; the first process takes part in the second one after the others have finished it."""
    first = list(claimed(7))
    barrier()
    second: list[int] = []
    finished = Counter()
    if rank() > 0:
        second = list(claimed(5))
    else:
        claims = claimed(5)
        while finished.add(0) < world_size() - 1:
            pass
        second = list(claims)
    finished.add(1)
    barrier()
    return first, second, finished.add(0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_claimed_numbers_go_to_those_who_have_time(world: int):
    found = in_world(world, claims)
    for numbers, count in (([each[0] for each in found], 7), ([each[1] for each in found], 5)):
        assert sorted(n for mine in numbers for n in mine) == list(range(count))
    assert found[0][1] == ([] if world > 1 else list(range(5)))
    assert {each[2] for each in found} == {world}


@pytest.mark.parametrize("unset", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_refused(unset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(unset)
    with pytest.raises(UserError, match=f"WORLD_SIZE is set, but {unset} is not"), session():
        pass


def test_a_folder_that_hosts_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "LATE", 0.2)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "manifest.json").write_text("new")
    (tmp_path / "1").mkdir()

    def check(other: str) -> str:
        monkeypatch.setattr("socket.gethostname", lambda: f"host{rank()}")
        with pytest.raises(UserError) as caught:
            check_shared(tmp_path / (other if rank() else "0") / "manifest.json")
        return str(caught.value)

    (tmp_path / "1" / "manifest.json").write_text("of an earlier run")
    for other in ("1", "2"):
        for message in in_world(2, partial(check, other)):
            assert "manifest.json is not the same file on host1; choose a folder that all hosts share" in message


def test_a_shared_folder_may_be_late(tmp_path: Path) -> None:
    """As on NFS."""
    path, late = tmp_path / "manifest.json", tmp_path / "late.json"
    path.write_text("new")

    def check() -> bool:
        if rank():
            threading.Timer(0.5, late.write_text, ["new"]).start()
        check_shared(late if rank() else path)
        return True

    assert in_world(2, check) == [True, True]
