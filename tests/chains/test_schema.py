"""The database's schema: a version 1 file becomes the current one, with everything in it, or stays as it was."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings

from chains import schema
from chains.fulltext import FullTextIndex
from chains.knowledge_base import KnowledgeBase, KnowledgeBaseError, SourceState
from chains.knowledge_base_writer import NewChunk, NewDocument
from chains.vectorstores import FaissVectorStore

ROOT = Path(__file__).resolve().parents[2]

# The schema of version 1, frozen: copied from chains/knowledge_base.py at commit c7368d6. Never to be changed.
VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE revisions (id INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL);
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL, dimensions INTEGER NOT NULL, probe BLOB NOT NULL,
    created TEXT NOT NULL
);
CREATE TABLE sources (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, active INTEGER NOT NULL, size INTEGER, mtime_ns INTEGER,
    sha256 TEXT, settings TEXT, added TEXT NOT NULL
);
CREATE UNIQUE INDEX sources_active ON sources (source) WHERE active = 1;
CREATE INDEX sources_name ON sources (source);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source_id INTEGER NOT NULL, title TEXT, text TEXT NOT NULL,
    characters INTEGER NOT NULL
);
CREATE INDEX documents_source ON documents (source_id);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, source_id INTEGER NOT NULL, document_id INTEGER NOT NULL,
    start INTEGER NOT NULL, end INTEGER NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX chunks_key ON chunks (key);
CREATE INDEX chunks_source ON chunks (source_id);
CREATE INDEX chunks_document ON chunks (document_id);
CREATE TABLE vectors (key INTEGER PRIMARY KEY, vector BLOB NOT NULL);
"""
HALF = SourceState(0, 30, 40, "half", "settings")
# document id -> (source id, title, texts of its chunks); ids have gaps, as after a removal. Document 7 is half-written.
DOCUMENTS: dict[int, tuple[int, str | None, list[str]]] = {
    2: (1, "员工手册", ["劳动合同应当书面订立。", "试用期不超过六个月。"]),
    3: (4, "问答", ["年休假有几天？五天。"]),
    5: (4, None, ["年休假有几天？五天。"]),  # the same text as 3, under no title
    7: (6, "草稿", ["还没有写完的文件。"]),
}
LAST_CHUNK = 90  # the highest id ever given, long removed


