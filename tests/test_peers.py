"""Two processes of one run: one error, printed once; nobody waits for a process that is dead, frozen or failed.

They are forked here, with the store that torchrun's agent has; tests/cli/test_sample_ddp.py uses torchrun itself.
"""

import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pixels import saved
from worlds import Run, agent_store, free_port

from svdit import peers, restarts
from svdit.cli import command
from svdit.cli.signals import ending
from svdit.distributed import barrier, rank, session
from svdit.errors import UserError, sentence


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds of silence are a frozen process."""
    monkeypatch.setattr(peers, "INTERVAL", 0.1)
    monkeypatch.setattr(peers, "FROZEN", 20)
    monkeypatch.setattr(peers, "PATIENCE", 1.0)
    monkeypatch.setattr(peers, "TOGETHER", 2.0)


def ours(lines: list[str]) -> list[str]:
    """Without those of torch."""
    return [line for line in lines if line.startswith("svdit")]


MISTAKES = {
    "a usage error": "--num-fid-samples none",
    "an error before the processes join": "--num-sampling-steps ddim300",
    "a missing checkpoint": "--ckpt missing.safetensors",
    "a folder that cannot be written": "--sample-dir tiny.safetensors",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_printed_once_and_all_exit_with_code_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "tiny.safetensors")
    argv = ["--ckpt", "tiny.safetensors", "--num-fid-samples", "2", "--num-sampling-steps", "2", "--device", "cpu"]
    codes, lines = Run(lambda: command("generate", [*argv, *MISTAKES[mistake].split()]), tmp_path).end()
    assert codes == [2, 2]
    assert len(lines) == 1
    assert lines[0].startswith("svdit generate: ")


def test_a_process_that_fails_prints_although_torchrun_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun terminates the others when the first one exits."""
    genuine = peers.write_error

    def slowly(line: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        genuine(line)

    def work() -> None:
        with ending():
            peers.fail("svdit: broken")

    monkeypatch.setattr(peers, "write_error", slowly)
    codes, lines = Run(work, tmp_path).end()
    assert (codes, lines) == ([2, 2], ["svdit: broken"])


def test_nobody_exits_before_one_that_still_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun would terminate it: `session` counts a failure before it leaves the process group."""

    def work() -> None:
        if os.environ["RANK"] == "0":
            peers.first_to_fail()
            time.sleep(0.5)
            (tmp_path / "clean").touch()
        peers.fail("svdit: broken")

    def exit_now() -> None:
        assert (tmp_path / "clean").exists()
        os._exit(2)

    monkeypatch.setattr(peers, "exit_now", exit_now)
    codes, lines = Run(work, tmp_path).end()
    assert (codes, lines) == ([2, 2], ["svdit: broken"])


def in_session(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        try:
            with session(torch.device("cpu")):
                barrier()
                work()
                barrier()
        except Exception as error:
            peers.fail(f"svdit: {sentence(error)}")

    return run


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_the_others(failing: int, tmp_path: Path) -> None:
    def work() -> None:
        if rank() == failing:
            raise UserError(f"process {failing} cannot write")

    codes, lines = Run(in_session(work), tmp_path).end()
    assert codes == [2, 2]
    assert ours(lines) == [f"svdit: process {failing} cannot write"]


def test_the_others_wait_for_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that has failed and cleans up for longer than they wait otherwise."""

    def work() -> None:
        if rank() == 1:
            monkeypatch.setattr("svdit.distributed.gc.collect", lambda: time.sleep(3 * peers.PATIENCE))
            raise UserError("process 1 cannot write")

    run = Run(in_session(work), tmp_path)
    run.members[0].join(60)
    run.kill(1, signal.SIGKILL)  # as torchrun does when a process ends
    assert ours(run.end()[1]) == ["svdit: process 1 cannot write"]


@pytest.mark.parametrize(("lost", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_nobody_waits_for_a_process_that_is_dead_or_frozen(lost: int, number: signal.Signals, tmp_path: Path) -> None:
    def work() -> None:
        if rank() == lost:
            (tmp_path / "working").touch()
            time.sleep(30)

    run = Run(in_session(work), tmp_path)
    while not (tmp_path / "working").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    run.kill(lost, number)
    run.members[1 - lost].join(30)
    run.kill(lost, signal.SIGKILL)
    codes, lines = run.end()
    assert codes[1 - lost] == 2
    assert codes[lost] == -signal.SIGKILL
    problem = "connection to another process of this run failed" if number == signal.SIGKILL else f"process {lost} of 2"
    assert len(ours(lines)) == 1 and problem in ours(lines)[0]


@pytest.mark.slow
def test_slow_work_and_a_suspended_run_are_neither(tmp_path: Path) -> None:
    """One process works longer than a frozen one may be silent; then both are stopped for as long, and continue."""

    def work() -> None:
        if rank() == 0:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                sum(range(1000))
            (tmp_path / "worked").touch()
            time.sleep(1)

    run = Run(in_session(work), tmp_path)
    while not (tmp_path / "worked").exists():
        time.sleep(0.05)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        run.kill(0, number)
        run.kill(1, number)
        time.sleep(2.5)
    codes, lines = run.end()
    assert (codes, ours(lines)) == ([0, 0], [])


def test_a_restart_reads_nothing_of_the_processes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have left their addresses, their counts and their failure in the store that torchrun keeps."""

    def work() -> None:
        raise UserError("a failure")

    store = agent_store()
    assert Run(in_session(work), tmp_path, store).end()[0] == [2, 2]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    codes, lines = Run(in_session(lambda: None), tmp_path, store).end()
    assert (codes, ours(lines)) == ([0, 0], ["svdit: a failure"])


def test_without_a_store_of_torchrun_the_first_process_may_start_late(tmp_path: Path) -> None:
    """Later than a frozen one may be silent. The agents of different hosts count their restarts differently."""
    port = free_port()

    def run() -> None:
        place = int(os.environ["RANK"])
        os.environ.update(
            MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False", TORCHELASTIC_RESTART_COUNT=str(place)
        )
        time.sleep(3.0 * (place == 0))
        in_session(lambda: time.sleep(0.5))()

    codes, lines = Run(run, tmp_path).end()
    assert (codes, ours(lines)) == ([0, 0], [])


def test_a_frozen_first_process_has_the_store(tmp_path: Path) -> None:
    port = free_port()

    def work() -> None:
        if rank() == 0:
            (tmp_path / "working").touch()
            time.sleep(30)

    def run() -> None:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        in_session(work)()

    run_ = Run(run, tmp_path)
    while not (tmp_path / "working").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    run_.kill(0, signal.SIGSTOP)
    run_.members[1].join(30)
    run_.kill(0, signal.SIGKILL)
    codes, lines = run_.end()
    assert codes == [-signal.SIGKILL, 2]
    assert ours(lines) == [
        "svdit: the first process of this run is gone; see its messages, then run the same command again"
    ]


def test_where_a_host_leaves_torchrun_ends_the_others_without_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although they have lost a connection by then."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(peers, "PATIENCE", 60.0)
    genuine = peers.await_termination

    def await_termination() -> None:
        (tmp_path / "lost").touch()
        genuine()

    monkeypatch.setattr("svdit.distributed.await_termination", await_termination)

    def work() -> None:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with ending():
            in_session(work)()

    run_ = Run(run, tmp_path)
    while run_.members[0].is_alive() and not (tmp_path / "lost").exists():
        time.sleep(0.05)
    run_.kill(0, signal.SIGTERM)
    codes, lines = run_.end()
    assert (codes, ours(lines)) == ([128 + signal.SIGTERM, -signal.SIGKILL], [])


def test_a_process_whose_torchrun_was_killed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    context = multiprocessing.get_context("fork")
    alive, worker_alive = os.pipe()  # read to its end when the worker has ended

    def worker() -> None:
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        monkeypatch.setattr(restarts, "PARENT", os.getppid())
        with session():
            (tmp_path / "working").touch()
            time.sleep(60)

    def agent() -> None:
        context.Process(target=worker).start()
        time.sleep(60)

    process = context.Process(target=agent)
    process.start()
    os.close(worker_alive)
    while not (tmp_path / "working").exists():
        time.sleep(0.05)
    process.kill()
    assert select.select([alive], [], [], 30)[0]
    assert (tmp_path / "stderr").read_text() == "svdit: torchrun was killed; run the same command again\n"
