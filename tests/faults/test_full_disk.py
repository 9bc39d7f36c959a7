"""A disk that is full in mid-write: one clear error, nothing committed lost, and it goes on when there is space."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workshop import Home, Nursery, SlowEmbeddings, article, records

from chains.knowledge_base import KnowledgeBaseError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not mount or not umount:
        pytest.skip("needs root to mount a small file system; the tests with RLIMIT_FSIZE run everywhere")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a file system")
    yield folder
    subprocess.run([umount, "-l", folder], check=True)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number:02}.txt").write_text(article(number), encoding="utf-8")
    return folder


def fill(disk: Path, *, leaving: int = 0) -> Path:
    """A file that takes all space but some bytes."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free - leaving
    with ballast.open("wb") as file:
        file.write(bytes(max(0, free)))
    return ballast


def big(docs: Path) -> Path:
    path = docs / "zz.jsonl"
    path.write_text(records("big", 3000), encoding="utf-8")
    return path


def intact(kb: Path, sources: int, model: str = "one") -> None:
    """What was committed is there and found."""
    with Home(kb, SlowEmbeddings(model)) as home:
        assert len(home.kb.source_names()) >= sources
        assert home.problems() == []
        assert home.ask("第3号：合同")


# -- a small file system -------------------------------------------------------------------------------------------


def test_ingest_on_a_full_disk_fails_by_name_and_goes_on_with_space(small_disk: Path, docs: Path) -> None:
    kb = small_disk / "kb"
    with Home(kb, create=True) as home:
        assert home.ingestor().ingest([docs]).added == 10
    big(docs)
    ballast = fill(small_disk, leaving=1_000_000)
    with Home(kb) as home, pytest.raises(KnowledgeBaseError, match=r"磁盘|空间"):
        home.ingestor().ingest([docs])
    ballast.unlink()
    (docs / "zz.jsonl").write_text(records("small", 3), encoding="utf-8")
    intact(kb, 10)
    with Home(kb) as home:
        report = home.ingestor().ingest([docs])
        assert (report.added, report.unchanged) == (1, 10)
    intact(kb, 11)


@pytest.mark.parametrize("leaving", [0, 20_000, 200_000])
def test_every_step_on_a_disk_with_little_space_left_fails_by_name_or_works(
    small_disk: Path, docs: Path, leaving: int
) -> None:
    kb = small_disk / "kb"
    with Home(kb, create=True) as home:
        home.ingestor().ingest([docs])
    for number in range(10, 30):
        (docs / f"{number:02}.txt").write_text(article(number, 40), encoding="utf-8")
    ballast = fill(small_disk, leaving=leaving)
    steps: list[Callable[[Home], object]] = [
        lambda home: home.ingestor().ingest([docs]),
        lambda home: home.kb.writer().remove_sources([str(docs / "00.txt")]),
        lambda home: home.ingestor().save_caches(),
        lambda home: home.problems(),
    ]
    for step in steps:
        try:
            with Home(kb) as home:  # with less than 32 KB left, SQLite cannot even open for reading
                step(home)
        except KnowledgeBaseError as error:
            assert "\n" not in str(error)
    ballast.unlink()
    with Home(kb) as home:
        home.ingestor().ingest([docs])
    intact(kb, 30)


@pytest.mark.parametrize("leaving", [0, 40_000])
def test_reembed_on_a_full_disk_fails_by_name_answers_from_the_old_vectors_and_resumes(
    small_disk: Path, docs: Path, leaving: int, nursery: Nursery
) -> None:
    (docs / "many.jsonl").write_text(records("many", 800), encoding="utf-8")
    kb, done = small_disk / "kb", docs.parent / "done"
    with Home(kb, create=True) as home:
        home.ingestor().ingest([docs])
    with Home(kb) as service:
        assert service.ask("第3号：合同")
        ballast = fill(small_disk, leaving=leaving)
        worker = nursery.start("reembed", kb=kb, done=done)
        if worker.wait():
            assert worker.complaint.startswith("KnowledgeBaseError"), worker.complaint
            assert service.ask("第3号：合同")
        ballast.unlink()
    nursery.start("reembed", kb=kb, done=done).succeed()
    intact(kb, 11, "two")


def test_caches_that_cannot_be_saved_do_not_stop_questions_or_ingest(small_disk: Path, docs: Path) -> None:
    kb = small_disk / "kb"
    with Home(kb, create=True) as home:
        home.ingestor().ingest([docs])
    for cache in [*kb.glob("faiss-*"), kb / "fulltext.state"]:
        cache.unlink()
    shutil.rmtree(kb / "fulltext")
    with Home(kb) as home:
        assert home.kb.source_names()
        ballast = fill(small_disk)
        dense, _ = home.both_legs("第3号：合同")
        assert dense
        assert home.ask("第3号：合同")
        home.ingestor().save_caches()
        ballast.unlink()
        home.ingestor().save_caches()
        dense, lexical = home.both_legs("第3号：合同")
        assert dense and lexical
        assert home.problems() == []
    intact(kb, 10)


def test_the_command_exits_with_1_and_one_line_on_a_full_disk(small_disk: Path, docs: Path) -> None:
    kb = small_disk / "kb"
    command = [sys.executable, "-m", "ui.cli", "ingest", str(docs), "--kb", str(kb)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    big(docs)
    fill(small_disk, leaving=1_000_000)
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    complaints = [line for line in ran.stderr.splitlines() if line.startswith("ragproj ingest:")]
    assert len(complaints) == 1, ran.stderr
    assert "磁盘可能已满" in complaints[0]
    checked = [sys.executable, "-m", "ui.cli", "check", "--kb", str(kb)]
    (docs / "zz.jsonl").unlink()
    assert subprocess.run(checked, cwd=ROOT, capture_output=True).returncode == 0


# -- a limit of the size of a file, for everybody ------------------------------------------------------------------


@pytest.mark.parametrize("limit_kb", [1, 100, 500])
@pytest.mark.parametrize("work", ["ingest", "reembed", "remove"])
def test_a_file_that_may_not_grow_is_an_error_by_name_and_loses_nothing(
    work: str, limit_kb: int, docs: Path, nursery: Nursery
) -> None:
    kb, done = docs.parent / "kb", docs.parent / "done"
    with Home(kb, create=True) as home:
        home.ingestor().ingest([docs])
        before = home.texts()
    if work == "ingest":
        (docs / "zz.jsonl").write_text(records("big", 400), encoding="utf-8")
    everything: dict[str, dict[str, Any]] = {
        "ingest": {"kb": str(kb), "docs": str(docs), "done": str(done)},
        "reembed": {"kb": str(kb), "done": str(done)},
        "remove": {"kb": str(kb), "sources": [str(docs / "00.txt")], "done": str(done)},
    }
    arguments = everything[work]
    worker = nursery.start("limited", megabytes=limit_kb / 1024, limited=work, arguments=arguments)
    if worker.wait():
        assert worker.complaint.startswith("KnowledgeBaseError"), worker.complaint
        assert "\n" not in worker.complaint
    nursery.start(work, **arguments).succeed()
    with Home(kb, SlowEmbeddings("two" if work == "reembed" else "one")) as home:
        assert home.problems() == []
        kept = before if work != "remove" else {name: text for name, text in before.items() if "00.txt" not in name}
        assert {name: text for name, text in home.texts().items() if "zz" not in name} == kept
