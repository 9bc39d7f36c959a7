"""Best evaluation and patience."""

from __future__ import annotations

import math

from finetune.early_stopping import EarlyStopping


def test_the_best_step_is_the_first_with_the_highest_score() -> None:
    stopping = EarlyStopping(patience=None)
    assert [stopping.update(step, score) for step, score in [(0, 0.1), (10, 0.3), (20, 0.3), (30, 0.2)]] == [
        True,
        True,
        False,
        False,
    ]
    assert (stopping.best_step, stopping.best) == (10, 0.3)
    assert not stopping.should_stop


def test_it_stops_after_that_many_evaluations_without_a_new_best() -> None:
    stopping = EarlyStopping(patience=2)
    told = []
    for step, score in [(0, 0.1), (10, 0.3), (20, 0.2), (30, 0.25)]:
        stopping.update(step, score)
        told.append(stopping.should_stop)
    assert told == [False, False, False, True]


def test_a_run_that_only_gets_worse_stops_too_but_not_for_its_start() -> None:
    stopping = EarlyStopping(patience=1)
    stopping.update(0, 0.5)
    assert not stopping.should_stop
    stopping.update(10, 0.4)
    assert stopping.should_stop
    assert stopping.best_step == 0


def test_a_gain_below_the_least_one_is_no_new_best() -> None:
    stopping = EarlyStopping(patience=None, min_gain=0.01)
    stopping.update(0, 0.50)
    assert not stopping.update(1, 0.505)
    assert stopping.update(2, 0.511)


def test_a_score_that_is_not_a_number_is_never_the_best() -> None:
    stopping = EarlyStopping(patience=1)
    assert not stopping.update(5, math.nan)
    assert stopping.best_step is None
    assert stopping.should_stop


def test_a_restored_record_goes_on_as_the_unbroken_one_would() -> None:
    stopping = EarlyStopping(patience=2)
    for step, score in [(0, 0.1), (10, 0.3), (20, 0.2)]:
        stopping.update(step, score)
    again = EarlyStopping(patience=2)
    again.restore(stopping.state())
    again.update(30, 0.1)
    assert again.should_stop
    assert (again.best_step, again.best, again.history[-1]) == (10, 0.3, (30, 0.1))
