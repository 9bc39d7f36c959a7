"""check: finds every disagreement between the database and its caches, and nothing where there is none."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from chains.checks import CheckReport, check
from chains.faiss_index import FaissIndex
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.knowledge_base import KnowledgeBase, KnowledgeBaseError, SourceState
from chains.lexical_embeddings import LexicalEmbeddings
from chains.vectorstores import FaissVectorStore
from ui import cli


class Bench:
    """Twelve documents, two of them with the same text, and one of Python's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kb"
        docs = folder / "docs"
        docs.mkdir()
        for number in range(12):
            (docs / f"{number:02}.txt").write_text(f"第{number % 11}条 规定{number % 11 * 7}", encoding="utf-8")
        with KnowledgeBase(self.path, create=True) as kb:
            store, fulltext = FaissVectorStore(LexicalEmbeddings(), kb), FullTextIndex(kb)
            assert Ingestor(store, fulltext).ingest([docs]).added == 12
            store.add_texts(["从程序加入的一段"], ids=["p"])
            Ingestor(store, fulltext).save_caches()

    def check(self) -> CheckReport:
        with KnowledgeBase(self.path) as kb:
            return check(FaissVectorStore(LexicalEmbeddings(), kb), FullTextIndex(kb))

    def spoil(self, *statements: str) -> None:
        connection = sqlite3.connect(self.path / "kb.sqlite")
        with connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()


def held_index(store: FaissVectorStore) -> FaissIndex:
    """The index that a store goes on with, to be spoilt."""
    store.check_embedder()
    index = store.answering_index()
    assert index is not None
    assert index is store.answering_index()
    return index


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_nothing_is_found_where_all_is_well(bench: Bench) -> None:
    report = bench.check()
    assert report.problems == []
    assert report.ok
    assert (report.sources, report.chunks) == (13, 12)  # 12 files of 11 texts, and Python's


def test_an_empty_knowledge_base_is_well(tmp_path: Path) -> None:
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        report = check(FaissVectorStore(LexicalEmbeddings(), kb), FullTextIndex(kb))
    assert (report.ok, report.problems, report.sources, report.chunks) == (True, [], 0, 0)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE chunks SET start = start + 1 WHERE id = 3", "offsets: [3]"),
        ("UPDATE chunks SET text = text || '。' WHERE id = 4", "offsets: [4]"),
        ("UPDATE contents SET text = '别的' WHERE id = 5", "offsets: [5]"),
        ("DELETE FROM vectors WHERE key & 1099511627775 = 6", "no vector: [6]"),
        ("DELETE FROM documents WHERE id = 1", "sources without a document"),
        ("DELETE FROM contents WHERE id = 2", "without their contents"),
        ("DELETE FROM sources WHERE id = 2", "without their sources"),
        ("DELETE FROM chunks WHERE id = 7", "vectors without a chunk"),
        ("UPDATE vectors SET vector = zeroblob(10) WHERE key & 1099511627775 = 2", "vector|向量"),
        (
            "UPDATE vectors SET vector = CAST(x'007e' || substr(vector, 3) AS BLOB) WHERE key & 1099511627775 = 2",
            "vector|向量",
        ),
        ("UPDATE chunks SET metadata = '{' WHERE id = 2", "metadata|damaged"),
    ],
)
def test_a_row_that_is_wrong_is_named(bench: Bench, statement: str, words: str) -> None:
    bench.spoil(statement)
    for cache in bench.path.glob("f*"):
        if cache.is_file():
            cache.unlink()  # an index of the time before would hide what the database lost
    try:
        report = bench.check()
    except KnowledgeBaseError as error:
        assert any(word in str(error) for word in words.split("|")), str(error)
        return
    assert not report.ok
    assert any(word in problem for problem in report.problems for word in words.split("|")), report.problems


def test_an_index_without_a_chunk_is_named(bench: Bench) -> None:
    with KnowledgeBase(bench.path) as kb:
        store, fulltext = FaissVectorStore(LexicalEmbeddings(), kb), FullTextIndex(kb)
        lost = int(kb.chunk_ids()[4])
        index = held_index(store)
        held = index.ids()
        index.ids = lambda: held[held != lost]  # type: ignore[method-assign]
        report = check(store, fulltext)
    assert [problem for problem in report.problems if f"FAISS 缺少片段 / lacks chunks: 1, [{lost}]" in problem]


def test_an_index_with_a_removed_chunk_and_one_twice_is_named(bench: Bench) -> None:
    with KnowledgeBase(bench.path) as kb:
        store, fulltext = FaissVectorStore(LexicalEmbeddings(), kb), FullTextIndex(kb)
        held = fulltext.ids()
        fulltext.ids = lambda: np.sort(np.concatenate([held, [999, held[0]]]))  # type: ignore[method-assign]
        problems = check(store, fulltext).problems
    assert any("tantivy 多出已移除的片段" in problem and "[999]" in problem for problem in problems)
    assert any("tantivy 有重复的片段" in problem for problem in problems)


def test_an_index_whose_vectors_belong_to_other_chunks_is_named(bench: Bench) -> None:
    """Right ids, wrong contents: only searching shows it."""
    with KnowledgeBase(bench.path) as kb:
        store, fulltext = FaissVectorStore(LexicalEmbeddings(), kb), FullTextIndex(kb)
        index = held_index(store)
        search = index.search
        index.search = lambda vector, k: [(i, s / 2) for i, s in search(vector, k)]  # type: ignore
        assert any("by its own vector" in problem for problem in check(store, fulltext).problems)


def test_no_embedder_is_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = LexicalEmbeddings(dimensions=512)
    monkeypatch.setattr(LexicalEmbeddings, "embed_documents_array", None)
    with KnowledgeBase(bench.path) as kb:
        assert check(FaissVectorStore(other, kb), FullTextIndex(kb)).ok


def test_sources_in_the_making_are_listed_and_no_problem(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with KnowledgeBase(bench.path) as kb:
        kb.writer().begin_source("half.txt", SourceState(0, 1, 1, "x", "y"))
    report = bench.check()
    assert (report.problems, report.unfinished) == ([], ["half.txt"])
    assert cli.main(["check", "--kb", str(bench.path)]) == 0
    assert "half.txt" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_and_exits_with_1(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--kb", str(bench.path)]) == 0
    assert "一致" in capsys.readouterr().out
    assert cli.main(["check", "--kb", str(bench.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    bench.spoil("UPDATE chunks SET start = start + 1 WHERE id = 3")
    assert cli.main(["check", "--kb", str(bench.path), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["ok"]
    assert printed["problems"]
    assert cli.main(["check", "--kb", str(bench.path)]) == 1
    assert "✗" in capsys.readouterr().out
