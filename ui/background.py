"""Work on a thread of its own, watched from the page."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

TICK_S = 0.05

T = TypeVar("T")


class Background(Generic[T]):
    """Work on a thread of its own. Iterating yields what it reports, and None whenever it has been silent for a tick,

    so that the page can stop, or paint what it has, while a model is still busy with its next word.
    """

    def __init__(self, work: Callable[[Callable[[T], None]], None]) -> None:
        self._reports: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        executor = ThreadPoolExecutor(1, thread_name_prefix="ragproj-page")
        self._future = executor.submit(work, self._reports.put)
        self._future.add_done_callback(lambda _: self._reports.put(_End()))
        executor.shutdown(wait=False)

    def __iter__(self) -> Iterator[T | None]:
        """What the work reports, in order, until it ends."""
        while True:
            try:
                report = self._reports.get(timeout=TICK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(report, _End):
                return
            yield report

    def error(self) -> BaseException | None:
        """What the work ended with; call it after the iteration."""
        return self._future.exception()


class _End:
    """The last thing in the queue."""
