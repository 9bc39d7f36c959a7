"""An asynchronous stream as a plain iterator that can be cancelled at any moment, also while it waits."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_LOOK_S = 0.05  # how often `stop` is looked at while nothing comes


class EventLoopThread:
    """One event loop in a thread of its own, started on first use.

    One for all streams of a service: a model's client keeps its connections open in the loop they were made in.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        """End the thread; streams that still run are cancelled."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    def iterate(self, pieces: AsyncIterator[T], stop: threading.Event) -> Iterator[T]:
        """The pieces, as they come; ends when they do, when `stop` is set, or when the caller closes the iterator.

        Ending early cancels the task that produces them. Its exceptions are raised here.
        """
        arrived: queue.Queue[T | _End] = queue.Queue()
        task = asyncio.run_coroutine_threadsafe(_pump(pieces, arrived), self._started())
        try:
            while not stop.is_set():
                try:
                    piece = arrived.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                if isinstance(piece, _End):
                    if piece.error is not None:
                        raise piece.error
                    return
                yield piece
        finally:
            task.cancel()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), daemon=True, name="answers").start()
            return self._loop


class _End:
    """The last thing in the queue."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


async def _pump(pieces: AsyncIterator[T], arrived: queue.Queue[T | _End]) -> None:
    end = _End()
    try:
        async for piece in pieces:
            arrived.put(piece)
    except Exception as error:  # noqa: BLE001 handed on to the thread that asked, whatever it is
        end = _End(error)
    finally:
        arrived.put(end)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped, then end what is left in it."""
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
