"""A stream that can be cancelled while it waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from ui.streams import EventLoopThread


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    thread = EventLoopThread()
    yield thread
    thread.close()


async def counting(cancelled: threading.Event, *, pause: float = 0.0, last: int = 3) -> AsyncIterator[int]:
    try:
        for number in range(last):
            await asyncio.sleep(pause)
            yield number
    except asyncio.CancelledError:
        cancelled.set()
        raise


def test_pieces_come_in_order_and_end(loop: EventLoopThread) -> None:
    assert list(loop.iterate(counting(threading.Event()), threading.Event())) == [0, 1, 2]


def test_stopping_cancels_what_it_waits_for(loop: EventLoopThread) -> None:
    cancelled, stop = threading.Event(), threading.Event()
    stream = loop.iterate(counting(cancelled, pause=60), stop)
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    assert list(stream) == []
    assert cancelled.wait(5)
    assert time.monotonic() - started < 10


def test_closing_the_iterator_cancels_too(loop: EventLoopThread) -> None:
    cancelled = threading.Event()
    stream = loop.iterate(counting(cancelled, pause=0.01, last=10**9), threading.Event())
    assert next(stream) == 0
    stream.close()
    assert cancelled.wait(5)


def test_an_exception_reaches_the_caller_after_the_pieces_before_it(loop: EventLoopThread) -> None:
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise ValueError("broken")

    stream = loop.iterate(failing(), threading.Event())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_a_stream_that_was_stopped_before_it_began_yields_nothing(loop: EventLoopThread) -> None:
    stop = threading.Event()
    stop.set()
    assert list(loop.iterate(counting(threading.Event()), stop)) == []


def test_streams_share_one_loop_so_that_connections_last(loop: EventLoopThread) -> None:
    async def running() -> AsyncIterator[asyncio.AbstractEventLoop]:
        yield asyncio.get_running_loop()

    first, second = (next(iter(loop.iterate(running(), threading.Event()))) for _ in range(2))
    assert first is second


def test_closing_the_loop_cancels_what_still_runs(loop: EventLoopThread) -> None:
    cancelled = threading.Event()
    stream = loop.iterate(counting(cancelled, pause=0.01, last=10**9), threading.Event())
    assert next(stream) == 0
    loop.close()
    assert cancelled.wait(5)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_closing_a_loop_in_which_nothing_runs_any_more_is_silent() -> None:
    thread = EventLoopThread()
    assert list(thread.iterate(counting(threading.Event()), threading.Event())) == [0, 1, 2]
    (running,) = [other for other in threading.enumerate() if other.name == "answers"]
    thread.close()
    running.join(5)
    assert not running.is_alive()
