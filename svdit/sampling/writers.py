"""Threads that store batches while the next one is sampled."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from svdit.images import Pixels

THREADS = 2  # a batch of 32 images of 256 px takes half a second to encode


class Writers:
    """Calls `write(indices, pixels)` in threads; `submit` waits where they are too far behind, so memory is bounded.

    Leaving the context waits for all. An error of `write` is raised by the next `submit`, or at the end.
    """

    def __init__(self, write: Callable[[Sequence[int], Pixels], None]) -> None:
        self.write = write
        self.pool = ThreadPoolExecutor(THREADS)
        self.pending: deque[Future[None]] = deque()

    def submit(self, indices: Sequence[int], pixels: Pixels) -> None:
        """Store a batch, uint8 (N, H, W, 3)."""
        while self.pending and (len(self.pending) >= 2 * THREADS or self.pending[0].done()):
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self.write, indices, pixels))

    def __enter__(self) -> "Writers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown()
        if error is None:
            for future in self.pending:
                future.result()
