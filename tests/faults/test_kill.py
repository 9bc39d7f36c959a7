"""kill -9 at any moment of ingest, sync, reembed and remove: nothing committed is lost, and the rest can be resumed."""

from __future__ import annotations

import os
import queue
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from workshop import GATE_WORD, SMALL_BATCH, Home, Nursery, SlowEmbeddings, Worker, article, lines_of, records

from chains.knowledge_base import FingerprintError

ROUNDS = 50  # of each of the four operations: 200 kills
LANES = 2  # rounds at once, each in a folder of its own: one is checked while another one's worker works
SMALL_FILES = 24


@dataclass
class Trial:
    """One operation over a copy of one knowledge base, again and again."""

    folder: Path
    nursery: Nursery
    lane: str = ""

    @property
    def docs(self) -> Path:
        return self.folder / "docs"

    @property
    def kb(self) -> Path:
        return self.folder / f"kb{self.lane}"

    @property
    def done(self) -> Path:
        return self.folder / f"done{self.lane}"

    @property
    def log(self) -> Path:
        return self.folder / f"embedded{self.lane}"

    def write_documents(self, version: int, *, files: range = range(SMALL_FILES)) -> None:
        """Small files, one long text and one file of many documents."""
        self.docs.mkdir(exist_ok=True)
        for number in files:
            (self.docs / f"{number:02}.txt").write_text(article(f"{number}-{version}"), encoding="utf-8")
        (self.docs / "long.txt").write_text(article(f"long-{version}", 80), encoding="utf-8")
        (self.docs / "many.jsonl").write_text(records(f"many-{version}", 100), encoding="utf-8")

    def base(self) -> None:
        """What is there now is what every round starts from."""
        if self.kb.exists():
            shutil.copytree(self.kb, self.folder / "base")

    def reset(self) -> None:
        shutil.rmtree(self.kb, ignore_errors=True)
        self.done.unlink(missing_ok=True)
        if (self.folder / "base").exists():
            shutil.copytree(self.folder / "base", self.kb)

    def expected(self) -> dict[str, list[str]]:
        """Texts by source, as an ingest of the documents stores them."""
        with Home(self.folder / "elsewhere", create=True) as home:
            assert not home.ingestor().ingest([self.docs]).failed
            return home.texts()

    def unbroken(self, start: Callable[[Trial], Worker], model: str = "one") -> tuple[dict[str, Any], float]:
        """What the operation leaves when nothing disturbs it, and how long it takes."""
        seconds = float("inf")
        for _ in range(3):  # the shortest: on a busy machine the others are longer than most rounds will be
            self.reset()
            started = time.monotonic()
            start(self).succeed()
            seconds = min(seconds, time.monotonic() - started)
        with Home(self.kb, SlowEmbeddings(model)) as home:
            assert home.problems() == []
            return home.picture(), seconds

    def killed(self, start: Callable[[Trial], Worker], after_s: float) -> list[str]:
        """Start over, kill the operation, and give what it had reported as done."""
        self.reset()
        worker = start(self)
        worker._ended.wait(after_s)
        worker.kill()
        assert worker.wait() in (0, -9), worker.complaint
        return lines_of(self.done)

    def at_every_moment(self, seed: str, seconds: float, play: Callable[[Trial, float], bool]) -> None:
        """Play a round for each moment, in a few lanes at once; more than a quarter must have been interrupted."""
        lanes: queue.SimpleQueue[Trial] = queue.SimpleQueue()
        for number in range(LANES):
            lanes.put(replace(self, lane=f"-{number}"))

        def play_somewhere(moment: float) -> bool:
            lane = lanes.get()
            try:
                return play(lane, moment)
            finally:
                lanes.put(lane)

        with ThreadPoolExecutor(LANES) as pool:
            interrupted = sum(pool.map(play_somewhere, moments(seed, seconds)))
        assert interrupted > ROUNDS / 4  # the duration varies with what else the machine does


@pytest.fixture
def trial(quick_folder: Path, nursery: Nursery) -> Trial:
    return Trial(quick_folder, nursery)


def moments(seed: str, seconds: float) -> list[float]:
    """Seconds after which to kill: one at random in each of ROUNDS equal parts of the duration and a bit beyond."""
    chance = random.Random(seed)
    return [1.05 * seconds * (number + chance.random()) / ROUNDS for number in range(ROUNDS)]


def finished(done: list[str]) -> int:
    """Files that a killed ingest had reported as committed."""
    return max((int(line) for line in done if line != "end"), default=0)


def check_versions(home: Home, before: dict[str, list[str]], after: dict[str, list[str]], committed: list[str]) -> None:
    """Every source is wholly of before or of after, and of after where it was reported so."""
    found = home.texts()
    for source in before.keys() | after.keys() | found.keys():
        assert found.get(source) in (before.get(source), after.get(source)), source
    for source in committed:
        assert found.get(source) == after.get(source), source


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
        with Home(lane.kb) as home:
            assert home.picture() == whole, moment
            assert home.problems() == [], moment
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
        with Home(lane.kb) as home:
            assert home.picture() == whole, moment
            assert home.problems() == [], moment
        return "end" not in done

    trial.at_every_moment("sync", seconds, play)


