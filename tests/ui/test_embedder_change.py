"""EmbedderChange: one at a time, its progress, its three ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from chains.ingestion import StoppedError
from loaders.errors import RagProjError
from ui.embedder_change import EmbedderChange
from ui.views import Problem

Report = Callable[[int, int], None]


def failing(error: Exception) -> Callable[[Report, threading.Event], None]:
    def work(report: Report, stop: threading.Event) -> None:
        raise error

    return work


def until_stopped(report: Report, stop: threading.Event) -> None:
    report(3, 9)
    assert stop.wait(10)
    raise StoppedError


def test_nothing_runs_before_the_first_start() -> None:
    change = EmbedderChange()
    change.stop()
    assert change.wait(0)
    assert (change.running, change.stopping, change.stopped, change.problem) == (False, False, False, None)


def test_progress_is_what_the_work_reported_last() -> None:
    change = EmbedderChange()
    change.start(lambda report, stop: [report(done, 4) for done in range(5)] and None)
    assert change.wait(10)
    assert (change.progress, change.stopped, change.problem) == ((4, 4), False, None)


def test_a_second_start_does_nothing_while_the_first_is_in_progress() -> None:
    change, gate, ran = EmbedderChange(), threading.Event(), list[int]()

    def first(report: Report, stop: threading.Event) -> None:
        gate.wait(10)
        ran.append(1)

    change.start(first)
    change.start(lambda report, stop: ran.append(2))
    assert change.running
    gate.set()
    assert change.wait(10)
    assert ran == [1]


def test_stop_ends_it_and_the_next_one_starts_afresh() -> None:
    change = EmbedderChange()
    change.start(until_stopped)
    change.stop()
    assert change.wait(10)
    assert (change.stopped, change.problem, change.progress) == (True, None, (3, 9))
    change.start(lambda report, stop: None)
    assert change.wait(10)
    assert (change.stopped, change.stopping, change.progress) == (False, False, (0, 0))


def test_it_is_stopping_until_the_batch_in_hand_is_done() -> None:
    change, gate = EmbedderChange(), threading.Event()
    change.start(lambda report, stop: gate.wait(10) and None)
    assert not change.stopping
    change.stop()
    assert change.stopping
    assert not change.wait(0.05)
    gate.set()
    assert change.wait(10)
    assert not change.stopping


def test_a_failure_is_told_in_its_own_words() -> None:
    change = EmbedderChange()
    change.start(failing(RagProjError("磁盘已满", "the disk is full")))
    assert change.wait(10)
    assert change.problem == Problem("磁盘已满", "the disk is full")


def test_an_unexpected_failure_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    change = EmbedderChange()
    change.start(failing(ZeroDivisionError("secret")))
    assert change.wait(10)
    assert change.problem == Problem.of("internal_error")
    assert "secret" in caplog.text
