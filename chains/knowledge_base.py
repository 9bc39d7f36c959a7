"""The knowledge base: one SQLite database that is the truth; every index is a cache derived from it.

Layout of the directory: `kb.sqlite` (WAL), `write.lock`, the caches `faiss.index` and `fulltext/`, and `files/` for
documents uploaded through the page.

A source (a file, or whatever Python callers name) holds documents (one, or one a record); a document is cut into
chunks; each chunk has one vector in each generation. A source is written in batches under an inactive row that no
reader sees and switched on in one transaction, which also drops what it replaces: a crash leaves the old version whole
and the new one ready to be resumed. Chunk ids are never used again, so a cache is current when it holds exactly the
ids that are active here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from langchain_core.documents import Document

from chains.embeddings import Vectors
from loaders.errors import RagProjError, UsageError
from loaders.splitters import embedding_text

SCHEMA_VERSION = 1
APPLICATION_ID = 0x52414750  # "RAGP"
Ids = npt.NDArray[np.int64]
Run = Callable[..., sqlite3.Cursor]
MetadataFilter = Mapping[str, Any] | Callable[[Mapping[str, Any]], bool]

_SCHEMA = """
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
# vectors.key = generation << 40 | chunk id: a rowid table keeps a vector within its page, a composite key would not
_GENERATION_SHIFT = 40
_REVISIONS_KEPT = 1000  # a cache further behind is rebuilt
_BATCH = 500  # ids in one IN (...) list, well below SQLite's limit


class KnowledgeBaseError(RagProjError):
    """The knowledge base is missing, damaged, newer than this program, or cannot be written."""


class FingerprintError(KnowledgeBaseError):
    """The configured embedder is not the one that made the stored vectors."""


@dataclass(frozen=True)
class Generation:
    """One embedder's set of vectors."""

    id: int
    fingerprint: str
    dimensions: int
    probe: Vectors


@dataclass(frozen=True)
class SourceInfo:
    """A source as the list of sources shows it."""

    source: str
    title: str
    documents: int
    chunks: int
    characters: int
    added: str


@dataclass(frozen=True)
class SourceState:
    """What decides whether a file must be read again."""

    id: int
    size: int | None
    mtime_ns: int | None
    sha256: str | None
    settings: str | None


@dataclass(frozen=True)
class NewChunk:
    """A chunk to be stored. `key` is its public id."""

    key: str
    start: int
    end: int
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class NewDocument:
    """A document to be stored, cut into its chunks."""

    title: str
    text: str
    chunks: Sequence[NewChunk]


@dataclass(frozen=True)
class StoredChunk:
    """A chunk as it is read back."""

    id: int
    key: str
    source: str
    document_id: int
    start: int
    end: int
    text: str
    metadata: dict[str, Any]

    def document(self) -> Document:
        """The chunk as LangChain hands it around."""
        return Document(id=self.key, page_content=self.text, metadata=self.metadata)