class Numbered(Embeddings):
    """Each text has a direction of its own, by its characters."""

    fingerprint = "numbered-1"

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(64)
        for character in text:
            vector[ord(character) % 64] += 1
        return [float(value) for value in vector / np.linalg.norm(vector)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def half_precision(text: str) -> bytes:
    return np.array(Numbered().embed_query(text), np.float16).tobytes()


def version_1_chunks() -> dict[int, dict[str, Any]]:
    """The rows of the table `chunks` by id."""
    rows: dict[int, dict[str, Any]] = {}
    for document, (source, title, texts) in DOCUMENTS.items():
        start = 0
        for number, text in enumerate(texts):
            metadata: dict[str, Any] = {"source": f"s{source}", "title": title, "page": number + 1, "headings": ["章"]}
            if title is None:
                del metadata["title"]
            rows[10 * document + number] = {
                "key": f"key-{document}-{number}", "source_id": source, "document_id": document,
                "start": start, "end": start + len(text), "text": text, "metadata": metadata,
            }  # fmt: skip
            start += len(text)
    return rows


def embedded_text(row: dict[str, Any]) -> str:
    """What version 1 embedded: title, headings and text."""
    return "\n".join([*filter(None, [row["metadata"].get("title")]), "章", row["text"]])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A version 1 knowledge base, as version 1 made it."""
    from chains.embeddings import PROBE

    folder = tmp_path / "kb"
    folder.mkdir()
    connection = sqlite3.connect(folder / "kb.sqlite")
    connection.executescript(
        f"PRAGMA page_size = 16384; PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {VERSION_1}"
        "PRAGMA application_id = 0x52414750; PRAGMA user_version = 1; COMMIT;"
    )
    run = connection.execute
    run("INSERT INTO generations VALUES (1, 'numbered-1', 64, ?, 'then')", (half_precision(PROBE),))
    run("INSERT INTO meta VALUES ('generation', '1')")
    run("INSERT INTO revisions VALUES (1, 'token-1'), (2, 'token-2')")
    for source_row in ((1, "s1", 1, 10, 20, "hash1"), (4, "s4", 1, 11, 21, "hash4"), (6, "s6", 0, 30, 40, "half")):
        run("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, 'settings', 'then')", source_row)
    for document, (source, title, texts) in DOCUMENTS.items():
        whole = "".join(texts)
        run("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", (document, source, title, whole, len(whole)))
    for chunk, row in version_1_chunks().items():
        values = [chunk, *row.values()]
        values[-1] = json.dumps(row["metadata"], ensure_ascii=False)
        run("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        run("INSERT INTO vectors VALUES (?, ?)", (1 << 40 | chunk, half_precision(embedded_text(row))))
    run("UPDATE sqlite_sequence SET seq = ? WHERE name = 'chunks'", (LAST_CHUNK,))
    connection.commit()
    connection.close()
    return folder


def dump(folder: Path) -> tuple[int, list[str]]:
    """Version and the whole content, as SQL."""
    connection = sqlite3.connect(folder / "kb.sqlite")
    try:
        return connection.execute("PRAGMA user_version").fetchone()[0], list(connection.iterdump())
    finally:
        connection.close()


def pragma(folder: Path, name: str) -> Any:
    connection = sqlite3.connect(folder / "kb.sqlite")
    try:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]
    finally:
        connection.close()


def layout(folder: Path) -> dict[str, str]:
    """Every table and index with the SQL that made it, white space evened out."""
    connection = sqlite3.connect(folder / "kb.sqlite")
    try:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite%'")
        return {name: re.sub(r"\s+(?=[,)])", "", re.sub(r"\s+", " ", sql)) for name, sql in rows}
    finally:
        connection.close()


def check_migrated(folder: Path) -> None:
    """Everything that version 1 held is there: chunks, ids, offsets, vectors, states and search results."""
    active = {chunk: row for chunk, row in version_1_chunks().items() if row["source_id"] != 6}
    with KnowledgeBase(folder) as kb:
        assert kb.source_names() == ["s1", "s4"]
        assert [(info.documents, info.chunks, info.characters) for info in kb.sources()] == [(1, 2, 21), (2, 2, 20)]
        assert kb.source_state("s1") == SourceState(1, 10, 20, "hash1", "settings")
        assert kb.revision() == "token-2"
        assert kb.knows_revision("token-1")
        assert kb.chunk_ids().tolist() == sorted(active)
        for chunk in kb.chunks(active).values():
            row = active[chunk.id]
            assert (chunk.key, chunk.source) == (row["key"], f"s{row['source_id']}")
            assert (chunk.start, chunk.end, chunk.text) == (row["start"], row["end"], row["text"])
            assert chunk.metadata == row["metadata"]
            assert (kb.document_text(chunk.document_id) or "")[chunk.start : chunk.end] == chunk.text
            assert len(kb.neighbours(chunk.document_id)) == len(DOCUMENTS[row["document_id"]][2])
        assert dict(kb.index_texts(kb.chunk_ids())) == {chunk: embedded_text(row) for chunk, row in active.items()}
        check_search(kb, active)


def check_search(kb: KnowledgeBase, active: dict[int, dict[str, Any]]) -> None:
    stored = {int(i): row for ids, rows in kb.vectors(1, kb.chunk_ids()) for i, row in zip(ids, rows, strict=True)}
    assert {i: row.astype(np.float16).tobytes() for i, row in stored.items()} == {
        chunk: half_precision(embedded_text(row)) for chunk, row in active.items()
    }
    store = FaissVectorStore(Numbered(), kb)
    query = store.embed_query("试用期有多长")
    found = store.search_ids(query, 9)
    exact = sorted(((float(row @ query), -i) for i, row in stored.items()), reverse=True)  # the definition
    assert [chunk for chunk, _ in found] == [-i for _, i in exact]
    assert [score for _, score in found] == pytest.approx([score for score, _ in exact], abs=1e-3)
    assert [chunk for chunk, _ in FullTextIndex(kb).search("年休假", 9)] == [50, 30]  # the shorter one, without title
    assert FullTextIndex(kb).search("没有写完", 9) == []


def test_a_version_1_knowledge_base_keeps_everything(old: Path) -> None:
    for _ in range(2):  # the second time as the current version
        check_migrated(old)
    assert pragma(old, "user_version") == schema.SCHEMA_VERSION
    assert pragma(old, "integrity_check") == "ok"


def test_a_migrated_database_is_laid_out_like_a_new_one(old: Path, tmp_path: Path) -> None:
    KnowledgeBase(old).close()
    KnowledgeBase(tmp_path / "new", create=True).close()
    assert layout(old) == layout(tmp_path / "new")


def test_a_half_written_source_of_version_1_is_resumed(old: Path) -> None:
    with KnowledgeBase(old) as kb:
        writer = kb.writer()
        assert writer.begin_source("s6", HALF) == (6, 1)
        assert kb.without_vector(1, source_id=6).tolist() == []
        writer.activate(6, 1)
        assert kb.source_names() == ["s1", "s4", "s6"]
        assert [chunk.text for chunk in kb.chunks([70]).values()] == ["还没有写完的文件。"]
        assert len(FullTextIndex(kb).search("没有写完", 9)) == 1


def test_a_source_of_version_1_can_be_removed_and_replaced(old: Path) -> None:
    with KnowledgeBase(old) as kb:
        writer = kb.writer()
        assert writer.remove_sources(["s4"]) == 1
        source, _ = writer.begin_source("s1", SourceState(0, 1, 1, "new", "settings"))
        writer.add_documents(source, [NewDocument("h", "新", "新文本", {}, [NewChunk("k", 0, 3, "新文本", {})])])
        writer.activate(source, 1)
        assert [chunk.text for chunk in kb.chunks(kb.chunk_ids().tolist()).values()] == ["新文本"]
        assert {int(i) for ids, _ in kb.vectors(1, np.arange(100)) for i in ids} == {70}  # the half-written one's


def add_one(kb: KnowledgeBase) -> int:
    writer = kb.writer()
    source, _ = writer.begin_source("new", SourceState(0, 1, 1, "new", "settings"))
    writer.add_documents(source, [NewDocument("h", "", "新文本", {}, [NewChunk("k", 0, 3, "新文本", {})])])
    writer.activate(source, 1)
    return int(kb.chunk_ids_of("new")[0])


def test_chunk_ids_that_version_1_gave_away_are_not_used_again(old: Path) -> None:
    """A full-text index that is behind would take the new text for the removed one."""
    with KnowledgeBase(old) as kb:
        assert add_one(kb) > LAST_CHUNK


def test_space_comes_back_in_a_migrated_knowledge_base_too(old: Path) -> None:
    with KnowledgeBase(old) as kb:
        writer = kb.writer()
        source, _ = writer.begin_source("big", HALF)
        text = "大" * 2_000_000
        writer.add_documents(source, [NewDocument("big", "", text, {}, [NewChunk("k", 0, 1, "大", {})])])
        writer.activate(source, 1)
        writer.remove_sources(["big"])
        assert (old / "kb.sqlite").stat().st_size < 2_000_000


def test_vectors_do_not_stay_behind_in_the_index_file_of_version_1(old: Path) -> None:
    (old / "faiss.index").write_bytes(half_precision("试用期") * 100)
    KnowledgeBase(old).close()
    assert not (old / "faiss.index").exists()


# What version 2 had where version 3 is different, frozen: from chains/schema.py at commit 061733a. Never to be changed.
TO_VERSION_2 = """
DROP INDEX sources_staged;
ALTER TABLE revisions DROP COLUMN shown;
ALTER TABLE revisions DROP COLUMN hidden;
PRAGMA user_version = 2;
"""


def test_a_version_2_knowledge_base_keeps_everything_and_lists_its_changes_from_then_on(
    old: Path, tmp_path: Path
) -> None:
    KnowledgeBase(old).close()
    with sqlite3.connect(old / "kb.sqlite") as connection:
        connection.executescript(TO_VERSION_2)
    connection.close()
    check_migrated(old)
    KnowledgeBase(tmp_path / "new", create=True).close()
    assert layout(old) == layout(tmp_path / "new")
    assert pragma(old, "user_version") == schema.SCHEMA_VERSION
    with KnowledgeBase(old) as kb:
        token = kb.revision()
        assert kb.changes_since("token-1") is None  # version 2 did not write down what token-2 changed
        new = add_one(kb)
        changes = kb.changes_since(token)
        assert changes is not None
        assert (changes.shown.tolist(), changes.hidden.tolist()) == ([new], [])


KILLED = """
import os, signal, sys
from chains import schema
from chains.knowledge_base import KnowledgeBase
position = int(sys.argv[2])
statements = schema._MIGRATIONS[1].strip().split(";\\n")
statements.insert(position if position >= 0 else len(statements), "SELECT kill_me()")
schema._MIGRATIONS[1] = ";\\n".join(statement.rstrip(";") for statement in statements) + ";"
def migrate(connection, original=schema.migrate):
    connection.create_function("kill_me", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    original(connection)
schema.migrate = migrate
KnowledgeBase(sys.argv[1])
"""


@pytest.mark.parametrize("statement", [0, 1, 9, 14, 15, 16, 17, -1])
def test_killed_in_the_middle_of_the_migration_it_is_still_version_1(old: Path, statement: int) -> None:
    before = dump(old)
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(old), str(statement)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert dump(old) == before
    check_migrated(old)


def test_a_migration_that_fails_leaves_version_1_and_no_lock(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the error is named, and another try, in the same process, succeeds."""
    before = dump(old)
    with monkeypatch.context() as patch:
        patch.setitem(schema._MIGRATIONS, 1, schema._MIGRATIONS[1] + "INSERT INTO nowhere VALUES (1);")
        with pytest.raises(KnowledgeBaseError, match="nowhere") as caught:
            KnowledgeBase(old)
    assert dump(old) == before
    started = sqlite3.connect(old / "kb.sqlite", timeout=1)
    started.execute("BEGIN IMMEDIATE")  # raises where the failed one still holds the right to write
    started.close()
    check_migrated(old)
    assert caught.value


def test_two_processes_may_migrate_at_once(old: Path) -> None:
    code = "import sys; from chains import KnowledgeBase; print(KnowledgeBase(sys.argv[1]).chunk_count())"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(old)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0] for process in running] == ["4\n"] * 3
    check_migrated(old)


def test_a_new_database_is_in_wal_mode_names_its_format_and_gives_space_back(tmp_path: Path) -> None:
    KnowledgeBase(tmp_path, create=True).close()
    assert pragma(tmp_path, "journal_mode") == "wal"
    assert pragma(tmp_path, "application_id") == schema.APPLICATION_ID
    assert pragma(tmp_path, "user_version") == schema.SCHEMA_VERSION
    assert pragma(tmp_path, "auto_vacuum") == 2  # INCREMENTAL


@pytest.mark.parametrize("version", [schema.SCHEMA_VERSION + 1, 99])
def test_a_newer_format_is_refused_by_its_number_and_left_alone(tmp_path: Path, version: int) -> None:
    KnowledgeBase(tmp_path, create=True).close()
    with sqlite3.connect(tmp_path / "kb.sqlite") as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = dump(tmp_path)
    with pytest.raises(
        KnowledgeBaseError, match=rf"has format {version}, this program knows up to {schema.SCHEMA_VERSION}"
    ):
        KnowledgeBase(tmp_path)
    assert dump(tmp_path) == before
