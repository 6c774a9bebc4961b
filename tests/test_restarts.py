"""What torchrun's variables say about restarts, and what is printed where a restart cannot work."""

import pytest

from svdit import restarts
from svdit.errors import sentence


def variables(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("done", "allowed", "advice"),
    [
        (0, 0, "see its message, then run the same command again"),
        (2, 3, "torchrun starts all processes again"),
        (3, 3, "see its message, then run the same command again"),
    ],
)
def test_the_advice_depends_on_the_restarts_left(
    done: int, allowed: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(monkeypatch, TORCHELASTIC_RESTART_COUNT=done, TORCHELASTIC_MAX_RESTARTS=allowed)
    message = sentence(RuntimeError("Connection closed by peer"))
    assert message and message.endswith(f"(Connection closed by peer); {advice}")


@pytest.mark.parametrize(
    ("allowed", "hosts", "shared", "lines"),
    [
        (0, 2, True, 0),  # no restarts: nothing to say
        (3, 1, True, 1),
        (3, 2, False, 1),
        (3, 2, True, 2),
    ],
)
def test_a_start_is_noted_and_a_shared_store_warned_of(
    allowed: int,
    hosts: int,
    shared: bool,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables(monkeypatch, TORCHELASTIC_MAX_RESTARTS=allowed, GROUP_WORLD_SIZE=hosts, WORLD_SIZE=2 * hosts)
    variables(monkeypatch, TORCHELASTIC_USE_AGENT_STORE=shared, TORCHELASTIC_RESTART_COUNT=1)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        restarts.announce()
    note = f"note: world size {2 * hosts}, hosts {hosts}; restart 1 of at most {allowed}"
    warning = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == lines
    assert all(part in line for part, line in zip((note, warning), printed, strict=False))
