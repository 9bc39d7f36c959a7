"""Two versions of one file at the same moment: one wins, whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from workshop import Home, Nursery, load_here, records, small_steps

from chains import ingestion
from loaders.documents import load_documents

ROUNDS = 15
COUNT = 60  # documents in a version: more than one transaction


def version(seed: str, count: int = COUNT) -> list[str]:
    return [json.loads(line)["text"] for line in records(seed, count).splitlines()]


@pytest.mark.slow
def test_of_two_processes_that_ingest_versions_of_one_file_one_wins_whole(quick_folder: Path, nursery: Nursery) -> None:
    kb, path = quick_folder / "kb", quick_folder / "docs" / "raced.jsonl"
    path.parent.mkdir()
    Home(kb, create=True).kb.close()
    for number in range(ROUNDS):
        seeds = [f"a{number}", f"b{number}"]
        workers = [
            nursery.start("replace_and_ingest", kb=kb, path=path, seed=seed, count=COUNT - 20 * (seed[0] == "b"))
            for seed in seeds
        ]
        for worker in workers:
            worker.succeed()
        with Home(kb) as home:
            versions = [version(seeds[0]), version(seeds[1], COUNT - 20)]
            assert home.texts()[str(path)] in versions, number
            assert home.problems() == [], number
            assert home.kb._number("SELECT COUNT(*) FROM sources") == 1, number
            home.ingestor().ingest([path])  # and the one on the disk can always be had
            on_disk = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
            assert home.texts()[str(path)] == on_disk, number


def test_a_file_replaced_between_hashing_and_reading_is_never_taken_for_the_other_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after that, and with the first version put back, the next run must not resume one with the other."""
    small_steps_here(monkeypatch)
    path = tmp_path / "raced.jsonl"
    path.write_text(records("a", COUNT), encoding="utf-8")
    stop = threading.Event()
    loaded = load_here

    def load(*arguments: Any) -> Iterator[Document]:
        path.write_text(records("b", COUNT), encoding="utf-8")
        for number, document in enumerate(loaded(*arguments)):
            if number == COUNT - 1:
                stop.set()  # what a kill in the middle leaves: some transactions of the wrong version
            yield document

    monkeypatch.setattr(ingestion, "load_documents", load)
    with Home(tmp_path / "kb", create=True) as home:
        home.ingestor().ingest([path], stop=stop)
        monkeypatch.setattr(ingestion, "load_documents", loaded)
        path.write_text(records("a", COUNT), encoding="utf-8")
        home.ingestor().ingest([path])
        assert home.texts() == {str(path): version("a")}
        assert home.problems() == []


def test_a_file_replaced_while_it_is_read_is_read_again_by_the_next_ingest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps_here(monkeypatch)
    path = tmp_path / "raced.jsonl"
    path.write_text(records("a", COUNT), encoding="utf-8")
    loaded = load_here

    def load(*arguments: Any) -> Iterator[Document]:
        found = list(loaded(*arguments))
        path.write_text(records("b", COUNT), encoding="utf-8")
        yield from found

    monkeypatch.setattr(ingestion, "load_documents", load)
    with Home(tmp_path / "kb", create=True) as home:
        home.ingestor().ingest([path])
        monkeypatch.setattr(ingestion, "load_documents", loaded)
        home.ingestor().ingest([path])
        assert home.texts() == {str(path): version("b")}


def small_steps_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `small_steps`, taken back at the end of the test."""
    monkeypatch.setattr(ingestion, "load_documents", load_documents)
    for module in ("chains.ingestion", "chains.reembedding"):
        monkeypatch.setattr(f"{module}._BATCH_CHUNKS", 512)
    small_steps()
