"""Writer: every change to a knowledge base, each in one transaction; made by `KnowledgeBase.writer`.

SQLite lets one transaction write at a time and the others wait for it, over all threads and processes; nothing slow
(parsing, embedding) happens inside one.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import sqlite3
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chains.embeddings import Vectors
from chains.id_runs import to_runs
from chains.knowledge_base import (
    Generation,
    Ids,
    KnowledgeBase,
    KnowledgeBaseError,
    SourceState,
    batches,
    marks,
    translated,
    vector_key,
)
from chains.knowledge_base_blanking import blank_spans
from loaders.splitters import text_with_context

_REVISIONS_KEPT = 1000  # a cache further behind is rebuilt
# Contents of the sources that a change touches, up to which it is written down which chunks it showed and hid. Beyond,
# to compare all chunks with a cache is little beside the change itself.
_FOLLOWED_CONTENTS = 20_000
_COPIED_CHUNK = (
    "INSERT INTO chunks (key, content_id, start, end, text, metadata)"
    " SELECT key, content_id, start, end, text, metadata FROM chunks"
)

Run = Callable[..., sqlite3.Cursor]


@dataclass(frozen=True)
class NewChunk:
    """A chunk to be stored. `key` is its public id; `metadata` is what it has beside its document's."""

    key: str
    start: int
    end: int
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class NewDocument:
    """A document to be stored. Documents with the same `content_hash` share text, chunks and vectors."""

    content_hash: str
    title: str
    text: str
    metadata: Mapping[str, Any]
    chunks: Sequence[NewChunk]

    def texts(self) -> list[str]:
        """What is embedded of each chunk, as `KnowledgeBase.index_texts` tells it when the document is stored."""
        return [text_with_context(chunk.text, {"title": self.title, **chunk.metadata}) for chunk in self.chunks]


