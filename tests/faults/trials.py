"""One operation over a knowledge base, killed at many moments: what the tests of kill -9 share."""

from __future__ import annotations

import queue
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workshop import Home, Nursery, SlowEmbeddings, Worker, article, lines_of, records

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

    def holds(self, whole: dict[str, Any], moment: float, model: str = "one") -> None:
        """Nothing is wrong, and all is as after an unbroken run."""
        with Home(self.kb, SlowEmbeddings(model)) as home:
            assert home.picture() == whole, moment
            assert home.problems() == [], moment

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
