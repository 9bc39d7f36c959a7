"""A stream that can be cancelled while it waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from ui.streams import cancellable


async def counting(cancelled: threading.Event, *, pause: float = 0.0, last: int = 3) -> AsyncIterator[int]:
    try:
        for number in range(last):
            await asyncio.sleep(pause)
            yield number
    except asyncio.CancelledError:
        cancelled.set()
        raise


def test_pieces_come_in_order_and_end() -> None:
    assert list(cancellable(counting(threading.Event()), threading.Event())) == [0, 1, 2]


def test_stopping_cancels_what_it_waits_for() -> None:
    cancelled, stop = threading.Event(), threading.Event()
    stream = cancellable(counting(cancelled, pause=60), stop)
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    assert list(stream) == []
    assert cancelled.wait(5)
    assert time.monotonic() - started < 10


def test_closing_the_iterator_cancels_too() -> None:
    cancelled = threading.Event()
    stream = cancellable(counting(cancelled, pause=0.01, last=10**9), threading.Event())
    assert next(stream) == 0
    stream.close()
    assert cancelled.wait(5)


def test_an_exception_reaches_the_caller_after_the_pieces_before_it() -> None:
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise ValueError("broken")

    stream = cancellable(failing(), threading.Event())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_a_stream_that_was_stopped_before_it_began_yields_nothing() -> None:
    stop = threading.Event()
    stop.set()
    assert list(cancellable(counting(threading.Event()), stop)) == []