class Writer:
    """Changes one knowledge base from one thread."""

    def __init__(self, knowledge_base: KnowledgeBase, connection: sqlite3.Connection) -> None:
        self._kb = knowledge_base
        self._connection = connection

    # -- sources -------------------------------------------------------------------------------------------------

    def begin_source(self, source: str, state: SourceState) -> tuple[int, int]:
        """An inactive source to fill: (its id, documents it already holds).

        One left behind by a run that died is taken up again when file and settings are the same, else dropped.
        """
        with self._transaction() as run:
            rows = run("SELECT id, sha256, settings FROM sources WHERE source = ? AND active = 0", (source,)).fetchall()
            resumed = [row[0] for row in rows if row[1:] == (state.sha256, state.settings) and state.sha256][:1]
            for row in rows:
                if row[0] not in resumed:
                    _drop_source(run, row[0])
            if resumed:
                count = run("SELECT COUNT(*) FROM documents WHERE source_id = ?", (resumed[0],)).fetchone()[0]
                return resumed[0], count
            cursor = run(
                "INSERT INTO sources (source, active, size, mtime_ns, sha256, settings, added)"
                " VALUES (?, 0, ?, ?, ?, ?, ?)",
                (source, state.size, state.mtime_ns, state.sha256, state.settings, _now()),
            )
        return int(cursor.lastrowid or 0), 0

    def drop_staged(self, source: str) -> None:
        """Remove the half-written version of a source; the one that answers stays."""
        with self._transaction() as run:
            for (staged,) in run("SELECT id FROM sources WHERE source = ? AND active = 0", (source,)).fetchall():
                _drop_source(run, staged)

    def add_documents(self, source_id: int, documents: Sequence[NewDocument]) -> None:
        """Store documents of a source that `begin_source` opened, in one transaction; their vectors come later.

        Raises:
            SourceRemovedError: the source was removed meanwhile.
        """
        with self._transaction() as run:
            self._require_staged(run, source_id)
            for entry in documents:
                _insert(run, source_id, entry)

    def activate(self, source_id: int, generation: int) -> None:
        """Make a filled source visible and drop the version it replaces, at once.

        Args:
            source_id: from `begin_source`.
            generation: whose vectors its chunks have.

        Raises:
            GenerationChangedError: another generation answers by now; the chunks need vectors of that one.
            KnowledgeBaseError: the source was removed meanwhile.
        """
        with self._transaction() as run:
            _require_generation(run, generation)
            name = self._require_staged(run, source_id)
            rows = run("SELECT id FROM sources WHERE source = ? AND id <> ?", (name, source_id)).fetchall()
            replaced = [row[0] for row in rows]
            with _revision(run, [source_id, *replaced]):
                for old in replaced:
                    _drop_source(run, old)
                run("UPDATE sources SET active = 1 WHERE id = ?", (source_id,))
        if replaced:
            self.give_back_space()

    def _require_staged(self, run: Run, source_id: int) -> str:
        row = run("SELECT source FROM sources WHERE id = ? AND active = 0", (source_id,)).fetchone()
        if row is None:
            raise SourceRemovedError(
                "这个文档在导入过程中被移除了；需要的话请重新导入",
                "this document was removed while it was being ingested; ingest it again if it is wanted",
            )
        return str(row[0])

    def touch(self, source_id: int, state: SourceState) -> None:
        """Remember a file's new size and time when its content turned out to be the same."""
        with self._transaction() as run:
            run("UPDATE sources SET size = ?, mtime_ns = ? WHERE id = ?", (state.size, state.mtime_ns, source_id))

    def remove_sources(self, sources: Iterable[str]) -> int:
        """Remove sources, half-written versions too, with everything derived from them; how many were visible.

        The space goes back to the file system.
        """
        with self._transaction() as run:
            rows = [
                row
                for source in dict.fromkeys(sources)
                for row in run("SELECT id, active FROM sources WHERE source = ?", (source,)).fetchall()
            ]
            removed = sum(int(active) for _, active in rows)
            with _revision(run, [number for number, _ in rows]) if removed else contextlib.nullcontext():
                for number, _ in rows:
                    _drop_source(run, number)
        if removed:
            self.give_back_space()
        return removed

    def remove_everything(self) -> None:
        """Remove every source."""
        with translated(self._kb.path):
            rows = self._connection.execute("SELECT DISTINCT source FROM sources").fetchall()
        self.remove_sources([row[0] for row in rows])

    def retitle(self, content: int, title: str, generation: int, vectors: Vectors) -> None:
        """Give a content another title. Its chunks, which are embedded and indexed with it, get new ids.

        Args:
            content: what several documents share.
            title: the new one.
            generation: whose vectors these are; other generations lose theirs and are completed by `reembed`.
            vectors: of the content's chunks, in the order of their ids.

        Raises:
            GenerationChangedError: another generation answers by now.
        """
        with self._transaction() as run:
            _require_generation(run, generation)
            old = [row[0] for row in run("SELECT id FROM chunks WHERE content_id = ? ORDER BY id", (content,))]
            if len(old) != len(vectors):  # it was removed or stored anew meanwhile
                return
            visible = _visible_chunks(run, [content])
            run("UPDATE contents SET title = ? WHERE id = ?", (title, content))
            new = [int(run(f"{_COPIED_CHUNK} WHERE id = ?", (chunk,)).lastrowid or 0) for chunk in old]
            _insert_vectors(run, generation, new, vectors)
            for chunk in old:
                _drop_chunk(run, chunk)
            if visible:
                _bump(run, new, visible)

    # -- chunks of Python callers --------------------------------------------------------------------------------

    def replace_chunks(self, documents: Mapping[str, Sequence[NewDocument]], generation: int, vectors: Vectors) -> None:
        """Store documents by source name, visible at once, in place of the chunks that have their keys.

        One transaction: a failure leaves what was there. Contents must be new (no other document shares them).

        Args:
            documents: with their chunks.
            generation: whose vectors these are.
            vectors: (number of chunks, dimensions), in the order of the chunks.
        """
        keys = [chunk.key for entries in documents.values() for entry in entries for chunk in entry.chunks]
        with self._transaction() as run:
            _require_generation(run, generation)
            hidden = _drop_chunks(run, keys)
            shown: list[int] = []
            for source, entries in documents.items():
                source_id = _source_id(run, source)
                for entry in entries:
                    ids = _insert(run, source_id, entry)
                    _insert_vectors(run, generation, ids, vectors[len(shown) : len(shown) + len(ids)])
                    shown += ids
            _bump(run, shown, hidden)

    def remove_chunks(self, keys: Sequence[str]) -> int:
        """Remove visible chunks by public id, and documents and sources left without any; how many were there."""
        with self._transaction() as run:
            hidden = _drop_chunks(run, keys)
            if hidden:
                _bump(run, (), hidden)
        if hidden:
            self.give_back_space()
        return len(hidden)

    # -- generations ---------------------------------------------------------------------------------------------

    def first_generation(self, fingerprint: str, probe: Vectors, embedder: Mapping[str, Any] | None) -> Generation:
        """The generation that answers; where there is none yet, a new one."""
        with self._transaction() as run:
            if run("SELECT 1 FROM meta WHERE key = 'generation'").fetchone() is None:
                _set_generation(run, _add_generation(run, fingerprint, probe, embedder))
        generation = self._kb.generation()
        assert generation is not None
        return generation

    def add_generation(self, fingerprint: str, probe: Vectors, embedder: Mapping[str, Any] | None) -> Generation:
        """A new generation, to be filled with vectors and switched to."""
        with self._transaction() as run:
            number = _add_generation(run, fingerprint, probe, embedder)
        return next(generation for generation in self._kb.generations() if generation.id == number)

    def remember_embedder(self, generation: int, embedder: Mapping[str, Any]) -> None:
        """Keep the config section of a generation's embedder, where it is not known (a migrated knowledge base)."""
        with self._transaction() as run:
            run("UPDATE generations SET embedder = ? WHERE id = ? AND embedder IS NULL", (_json(embedder), generation))

    def add_vectors(self, generation: int, ids: Ids, vectors: Vectors) -> None:
        """Store vectors (n, dimensions) of those of the chunks that are still there.

        Raises:
            KnowledgeBaseError: the generation was dropped meanwhile.
        """
        with self._transaction() as run:
            _require_known(run, generation)
            _insert_vectors(run, generation, ids.tolist(), vectors)

    def switch_generation(self, generation: int) -> None:
        """Make a generation the one that answers, at once; it must have a vector of every chunk.

        Raises:
            MissingVectorsError: it has not.
            KnowledgeBaseError: there is no such generation.
        """
        with self._transaction() as run:
            _require_known(run, generation)
            missing = run(
                "SELECT COUNT(*) FROM chunks c WHERE NOT EXISTS (SELECT 1 FROM vectors WHERE key = ? | c.id)",
                (vector_key(generation, 0),),
            ).fetchone()[0]
            if missing:
                raise MissingVectorsError(
                    f"第 {generation} 代向量还缺 {missing} 个片段，不能切换；请重新运行 ragproj reembed",
                    f"generation {generation} has no vector of {missing} chunks yet; run ragproj reembed again",
                )
            run("INSERT OR REPLACE INTO meta SELECT 'previous_generation', value FROM meta WHERE key = 'generation'")
            _set_generation(run, generation)
            _bump(run, None, None)  # an index of this generation may lack what came while it was being made

    def drop_generation(self, generation: int) -> None:
        """Remove a generation's vectors.

        Raises:
            KnowledgeBaseError: it is the one that answers.
        """
        with self._transaction() as run:
            if run("SELECT 1 FROM meta WHERE key = 'generation' AND value = ?", (str(generation),)).fetchone():
                raise KnowledgeBaseError(
                    f"第 {generation} 代向量正在使用，不能删除",
                    f"generation {generation} answers and cannot be dropped",
                )
            low, high = vector_key(generation, 0), vector_key(generation + 1, 0)
            run("DELETE FROM vectors WHERE key >= ? AND key < ?", (low, high))
            run("DELETE FROM generations WHERE id = ?", (generation,))
        self.give_back_space()

    def give_back_space(self) -> None:
        """Return the space of removed rows to the file system, and empty the log that still holds them.

        Where somebody reads at the time, what he sees stays in the log until the next write after he is done.
        """
        with translated(self._kb.path):
            # a script: `execute` would step the pragma once, which frees a single page
            self._connection.executescript("PRAGMA incremental_vacuum;")
            self._empty_log()

    def _empty_log(self) -> None:
        """Move the log into the database, as much of it as no reader needs; the rest with the next write.

        It waits for nobody: a reader takes as long as it likes, and all writers would wait behind this one.
        """
        before = self._connection.execute("PRAGMA busy_timeout").fetchone()[0]
        self._connection.execute("PRAGMA busy_timeout = 0")
        try:
            self._kb.owes_space = bool(self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {before}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Run]:
        with translated(self._kb.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise
        if self._kb.owes_space:
            with contextlib.suppress(sqlite3.OperationalError):  # what was written is written
                self._empty_log()


class SourceRemovedError(KnowledgeBaseError):
    """A source was removed while it was being written."""


class MissingVectorsError(KnowledgeBaseError):
    """A generation cannot answer: it has no vector of some chunks."""


class GenerationChangedError(KnowledgeBaseError):
    """Another generation of vectors was switched to in the middle of a write."""


def _require_known(run: Run, generation: int) -> None:
    if run("SELECT 1 FROM generations WHERE id = ?", (generation,)).fetchone() is None:
        raise KnowledgeBaseError(
            f"第 {generation} 代向量已被移除，请重新运行", f"generation {generation} was removed; run it again"
        )


def _require_generation(run: Run, generation: int) -> None:
    row = run("SELECT value FROM meta WHERE key = 'generation'").fetchone()
    if row is None or int(row[0]) != generation:
        raise GenerationChangedError(
            "写入期间知识库换用了另一个嵌入模型的向量，请重试",
            "the knowledge base changed over to another embedder's vectors during this write; try again",
        )


def content_hash(*parts: Any) -> str:
    """The hash under which equal contents are found: of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _insert(run: Run, source_id: int, entry: NewDocument) -> list[int]:
    """Store a document; ids of the chunks stored for it, none where it shares a content that is there already."""
    row = run("SELECT id FROM contents WHERE hash = ?", (entry.content_hash,)).fetchone()
    ids: list[int] = []
    if row is not None:
        content = int(row[0])
    else:
        cursor = run(
            "INSERT INTO contents (hash, title, text) VALUES (?, ?, ?)", (entry.content_hash, entry.title, entry.text)
        )
        content = int(cursor.lastrowid or 0)
        for chunk in entry.chunks:
            cursor = run(
                "INSERT INTO chunks (key, content_id, start, end, text, metadata) VALUES (?, ?, ?, ?, ?, ?)",
                (chunk.key, content, chunk.start, chunk.end, chunk.text, _json(chunk.metadata)),
            )
            ids.append(int(cursor.lastrowid or 0))
    run(
        "INSERT INTO documents (source_id, content_id, title, metadata, characters) VALUES (?, ?, ?, ?, ?)",
        (source_id, content, entry.title, _json(entry.metadata), len(entry.text)),
    )
    return ids


def _insert_vectors(run: Run, generation: int, ids: Sequence[int], vectors: Vectors) -> None:
    for chunk_id, vector in zip(ids, vectors, strict=True):
        run(
            "INSERT OR REPLACE INTO vectors SELECT ?, ? WHERE EXISTS (SELECT 1 FROM chunks WHERE id = ?)",
            (vector_key(generation, chunk_id), _to_blob(vector), chunk_id),
        )


def _add_generation(run: Run, fingerprint: str, probe: Vectors, embedder: Mapping[str, Any] | None) -> int:
    cursor = run(
        "INSERT INTO generations (fingerprint, dimensions, probe, created, embedder) VALUES (?, ?, ?, ?, ?)",
        (fingerprint, len(probe), _to_blob(probe), _now(), None if embedder is None else _json(embedder)),
    )
    return int(cursor.lastrowid or 0)


def _drop_source(run: Run, source_id: int) -> None:
    contents = [row[0] for row in run("SELECT content_id FROM documents WHERE source_id = ?", (source_id,))]
    run("DELETE FROM documents WHERE source_id = ?", (source_id,))
    run("DELETE FROM sources WHERE id = ?", (source_id,))
    for part in batches(contents):
        _drop_unused_contents(run, part)


def _drop_unused_contents(run: Run, contents: list[int]) -> None:
    """Those of the contents that no document holds any more, with their chunks and vectors."""
    unused = [
        row[0]
        for row in run(
            f"SELECT id FROM contents t WHERE id IN ({marks(contents)})"
            " AND NOT EXISTS (SELECT 1 FROM documents WHERE content_id = t.id)",
            contents,
        )
    ]
    listed = marks(unused)
    run(
        "DELETE FROM vectors WHERE key IN (SELECT g.id << 40 | c.id FROM chunks c, generations g"
        f" WHERE c.content_id IN ({listed}))",
        unused,
    )
    run(f"DELETE FROM chunks WHERE content_id IN ({listed})", unused)
    run(f"DELETE FROM contents WHERE id IN ({listed})", unused)


def _drop_chunks(run: Run, keys: Sequence[str]) -> list[int]:
    """Ids of the chunks removed: those that readers see. Contents and sources left without any go with them, from
    other contents what only they held."""
    removed: list[int] = []
    for part in batches(list(keys)):
        rows = run(
            f"SELECT c.id, c.content_id, c.start, c.end FROM chunks c WHERE c.key IN ({marks(part)}) AND EXISTS ("
            "SELECT 1 FROM documents d JOIN sources s ON s.id = d.source_id"
            " WHERE s.active = 1 AND d.content_id = c.content_id)",
            part,
        ).fetchall()
        spans: dict[int, list[tuple[int, int]]] = {}
        for chunk, content, start, end in rows:
            spans.setdefault(content, []).append((start, end))
            _drop_staged_sharing(run, content)
            _drop_chunk(run, chunk)
            if run("SELECT 1 FROM chunks WHERE content_id = ?", (content,)).fetchone() is None:
                _drop_content(run, content)
            else:  # no longer the whole content: later copies are stored anew
                run("UPDATE contents SET hash = 'partial:' || id WHERE id = ?", (content,))
        for content, gone in spans.items():
            blank_spans(run, content, gone)
        removed += [row[0] for row in rows]
    return removed


def _drop_chunk(run: Run, chunk: int) -> None:
    run("DELETE FROM vectors WHERE key IN (SELECT id << 40 | ? FROM generations)", (chunk,))
    run("DELETE FROM chunks WHERE id = ?", (chunk,))


def _drop_staged_sharing(run: Run, content: int) -> None:
    """Drop half-written sources that hold a content which is about to change; their files are read again."""
    rows = run(
        "SELECT DISTINCT s.id FROM documents d JOIN sources s ON s.id = d.source_id"
        " WHERE s.active = 0 AND d.content_id = ?",
        (content,),
    ).fetchall()
    for (source,) in rows:
        _drop_source(run, source)


def _drop_content(run: Run, content: int) -> None:
    """Remove a content without chunks, with its documents and the sources left without any."""
    sources = [
        row[0]
        for row in run(
            "SELECT s.id FROM documents d JOIN sources s ON s.id = d.source_id AND s.active = 1 WHERE d.content_id = ?",
            (content,),
        )
    ]
    for source in sources:
        run("DELETE FROM documents WHERE content_id = ? AND source_id = ?", (content, source))
        run(
            "DELETE FROM sources WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM documents WHERE source_id = ?1)", (source,)
        )
    _drop_unused_contents(run, [content])


def _source_id(run: Run, source: str) -> int:
    """The active source of that name, made if need be: where Python callers' documents go."""
    row = run("SELECT id FROM sources WHERE source = ? AND active = 1", (source,)).fetchone()
    if row is not None:
        return int(row[0])
    cursor = run("INSERT INTO sources (source, active, added) VALUES (?, 1, ?)", (source, _now()))
    return int(cursor.lastrowid or 0)


def _set_generation(run: Run, generation: int) -> None:
    run("INSERT OR REPLACE INTO meta VALUES ('generation', ?)", (str(generation),))


@contextlib.contextmanager
def _revision(run: Run, sources: Sequence[int]) -> Iterator[None]:
    """A new revision that tells which chunks of these sources appear and disappear by what is done inside."""
    contents = _contents_of(run, sources)
    before = None if contents is None else _visible_chunks(run, contents)
    yield
    if contents is None or before is None:
        _bump(run, None, None)
    else:
        after = _visible_chunks(run, contents)
        _bump(run, after - before, before - after)


def _contents_of(run: Run, sources: Sequence[int]) -> list[int] | None:
    """Ids of the contents of sources; None where they are too many to be followed."""
    found: set[int] = set()
    for source in sources:
        rows = run(
            "SELECT DISTINCT content_id FROM documents WHERE source_id = ? LIMIT ?", (source, _FOLLOWED_CONTENTS + 1)
        )
        found.update(row[0] for row in rows)
        if len(found) > _FOLLOWED_CONTENTS:
            return None
    return sorted(found)


def _visible_chunks(run: Run, contents: list[int]) -> set[int]:
    """Ids of the chunks of contents that readers see."""
    return {
        row[0]
        for part in batches(contents)
        for row in run(
            f"SELECT c.id FROM chunks c WHERE c.content_id IN ({marks(part)}) AND EXISTS (SELECT 1 FROM documents d"
            " JOIN sources s ON s.id = d.source_id WHERE s.active = 1 AND d.content_id = c.content_id)",
            part,
        )
    }


def _bump(run: Run, shown: Collection[int] | None, hidden: Collection[int] | None) -> None:
    """A new revision: chunks that appear and disappear with it; None where caches have to look at everything."""
    # random, not a number: a restored backup counts the same numbers again for other contents
    run(
        "INSERT INTO revisions (token, shown, hidden) VALUES (?, ?, ?)",
        (uuid.uuid4().hex, *(None if ids is None else to_runs(ids) for ids in (shown, hidden))),
    )
    run("DELETE FROM revisions WHERE id <= (SELECT MAX(id) FROM revisions) - ?", (_REVISIONS_KEPT,))


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False)
    except ValueError:  # NaN, as pandas writes for an empty cell, is no JSON
        return json.dumps(_without_nan(dict(metadata)), ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value


def _to_blob(vector: Vectors) -> bytes:
    # half precision: the cosine moves by less than 1e-6, the database is half the size
    return vector.astype(np.float16).tobytes()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
