"""kill -9 at any moment of ingest and sync: nothing committed is lost, and the rest can be resumed."""

from __future__ import annotations

import os
import shutil

import pytest
from trials import SMALL_FILES, Trial, check_versions, finished
from workshop import GATE_WORD, Home, Worker, article


@pytest.mark.slow
def test_ingest_killed_at_any_moment_keeps_every_committed_file_and_resumes(trial: Trial) -> None:
    trial.write_documents(1)
    names = sorted(str(path) for path in trial.docs.iterdir())
    after = trial.expected()

    def start(lane: Trial) -> Worker:
        return lane.nursery.start("ingest", kb=lane.kb, docs=lane.docs, done=lane.done)

    whole, seconds = trial.unbroken(start)

    def play(lane: Trial, moment: float) -> bool:
        done = lane.killed(start, moment)
        with Home(lane.kb, create=True) as home:
            assert home.problems() == [], moment
            check_versions(home, {}, after, names[: finished(done)])
        start(lane).succeed()
        lane.holds(whole, moment)
        return "end" not in done

    trial.at_every_moment("ingest", seconds, play)


@pytest.mark.slow
def test_sync_killed_at_any_moment_leaves_every_source_whole_and_resumes(trial: Trial) -> None:
    trial.write_documents(1)
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    before = trial.expected()
    trial.base()
    # half of the small files change, the other half disappear, some come
    trial.write_documents(2, files=range(0, SMALL_FILES, 2))
    for number in range(1, SMALL_FILES, 2):
        (trial.docs / f"{number:02}.txt").unlink()
    (trial.docs / "new.txt").write_text(article("new"), encoding="utf-8")
    names = sorted(str(path) for path in trial.docs.iterdir())
    shutil.rmtree(trial.folder / "elsewhere")
    after = trial.expected()

    def start(lane: Trial) -> Worker:
        return lane.nursery.start("ingest", kb=lane.kb, docs=lane.docs, done=lane.done, sync=True)

    whole, seconds = trial.unbroken(start)
    assert whole["texts"] == after

    def play(lane: Trial, moment: float) -> bool:
        done = lane.killed(start, moment)
        with Home(lane.kb) as home:
            assert home.problems() == [], moment
            check_versions(home, before, after, names[: finished(done)])
        start(lane).succeed()
        lane.holds(whole, moment)
        return "end" not in done

    trial.at_every_moment("sync", seconds, play)


def test_a_file_that_disappears_after_its_ingest_was_killed_is_forgotten_by_sync(trial: Trial) -> None:
    trial.docs.mkdir()
    (trial.docs / "kept.txt").write_text(article("kept"), encoding="utf-8")
    secret, gate = trial.docs / "secret.txt", trial.folder / "gate"
    secret.write_text(article("secret", 60) + GATE_WORD, encoding="utf-8")
    os.mkfifo(gate)
    worker = trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done, gate=gate)
    assert gate.read_text() == "reached"
    worker.kill()
    worker.wait()
    with Home(trial.kb) as home:
        assert home.kb._number("SELECT COUNT(*) FROM sources WHERE active = 0") == 1
    secret.unlink()
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done, sync=True).succeed()
    with Home(trial.kb) as home:
        assert home.kb._number("SELECT COUNT(*) FROM sources WHERE active = 0") == 0
        assert home.kb._number("SELECT COUNT(*) FROM contents") == 1
        assert home.problems() == []
