"""An asynchronous stream as a plain iterator that can be cancelled at any moment, also while it waits."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

T = TypeVar("T")

_LOOK_S = 0.05  # how often `stop` is looked at while nothing comes


def cancellable(pieces: AsyncIterator[T], stop: threading.Event) -> Iterator[T]:
    """The pieces, as they come; ends when they do, when `stop` is set, or when the caller closes the iterator.

    Ending early cancels the task that produces them. Its exceptions are raised here.
    """
    arrived: queue.Queue[T | _End] = queue.Queue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(_pump(pieces, arrived))
    thread = threading.Thread(target=_run, args=(loop, task), daemon=True, name="answer")
    thread.start()
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)


class _End:
    """The last thing in the queue."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


async def _pump(pieces: AsyncIterator[T], arrived: queue.Queue[T | _End]) -> None:
    try:
        async for piece in pieces:
            arrived.put(piece)
    except Exception as error:  # noqa: BLE001 handed on to the thread that asked, whatever it is
        arrived.put(_End(error))
    else:
        arrived.put(_End())


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    """Run the task to its end or cancellation, then what it left open in the loop."""
    try:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
