"""Whether torchrun starts the processes again after one has ended: `--max-restarts`, 0 by default.

Its count is one agent's own: agents of several hosts may disagree, and hosts that join or leave do not change it.
"""

import os

from svdit.printing import note, warn

PARENT = os.getppid()  # torchrun, if it started this process


def allowed() -> int:
    """The restarts that torchrun was started with."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def done() -> int:
    """The restarts so far."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def left() -> int:
    """The restarts that torchrun may still do."""
    return allowed() - done()


def again(before: str) -> str:
    """How a run that ended early continues: with torchrun, or after the user has done what comes `before`."""
    return "torchrun starts all processes again" if left() else f"{before}, then run the same command again"


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def orphaned() -> bool:
    """Whether torchrun, which started this process, was killed since."""
    return under_torchrun() and os.getppid() != PARENT


def shares_store() -> bool:
    """Whether torchrun's store outlives the processes, with what they wrote; else every start has a new one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def announce() -> None:
    """Where there may be restarts, note how many processes start now, and warn where torchrun's will fail."""
    if not allowed() or os.environ["RANK"] != "0":
        return
    hosts = int(os.environ["GROUP_WORLD_SIZE"])
    note(f"world size {os.environ['WORLD_SIZE']}, hosts {hosts}; restart {done()} of at most {allowed()}")
    if hosts > 1 and shares_store():
        warn(
            "torchrun cannot restart processes on several hosts that share its store (pytorch issue 135712); start it "
            "on every host with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d"
        )
