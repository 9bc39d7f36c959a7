"""EmbedderChange: one change of embedder at a time, on a thread of its own that outlives the page that started it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from chains.ingestion import StoppedError
from ui.views import Problem

Report = Callable[[int, int], None]
Work = Callable[[Report, threading.Event], None]


class EmbedderChange:
    """The change in progress, or how the last one ended. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self.progress: tuple[int, int] = (0, 0)
        """chunks that have a vector, chunks in all"""
        self.problem: Problem | None = None
        """why the last one failed; None where it did not"""
        self.stopped = False
        """whether the last one was stopped before its end"""

    @property
    def running(self) -> bool:
        """Whether one is in progress."""
        return not self._idle.is_set()

    @property
    def stopping(self) -> bool:
        """Whether the one in progress was asked to end."""
        return self.running and self._stop.is_set()

    def start(self, work: Work) -> None:
        """Begin; does nothing while one is in progress.

        Args:
            work: called with where to report progress, and with the event that is set to stop it.
        """
        with self._lock:
            if self.running:
                return
            self._idle.clear()
            self._stop = threading.Event()
            self.progress, self.problem, self.stopped = (0, 0), None, False
        executor = ThreadPoolExecutor(1, thread_name_prefix="reembed")
        executor.submit(work, self._report, self._stop).add_done_callback(self._end)
        executor.shutdown(wait=False)

    def stop(self) -> None:
        """Ask the one in progress to end after its batch; what it has made stays for the next one."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return when none is in progress, or after so many seconds; whether none is."""
        return self._idle.wait(timeout_s)

    def _report(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def _end(self, ended: Future[None]) -> None:
        error = ended.exception()
        self.stopped = isinstance(error, StoppedError)
        self.problem = None if error is None or self.stopped else Problem.of_error(error)
        self._idle.set()