class KnowledgeBase:
    """One knowledge base directory. Safe to share between threads; any number of processes may open it."""

    def __init__(self, path: Path | str, *, create: bool = False) -> None:
        """Open the directory.

        Raises:
            KnowledgeBaseError: it does not exist and `create` is false, it is damaged, or a newer program wrote it.
        """
        self.path = Path(path)
        self._database = self.path / "kb.sqlite"
        self._local = threading.local()
        self._connections: dict[threading.Thread, sqlite3.Connection] = {}
        self._lock = threading.Lock()
        if not self._is_created():
            if not create:
                raise KnowledgeBaseError(
                    f"知识库 {self.path} 不存在；请先运行 ragproj ingest 文件夹 --kb {self.path}",
                    f"knowledge base {self.path} does not exist; first run ragproj ingest FOLDER --kb {self.path}",
                )
            with _translated(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                with self._write_lock():
                    self._create()
        self._check_version()

    def close(self) -> None:
        """Close every thread's connection."""
        with self._lock:
            while self._connections:
                self._connections.popitem()[1].close()
            self._local = threading.local()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading -------------------------------------------------------------------------------------------------

    def revision(self) -> str:
        """A token that is new after every visible change; a cache made at the same token is current."""
        row = self._query("SELECT token FROM revisions ORDER BY id DESC LIMIT 1").fetchone()
        return "" if row is None else str(row[0])

    def knows_revision(self, token: str) -> bool:
        """Whether a cache made at this token is an ancestor that can be caught up; else it belongs to another file."""
        return self._query("SELECT 1 FROM revisions WHERE token = ?", token).fetchone() is not None

    def setting(self, key: str) -> str | None:
        """A stored setting, None where there is none."""
        row = self._query("SELECT value FROM meta WHERE key = ?", key).fetchone()
        return None if row is None else str(row[0])

    def generation(self) -> Generation | None:
        """The generation that answers, None before anything was embedded."""
        row = self._query(
            "SELECT id, fingerprint, dimensions, probe FROM generations"
            " WHERE id = (SELECT value FROM meta WHERE key = 'generation')"
        ).fetchone()
        return None if row is None else Generation(row[0], row[1], row[2], _from_blob(row[3]))

    def sources(self) -> list[SourceInfo]:
        """All sources with their sizes, by name."""
        rows = self._query(
            "SELECT s.source, s.added, d.title, d.n, d.characters, COALESCE(c.n, 0) FROM sources s"
            " JOIN (SELECT source_id, MIN(title) title, COUNT(*) n, SUM(characters) characters FROM documents"
            "       GROUP BY source_id) d ON d.source_id = s.id"
            " LEFT JOIN (SELECT source_id, COUNT(*) n FROM chunks GROUP BY source_id) c ON c.source_id = s.id"
            " WHERE s.active = 1 ORDER BY s.source"
        )
        return [
            SourceInfo(source, title or Path(source).stem, documents, chunks, characters, added)
            for source, added, title, documents, characters, chunks in rows
        ]

    def source_names(self) -> list[str]:
        """Names of all sources, sorted."""
        return [name for (name,) in self._query("SELECT source FROM sources WHERE active = 1 ORDER BY source")]

    def source_state(self, source: str) -> SourceState | None:
        """What was stored of a source's file, None where the source is not known."""
        row = self._query(
            "SELECT id, size, mtime_ns, sha256, settings FROM sources WHERE source = ? AND active = 1", source
        ).fetchone()
        return None if row is None else SourceState(*row)

    def chunk_ids(self) -> Ids:
        """Ids of all active chunks, ascending, int64 (n,)."""
        rows = self._query(
            "SELECT id FROM chunks WHERE source_id NOT IN (SELECT id FROM sources WHERE active = 0) ORDER BY id"
        )
        return np.fromiter((row[0] for row in rows), np.int64)

    def chunk_ids_of(self, source: str) -> Ids:
        """Ids of one source's active chunks, ascending; empty where the source is not known."""
        rows = self._query(
            "SELECT id FROM chunks WHERE source_id IN (SELECT id FROM sources WHERE source = ? AND active = 1)"
            " ORDER BY id",
            source,
        )
        return np.fromiter((row[0] for row in rows), np.int64)

    def chunk_count(self) -> int:
        """Number of active chunks."""
        row = self._query(
            "SELECT COUNT(*) FROM chunks WHERE source_id NOT IN (SELECT id FROM sources WHERE active = 0)"
        ).fetchone()
        return int(row[0])

    def chunks(self, ids: Iterable[int]) -> dict[int, StoredChunk]:
        """Active chunks by id; ids that are gone are left out."""
        return {chunk.id: chunk for chunk in self._chunks("c.id", [int(i) for i in ids])}

    def chunks_by_key(self, keys: Sequence[str]) -> dict[str, StoredChunk]:
        """Active chunks by public id; unknown ones are left out."""
        return {chunk.key: chunk for chunk in self._chunks("c.key", list(keys))}

    def document_ids(self, ids: Iterable[int]) -> dict[int, int]:
        """The document of each active chunk; ids that are gone are left out."""
        found: dict[int, int] = {}
        for part in _batches([int(i) for i in ids]):
            rows = self._query(
                "SELECT c.id, c.document_id FROM chunks c JOIN sources s ON s.id = c.source_id AND s.active = 1"
                f" WHERE c.id IN ({_marks(part)})",
                *part,
            )
            found.update(rows)
        return found

    def neighbours(self, document_id: int) -> list[StoredChunk]:
        """All chunks of a document in text order."""
        return sorted(self._chunks("c.document_id", [document_id]), key=lambda chunk: chunk.start)

    def document_text(self, document_id: int) -> str | None:
        """The whole normalised text of a document, None where it is gone."""
        row = self._query("SELECT text FROM documents WHERE id = ?", document_id).fetchone()
        return None if row is None else str(row[0])

    def index_texts(self, ids: Ids) -> Iterator[tuple[int, str]]:
        """(chunk id, text to index: title, headings and the chunk itself) for the ids."""
        for part in _batches([int(i) for i in ids]):
            for chunk in self._chunks("c.id", part):
                yield chunk.id, embedding_text(chunk.document())

    def vectors(self, generation: int, ids: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """Batches of (ids (n,), vectors (n, dimensions) float32) for the ids, ascending; without a vector left out."""
        wanted = np.sort(ids)
        if not len(wanted):
            return
        low = (generation << _GENERATION_SHIFT) + int(wanted[0])
        high = (generation << _GENERATION_SHIFT) + int(wanted[-1])
        rows = self._query("SELECT key, vector FROM vectors WHERE key BETWEEN ? AND ? ORDER BY key", low, high)
        while batch := rows.fetchmany(4096):
            found = np.array([row[0] for row in batch], np.int64) & ((1 << _GENERATION_SHIFT) - 1)
            keep = np.isin(found, wanted, assume_unique=True)
            if keep.any():
                blobs = b"".join(row[1] for row, kept in zip(batch, keep, strict=True) if kept)
                yield found[keep], _from_blob(blobs).reshape(int(keep.sum()), -1)

    def matching_ids(self, condition: MetadataFilter) -> Ids:
        """Ids of the active chunks whose metadata matches, ascending.

        A mapping asks for equality; a list of values for any of them; a metadata list matches where it holds one.
        """
        where = "source_id NOT IN (SELECT id FROM sources WHERE active = 0)"
        if callable(condition):
            rows = self._query(f"SELECT id, metadata FROM chunks WHERE {where} ORDER BY id")
            return np.fromiter((row[0] for row in rows if condition(json.loads(row[1]))), np.int64)
        parameters: list[Any] = []
        for key, value in condition.items():
            allowed = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
            where += (
                " AND EXISTS (SELECT 1 FROM json_each(metadata) field,"
                " json_each(CASE field.type WHEN 'array' THEN field.value ELSE json_array(field.value) END) entry"
                f" WHERE field.key = ? AND entry.value IN ({_marks(allowed)}))"
            )
            parameters += [key, *(_comparable(key, entry) for entry in allowed)]
        rows = self._query(f"SELECT id FROM chunks WHERE {where} ORDER BY id", *parameters)
        return np.fromiter((row[0] for row in rows), np.int64)

    # -- writing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        """The right to write, waited for: one writer at a time over all threads and processes.

        Raises:
            KnowledgeBaseError: the disk is full or the database is damaged; the last committed state stands.
        """
        lock = self._write_lock()
        with _translated(self.path):
            lock.acquire()
        try:
            yield Writer(self, self._connection())
        finally:
            lock.release()

    def _write_lock(self) -> FileLock:
        return FileLock(self.path / "write.lock")

    def _is_created(self) -> bool:
        """Whether there is a database with tables; SQLite makes the empty file first, and a crash may leave it."""
        return self._database.exists() and bool(self._query("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])

    def _create(self) -> None:
        if self._is_created():
            return  # another process was first
        self._connection().executescript(
            f"PRAGMA page_size = 16384; PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {_SCHEMA}"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )

    def _check_version(self) -> None:
        version = self._query("PRAGMA user_version").fetchone()[0]
        application = self._query("PRAGMA application_id").fetchone()[0]
        if application != APPLICATION_ID:
            raise KnowledgeBaseError(
                f"{self._database} 不是知识库文件；请换一个 --kb 目录",
                f"{self._database} is not a knowledge base; choose another --kb directory",
            )
        if version > SCHEMA_VERSION:
            raise KnowledgeBaseError(
                f"知识库 {self.path} 的格式版本是 {version}，本程序只认识到 {SCHEMA_VERSION}；请升级 ragproj",
                f"knowledge base {self.path} has format {version}, this program knows up to {SCHEMA_VERSION}; upgrade",
            )

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # used by one thread; closed by whichever thread closes the knowledge base
            connection = sqlite3.connect(self._database, timeout=60, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA synchronous = NORMAL")  # WAL: a crash loses nothing committed
            connection.execute("PRAGMA cache_size = -16384")
            self._local.connection = connection
            with self._lock:
                for thread in [thread for thread in self._connections if not thread.is_alive()]:
                    self._connections.pop(thread).close()
                self._connections[threading.current_thread()] = connection
        return connection

    def _query(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        with _translated(self.path):
            return self._connection().execute(sql, parameters)

    def _chunks(self, column: str, values: list[Any]) -> Iterator[StoredChunk]:
        for part in _batches(values):
            rows = self._query(
                "SELECT c.id, c.key, s.source, c.document_id, c.start, c.end, c.text, c.metadata FROM chunks c"
                f" JOIN sources s ON s.id = c.source_id AND s.active = 1 WHERE {column} IN ({_marks(part)})",
                *part,
            )
            for chunk_id, key, source, document_id, start, end, text, metadata in rows:
                yield StoredChunk(chunk_id, key, source, document_id, start, end, text, json.loads(metadata))


class Writer:
    """The one writer of a knowledge base; made by `KnowledgeBase.writing`."""

    def __init__(self, knowledge_base: KnowledgeBase, connection: sqlite3.Connection) -> None:
        self._kb = knowledge_base
        self._connection = connection

    def add_generation(self, fingerprint: str, probe: Vectors) -> Generation:
        """A first generation, made the one that answers."""
        with self._transaction() as run:
            cursor = run(
                "INSERT INTO generations (fingerprint, dimensions, probe, created) VALUES (?, ?, ?, ?)",
                (fingerprint, len(probe), _to_blob(probe), _now()),
            )
            generation = Generation(int(cursor.lastrowid or 0), fingerprint, len(probe), probe)
            run("INSERT OR REPLACE INTO meta VALUES ('generation', ?)", (str(generation.id),))
        return generation

    def begin_source(self, source: str, state: SourceState) -> tuple[int, int]:
        """An inactive source to fill: (its id, documents it already holds).

        One left behind by a run that died is taken up again when file and settings are the same, else dropped.
        """
        rows = self._connection.execute(
            "SELECT id, sha256, settings FROM sources WHERE source = ? AND active = 0", (source,)
        ).fetchall()
        resumed = [row[0] for row in rows if row[1:] == (state.sha256, state.settings) and state.sha256][:1]
        with self._transaction() as run:
            for row in rows:
                if row[0] not in resumed:
                    self._drop_source(row[0])
            if resumed:
                count = run("SELECT COUNT(*) FROM documents WHERE source_id = ?", (resumed[0],)).fetchone()[0]
                return resumed[0], count
            cursor = run(
                "INSERT INTO sources (source, active, size, mtime_ns, sha256, settings, added)"
                " VALUES (?, 0, ?, ?, ?, ?, ?)",
                (source, state.size, state.mtime_ns, state.sha256, state.settings, _now()),
            )
        return int(cursor.lastrowid or 0), 0

    def add_documents(
        self, source_id: int, documents: Sequence[NewDocument], generation: int, vectors: Vectors
    ) -> None:
        """Store documents of a source that `begin_source` opened, in one transaction.

        Args:
            source_id: from `begin_source`.
            documents: with their chunks.
            generation: whose vectors these are.
            vectors: (number of chunks, dimensions), in the order of the chunks.
        """
        with self._transaction() as run:
            self._insert(run, source_id, documents, generation, vectors)

    def replace_chunks(self, documents: Mapping[str, Sequence[NewDocument]], generation: int, vectors: Vectors) -> None:
        """Store documents by source name, visible at once, in place of the chunks that have their keys.

        One transaction: a failure leaves what was there.
        """
        keys = [chunk.key for entries in documents.values() for entry in entries for chunk in entry.chunks]
        with self._transaction() as run:
            self._drop_chunks(run, keys)
            row = 0
            for source, entries in documents.items():
                count = sum(len(entry.chunks) for entry in entries)
                self._insert(run, self._source_id(run, source), entries, generation, vectors[row : row + count])
                row += count
            self._bump(run)

    def _insert(
        self, run: Run, source_id: int, documents: Sequence[NewDocument], generation: int, vectors: Vectors
    ) -> None:
        blobs = iter(_to_blobs(vectors))
        for entry in documents:
            document = run(
                "INSERT INTO documents (source_id, title, text, characters) VALUES (?, ?, ?, ?)",
                (source_id, entry.title, entry.text, len(entry.text)),
            ).lastrowid
            for chunk in entry.chunks:
                metadata = json.dumps(dict(chunk.metadata), ensure_ascii=False)
                chunk_id = run(
                    "INSERT INTO chunks (key, source_id, document_id, start, end, text, metadata)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (chunk.key, source_id, document, chunk.start, chunk.end, chunk.text, metadata),
                ).lastrowid
                run("INSERT INTO vectors VALUES (?, ?)", (_vector_key(generation, int(chunk_id or 0)), next(blobs)))

    def activate(self, source_id: int) -> None:
        """Make a filled source visible and drop the version it replaces, at once."""
        with self._transaction() as run:
            (name,) = run("SELECT source FROM sources WHERE id = ?", (source_id,)).fetchone()
            for (old,) in run("SELECT id FROM sources WHERE source = ? AND id <> ?", (name, source_id)).fetchall():
                self._drop_source(old)
            run("UPDATE sources SET active = 1 WHERE id = ?", (source_id,))
            self._bump(run)

    def touch(self, source_id: int, state: SourceState) -> None:
        """Remember a file's new size and time when its content turned out to be the same."""
        with self._transaction() as run:
            run("UPDATE sources SET size = ?, mtime_ns = ? WHERE id = ?", (state.size, state.mtime_ns, source_id))

    def remove_sources(self, sources: Iterable[str]) -> int:
        """Remove sources with everything derived from them; returns how many were there."""
        removed = 0
        with self._transaction() as run:
            for source in sources:
                for source_id, active in run("SELECT id, active FROM sources WHERE source = ?", (source,)).fetchall():
                    self._drop_source(source_id)
                    removed += active
            if removed:
                self._bump(run)
        return removed

    def remove_chunks(self, keys: Sequence[str]) -> int:
        """Remove chunks by public id, and documents and sources left without any; returns how many were there."""
        with self._transaction() as run:
            removed = self._drop_chunks(run, keys)
            if removed:
                self._bump(run)
        return removed

    def _drop_chunks(self, run: Run, keys: Sequence[str]) -> int:
        removed = 0
        for part in _batches(list(keys)):
            rows = run(
                f"SELECT id, document_id, source_id FROM chunks WHERE key IN ({_marks(part)})",
                part,
            ).fetchall()
            for chunk, document, source in rows:
                run("DELETE FROM vectors WHERE key IN (SELECT id << 40 | ? FROM generations)", (chunk,))
                run("DELETE FROM chunks WHERE id = ?", (chunk,))
                run(
                    "DELETE FROM documents WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM chunks WHERE document_id = ?1)",
                    (document,),
                )
                run(
                    "DELETE FROM sources WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM documents WHERE source_id = ?1)",
                    (source,),
                )
            removed += len(rows)
        return removed

    def _source_id(self, run: Run, source: str) -> int:
        """The active source of that name, made if need be: where Python callers' documents go."""
        row = run("SELECT id FROM sources WHERE source = ? AND active = 1", (source,)).fetchone()
        if row is not None:
            return int(row[0])
        cursor = run("INSERT INTO sources (source, active, added) VALUES (?, 1, ?)", (source, _now()))
        return int(cursor.lastrowid or 0)

    def _bump(self, run: Run) -> None:
        # random, not a number: a restored backup counts the same numbers again for other contents
        run("INSERT INTO revisions (token) VALUES (?)", (uuid.uuid4().hex,))
        run("DELETE FROM revisions WHERE id <= (SELECT MAX(id) FROM revisions) - ?", (_REVISIONS_KEPT,))

    def _drop_source(self, source_id: int) -> None:
        run = self._connection.execute
        run(
            "DELETE FROM vectors WHERE key IN"
            " (SELECT g.id << 40 | c.id FROM chunks c, generations g WHERE c.source_id = ?)",
            (source_id,),
        )
        run("DELETE FROM chunks WHERE source_id = ?", (source_id,))
        run("DELETE FROM documents WHERE source_id = ?", (source_id,))
        run("DELETE FROM sources WHERE id = ?", (source_id,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Run]:
        with _translated(self._kb.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's and the file system's errors as sentences a user can act on."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "disk I/O" in str(error):
            raise KnowledgeBaseError(
                f"写入知识库 {path} 失败，磁盘可能已满（{error}）；已提交的内容完好，请腾出空间后重试",
                f"cannot write knowledge base {path}, the disk may be full ({error}); what was committed is intact,"
                " free some space and try again",
            ) from error
        raise KnowledgeBaseError(
            f"无法读写知识库 {path}：{error}；请检查目录权限，或稍后重试",
            f"cannot use knowledge base {path}: {error}; check its permissions, or try again later",
        ) from error
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.IntegrityError):
        raise  # a mistake in this program, not in the file
    except sqlite3.DatabaseError as error:
        raise KnowledgeBaseError(
            f"知识库文件 {path / 'kb.sqlite'} 已损坏（{error}），没有改动它；请从备份恢复，或换 --kb 目录重新 ingest",
            f"{path / 'kb.sqlite'} is damaged ({error}) and was left as it is; restore a backup, or ingest into another"
            " --kb directory",
        ) from error
    except OSError as error:
        raise KnowledgeBaseError(
            f"无法读写知识库目录 {path}：{error}；请检查权限和剩余空间",
            f"cannot use the knowledge base directory {path}: {error}; check its permissions and free space",
        ) from error


def _comparable(key: str, value: object) -> str | int | float:
    if isinstance(value, str | int | float):
        return value
    raise UsageError(
        f"过滤条件 {key} 的值应为字符串、数字或布尔值，实际是 {value!r}",
        f"the value of filter {key} must be a string, number or boolean, got {value!r}",
    )


def _vector_key(generation: int, chunk_id: int) -> int:
    return generation << _GENERATION_SHIFT | chunk_id


def _to_blob(vector: Vectors) -> bytes:
    # half precision: the cosine moves by less than 1e-6, the database is half the size
    return vector.astype(np.float16).tobytes()


def _to_blobs(vectors: Vectors) -> list[bytes]:
    return [row.tobytes() for row in vectors.astype(np.float16)]


def _from_blob(blob: bytes) -> Vectors:
    return np.frombuffer(blob, np.float16).astype(np.float32)


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _BATCH):
        yield values[start : start + _BATCH]


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
