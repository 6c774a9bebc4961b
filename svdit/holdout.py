"""Marks inputs that calibration keeps for the reported errors only.

def loop(model):
    for x in batches:
        model(x)
    with held_out():
        model(x_of_other_images)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_MARKED = ContextVar("_MARKED", default=False)


@contextmanager
def held_out() -> Iterator[None]:
    """Within it, a forward loop shows inputs that errors are reported on; no statistic and no choice uses them."""
    token = _MARKED.set(True)
    try:
        yield
    finally:
        _MARKED.reset(token)


def is_held_out() -> bool:
    """Whether the running code is within `held_out`."""
    return _MARKED.get()