@pytest.mark.slow
def test_remove_killed_at_any_moment_forgets_what_it_reported_and_keeps_the_rest(trial: Trial) -> None:
    trial.write_documents(1)
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    before = trial.expected()
    trial.base()
    removed = [source for number, source in enumerate(sorted(before)) if number % 4 == 1]
    after = {source: texts for source, texts in before.items() if source not in removed}

    def start(lane: Trial) -> Worker:
        return lane.nursery.start("remove", kb=lane.kb, sources=removed, done=lane.done)

    whole, seconds = trial.unbroken(start)
    assert whole["texts"] == after

    def play(lane: Trial, moment: float) -> bool:
        done = lane.killed(start, moment)
        with Home(lane.kb) as home:
            assert home.problems() == [], moment
            check_versions(home, before, after, [line for line in done if line != "end"])
        start(lane).succeed()
        with Home(lane.kb) as home:
            assert home.picture() == whole, moment
            assert home.problems() == [], moment
        return "end" not in done

    trial.at_every_moment("remove", seconds, play)


@pytest.mark.slow
def test_reembed_killed_at_any_moment_answers_and_resumes_without_embedding_what_it_had(trial: Trial) -> None:
    trial.write_documents(1)
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    trial.base()

    def start(lane: Trial) -> Worker:
        # the delay stands for a model: most kills then fall where the time of a real run goes
        return lane.nursery.start("reembed", kb=lane.kb, done=lane.done, log=lane.log, delay_s=0.005)

    whole, seconds = trial.unbroken(start, "two")
    total = len(whole["chunks"])

    def play(lane: Trial, moment: float) -> bool:
        lane.log.unlink(missing_ok=True)
        done = lane.killed(start, moment)
        stored = max((int(line) for line in done if line.isdigit()), default=0)
        with Home(lane.kb) as home:
            switched = home.kb.generation().fingerprint == SlowEmbeddings("two").fingerprint  # type: ignore[union-attr]
            assert switched or "switched" not in done, moment
            assert len(home.kb.generations()) <= 2, moment
            made = home.kb._number("SELECT COUNT(*) FROM vectors") - total
            assert made >= stored, moment
        with Home(lane.kb, SlowEmbeddings("two" if switched else "one")) as home:
            assert home.problems() == [], moment
            assert home.ask("第3-1号：合同")
        start(lane).succeed()
        assert len(lines_of(lane.log)) <= total + (0 if switched else SMALL_BATCH), moment
        with Home(lane.kb, SlowEmbeddings("two")) as home:
            assert home.picture() == whole, moment
            assert home.problems() == [], moment
        return "end" not in done

    trial.at_every_moment("reembed", seconds, play)


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


def test_while_another_process_reembeds_this_one_answers_ingests_and_removes(trial: Trial) -> None:
    trial.write_documents(1)
    secret, gate, log = trial.docs / "longer.txt", trial.folder / "gate", trial.folder / "embedded"
    secret.write_text("关于" + GATE_WORD + "的规定", encoding="utf-8")
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    os.mkfifo(gate)
    worker = trial.nursery.start("reembed", kb=trial.kb, done=trial.done, log=log, gate=gate)
    assert gate.read_text() == "reached"  # some of it is made, and it stands still
    with Home(trial.kb) as home:
        assert 0 < len(lines_of(log)) < home.kb.chunk_count()
        assert home.ask("关于绝密的规定", 1)[0].metadata["source"] == str(secret)
        (trial.docs / "late.txt").write_text("重新生成期间才来的文件", encoding="utf-8")
        (trial.docs / "05.txt").unlink()
        report = home.ingestor().ingest([trial.docs], sync=True)
        assert (report.added, report.removed) == (1, 1)
        assert home.ask("重新生成期间才来的文件", 1)[0].metadata["source"] == str(trial.docs / "late.txt")
        assert home.problems() == []
    worker.kill()
    assert worker.wait() == -9
    embedded = lines_of(log)
    trial.nursery.start("reembed", kb=trial.kb, done=trial.done, log=log).succeed()
    with Home(trial.kb, SlowEmbeddings("two")) as home:
        assert home.problems() == []
        assert home.ask("重新生成期间才来的文件", 1)[0].metadata["source"] == str(trial.docs / "late.txt")
    assert not set(embedded) & set(lines_of(log)[len(embedded) :])  # nothing twice
    with Home(trial.kb) as home, pytest.raises(FingerprintError, match="fault-test/two"):
        (trial.docs / "after.txt").write_text("切换以后才来的文件", encoding="utf-8")
        home.ingestor().ingest([trial.docs])
    trial.nursery.start("reembed", kb=trial.kb, done=trial.done, model="one", rollback=True).succeed()
    with Home(trial.kb) as home:
        assert home.problems() == []
        assert str(trial.docs / "05.txt") not in home.kb.source_names()
