"""The knowledge base: one SQLite database that is the truth; every index is a cache derived from it.

Layout of the directory: `kb.sqlite` (WAL), `locks/`, the caches `faiss-*` and `fulltext*`, and `files/` for documents
uploaded through the page.

A source (a file, or whatever Python callers name) holds documents: one, or one a record. Documents with the same text
share one content, which is cut into chunks and embedded once; each chunk has one vector in each generation. A source
is written in batches under an inactive row that no reader sees and switched on in one transaction, which also drops
what it replaces: a crash leaves the old version whole and the new one ready to be resumed. A chunk id never stands for
another text, so a cache is current when it holds exactly the ids that are active here.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from langchain_core.documents import Document

from chains import schema
from chains.connections import Connections
from chains.embeddings import Vectors
from chains.id_runs import count_of_runs, from_runs
from chains.knowledge_base_filters import MetadataFilter, allowed_values, holds, matches
from loaders.errors import RagProjError
from loaders.splitters import text_with_context

if TYPE_CHECKING:
    from chains.knowledge_base_writer import Writer

Ids = npt.NDArray[np.int64]

_TRACES = ("faiss-*", "fulltext*", "files/*")  # of a knowledge base that was in use
_LOCKS = 64  # for all sources together: a lock file each would never go away
_BATCH = 500  # ids in one IN (...) list, well below SQLite's limit
_VECTOR_BATCH = 4096
_FOLLOWED = 200_000  # ids in a list of changes; to compare everything is no dearer than a longer one

# A condition on `chunks`: not of contents that only sources in the making hold. In the statement itself, so that it
# speaks of the same moment; mostly nothing is in the making, and the first half is all that is looked at.
_VISIBLE = (
    "(NOT EXISTS (SELECT 1 FROM sources WHERE active = 0) OR EXISTS (SELECT 1 FROM documents d JOIN sources s"
    " ON s.id = d.source_id WHERE s.active = 1 AND d.content_id = chunks.content_id))"
)
_CHUNK_COLUMNS = (
    "SELECT c.id, c.key, s.source, d.id, c.start, c.end, c.text, d.metadata, c.metadata, t.title FROM chunks c"
    " JOIN contents t ON t.id = c.content_id JOIN documents d ON d.content_id = c.content_id"
    " JOIN sources s ON s.id = d.source_id AND s.active = 1"
)


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
    embedder: dict[str, Any] | None = None
    """the embedder's section of the config; None for one passed from Python"""


@dataclass(frozen=True)
class Changes:
    """Chunks that readers see since an older revision, and those they see no more; ascending, int64."""

    revision: str
    shown: Ids
    hidden: Ids


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
class StoredChunk:
    """A chunk as it is read back, under one of the documents that hold it."""

    id: int
    key: str
    source: str
    document_id: int
    start: int
    end: int
    text: str
    metadata: dict[str, Any]
    title: str
    """the one it was embedded and indexed with"""
    duplicates: tuple[dict[str, Any], ...] = ()
    """metadata, with `source`, of further documents with the same text"""

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
        self._connections = Connections(self._database)
        self._lock = threading.Lock()
        self._claims: dict[int, FileLock] = {}
        self.owes_space = False  # a reader kept the last removal's log from being emptied
        if not self._is_created():
            if not create:
                raise KnowledgeBaseError(
                    f"知识库 {self.path} 不存在；请先运行 ragproj ingest 文件夹 --kb {self.path}",
                    f"knowledge base {self.path} does not exist; first run ragproj ingest FOLDER --kb {self.path}",
                )
            with translated(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                with self._creation_lock():
                    if not self._is_created():  # another process may have been first
                        schema.create(self._connection())
        self._check_version()

    def close(self) -> None:
        """Close every thread's connection."""
        self._connections.close()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- state ---------------------------------------------------------------------------------------------------

    def revision(self) -> str:
        """A token that is new after every visible change; a cache made at the same token is current."""
        row = self._row("SELECT token FROM revisions ORDER BY id DESC LIMIT 1")
        return "" if row is None else str(row[0])

    def knows_revision(self, token: str) -> bool:
        """Whether a cache made at this token is an ancestor that can be caught up; else it belongs to another file."""
        return self._row("SELECT 1 FROM revisions WHERE token = ?", token) is not None

    def changes_since(self, token: str) -> Changes | None:
        """What became of the chunks since a revision, to follow it at the cost of the change.

        None where that is not known (the revision is too old or of another file, or the change was a very big one):
        then `snapshot` has to be compared.
        """
        rows = self._rows(
            "SELECT token, shown, hidden FROM revisions"
            " WHERE id >= (SELECT id FROM revisions WHERE token = ?) ORDER BY id",
            token,
        )
        if not rows or any(shown is None or hidden is None for _, shown, hidden in rows[1:]):
            return None
        if sum(count_of_runs(blob) for _, *blobs in rows[1:] for blob in blobs) > _FOLLOWED:
            return None
        shown, hidden = set[int](), set[int]()
        with decoding(self.path):
            for _, *blobs in rows[1:]:
                appeared, disappeared = (set(from_runs(blob).tolist()) for blob in blobs)
                # what came and went in between was never there, and the other way round
                hidden, shown = hidden | disappeared - shown, shown - disappeared
                hidden, shown = hidden - appeared, shown | appeared - hidden
        return Changes(rows[-1][0], *(np.array(sorted(ids), np.int64) for ids in (shown, hidden)))

    def snapshot(self) -> tuple[str, Ids]:
        """(revision, ids of its active chunks, ascending int64 (n,)), both of the same moment."""
        # one string instead of a tuple an id is several times faster; one statement sees one moment
        row = self._row(
            "SELECT (SELECT token FROM revisions ORDER BY id DESC LIMIT 1),"
            f" (SELECT group_concat(id) FROM chunks WHERE {_VISIBLE})"
        )
        assert row is not None
        listed = row[1] or ""
        ids = np.fromstring(listed, np.int64, sep=",") if listed else np.zeros(0, np.int64)
        return row[0] or "", np.sort(ids)

    def generation(self) -> Generation | None:
        """The generation that answers, None before anything was embedded."""
        return self._chosen("generation")

    def generations(self) -> list[Generation]:
        """All generations, the one that answers, those being made and those kept, oldest first."""
        rows = self._rows("SELECT id, fingerprint, dimensions, probe, embedder FROM generations ORDER BY id")
        with decoding(self.path):
            return [
                Generation(
                    number, name, dimensions, from_blob(probe), None if embedder is None else json.loads(embedder)
                )
                for number, name, dimensions, probe, embedder in rows
            ]

    def previous_generation(self) -> Generation | None:
        """The generation that answered before the last switch, kept to go back to; None where there is none."""
        return self._chosen("previous_generation")

    def _chosen(self, key: str) -> Generation | None:
        chosen = self._row("SELECT value FROM meta WHERE key = ?", key)
        with decoding(self.path):
            number = None if chosen is None else int(chosen[0])
        return next((generation for generation in self.generations() if generation.id == number), None)

    def sources(self) -> list[SourceInfo]:
        """All sources with their sizes, by name."""
        rows = self._rows(
            "SELECT s.source, s.added, MIN(d.title), COUNT(*), COALESCE(SUM(c.n), 0), SUM(d.characters) FROM sources s"
            " JOIN documents d ON d.source_id = s.id"
            " LEFT JOIN (SELECT content_id, COUNT(*) n FROM chunks GROUP BY content_id) c USING (content_id)"
            " WHERE s.active = 1 GROUP BY s.id ORDER BY s.source"
        )
        return [
            SourceInfo(source, title or Path(source).stem, documents, chunks, characters, added)
            for source, added, title, documents, chunks, characters in rows
        ]

    def staged_sources(self) -> list[str]:
        """Names of the sources that are being written, or were when their run died, sorted."""
        return [name for (name,) in self._rows("SELECT DISTINCT source FROM sources WHERE active = 0 ORDER BY source")]

    def source_names(self) -> list[str]:
        """Names of all sources, sorted."""
        return [name for (name,) in self._rows("SELECT source FROM sources WHERE active = 1 ORDER BY source")]

    def file_sources(self) -> list[str]:
        """Names of the sources that were read from files, half-written ones too, sorted."""
        rows = self._rows("SELECT DISTINCT source FROM sources WHERE sha256 IS NOT NULL ORDER BY source")
        return [name for (name,) in rows]

    def source_state(self, source: str) -> SourceState | None:
        """What was stored of a source's file, None where the source is not known."""
        row = self._row(
            "SELECT id, size, mtime_ns, sha256, settings FROM sources WHERE source = ? AND active = 1", source
        )
        return None if row is None else SourceState(*row)

    def source_ids(self, sources: Iterable[str]) -> set[int]:
        """Ids of all versions of the sources, half-written ones too."""
        found: set[int] = set()
        for part in batches(list(sources)):
            found |= {row[0] for row in self._rows(f"SELECT id FROM sources WHERE source IN ({marks(part)})", *part)}
        return found

    # -- chunks --------------------------------------------------------------------------------------------------

    def chunk_ids(self) -> Ids:
        """Ids of all active chunks, ascending, int64 (n,)."""
        return self.snapshot()[1]

    def chunk_ids_of(self, source: str, *, but_of: int | None = None) -> Ids:
        """Ids of one source's active chunks, ascending; empty where the source is not known.

        Without those that the source with the id `but_of`, such as its version in the making, holds too.
        """
        rows = self._rows(
            "SELECT id FROM chunks WHERE content_id IN (SELECT d.content_id FROM documents d JOIN sources s"
            " ON s.id = d.source_id WHERE s.source = ? AND s.active = 1"
            " EXCEPT SELECT content_id FROM documents WHERE source_id = ?) ORDER BY id",
            source,
            but_of,
        )
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def chunk_count(self) -> int:
        """Number of active chunks."""
        row = self._row(f"SELECT COUNT(*) FROM chunks WHERE {_VISIBLE}")
        assert row is not None
        return int(row[0])

    def chunks(self, ids: Iterable[int], condition: MetadataFilter | None = None) -> dict[int, StoredChunk]:
        """Active chunks by id; ids that are gone are left out.

        Args:
            ids: of chunks.
            condition: of several documents with the same text, tell only of those that match it.
        """
        return {chunk.id: chunk for chunk in self._chunks("c.id", [int(i) for i in ids], condition)}

    def chunks_by_key(self, keys: Sequence[str]) -> dict[str, StoredChunk]:
        """Active chunks by public id; unknown ones are left out."""
        return {chunk.key: chunk for chunk in self._chunks("c.key", list(keys))}

    def document_ids(self, ids: Iterable[int]) -> dict[int, int]:
        """The content of each active chunk, as an id that chunks of one document share; ids that are gone left out."""
        found: dict[int, int] = {}
        for part in batches([int(i) for i in ids]):
            rows = self._rows(f"SELECT id, content_id FROM chunks WHERE id IN ({marks(part)}) AND {_VISIBLE}", *part)
            found.update(rows)
        return found

    def neighbours(self, document_id: int) -> list[StoredChunk]:
        """All chunks of a document in text order."""
        row = self._row("SELECT content_id FROM documents WHERE id = ?", document_id)
        chunks = [] if row is None else self._chunks("c.content_id", [row[0]])
        return sorted(chunks, key=lambda chunk: chunk.start)

    def document_text(self, document_id: int) -> str | None:
        """The whole normalised text of a document, None where it is gone."""
        row = self._row(
            "SELECT t.text FROM documents d JOIN contents t ON t.id = d.content_id WHERE d.id = ?", document_id
        )
        return None if row is None else str(row[0])

    def index_texts(self, ids: Ids) -> Iterator[tuple[int, str]]:
        """(chunk id, text to embed and index: title, headings and the chunk itself) for the ids, staged ones too."""
        for part in batches([int(i) for i in ids]):
            rows = self._rows(
                "SELECT c.id, c.text, c.metadata, t.title FROM chunks c JOIN contents t ON t.id = c.content_id"
                f" WHERE c.id IN ({marks(part)})",
                *part,
            )
            for chunk_id, text, place, title in rows:
                with decoding(self.path):
                    metadata = {"title": title, **json.loads(place)}
                yield chunk_id, text_with_context(text, metadata)

    def vectors(self, generation: int, ids: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """Batches of (ids (n,), vectors (n, dimensions) float32) for the ids, ascending; without a vector left out."""
        wanted = np.sort(ids)
        if len(wanted) <= _BATCH:  # few among many: not everything between the first and the last
            yield from self._vectors_of(generation, wanted)
            return
        position, high = (vector_key(generation, int(wanted[end])) for end in (0, -1))
        while position <= high:
            batch = self._rows(
                f"SELECT key, vector FROM vectors WHERE key BETWEEN ? AND ? ORDER BY key LIMIT {_VECTOR_BATCH}",
                position,
                high,
            )
            if not batch:
                return
            position = batch[-1][0] + 1
            found = np.array([row[0] for row in batch], np.int64) & ((1 << schema.GENERATION_SHIFT) - 1)
            keep = np.isin(found, wanted, assume_unique=True)
            if keep.any():
                blobs = [row[1] for row, kept in zip(batch, keep, strict=True) if kept]
                yield found[keep], self._decoded(blobs)

    def _vectors_of(self, generation: int, ids: Ids) -> Iterator[tuple[Ids, Vectors]]:
        keys = [vector_key(generation, int(i)) for i in ids]
        rows = self._rows(f"SELECT key, vector FROM vectors WHERE key IN ({marks(keys)}) ORDER BY key", *keys)
        if rows:
            found = np.array([row[0] for row in rows], np.int64) & ((1 << schema.GENERATION_SHIFT) - 1)
            yield found, self._decoded([row[1] for row in rows])

    def _decoded(self, blobs: list[bytes]) -> Vectors:
        """Stored vectors as rows, (n, dimensions)."""
        with decoding(self.path):
            if len({len(blob) for blob in blobs}) > 1:
                raise ValueError("vectors of one generation differ in length")
            return from_blob(b"".join(blobs)).reshape(len(blobs), -1)

    def unknown_contents(self, hashes: Iterable[str]) -> set[str]:
        """Those of the content hashes under which nothing is stored."""
        unknown = set(hashes)
        for part in batches(sorted(unknown)):
            unknown -= {row[0] for row in self._rows(f"SELECT hash FROM contents WHERE hash IN ({marks(part)})", *part)}
        return unknown

    def without_vector(self, generation: int, *, source_id: int | None = None) -> Ids:
        """Ids of the chunks, staged ones too, that a generation has no vector of; of one source where given."""
        where = (
            "" if source_id is None else ("content_id IN (SELECT content_id FROM documents WHERE source_id = ?) AND ")
        )
        rows = self._rows(
            f"SELECT id FROM chunks c WHERE {where}NOT EXISTS (SELECT 1 FROM vectors WHERE key = ? | c.id) ORDER BY id",
            *([] if source_id is None else [source_id]),
            vector_key(generation, 0),
        )
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def matching_ids(self, condition: MetadataFilter) -> Ids:
        """Ids of the active chunks whose metadata, under any of their documents, matches; ascending.

        A mapping asks for equality; a list of values for any of them; a metadata list matches where it holds one.
        """
        where, parameters = "", []
        for key, value in {} if callable(condition) else condition.items():
            values = allowed_values(key, value)
            where += f" AND ({holds('d.metadata', values)} OR {holds('c.metadata', values)})"
            parameters += [key, *values, key, *values]
        rows = self._rows(
            "SELECT c.id, d.metadata, c.metadata FROM chunks c JOIN documents d ON d.content_id = c.content_id"
            f" JOIN sources s ON s.id = d.source_id AND s.active = 1{where} ORDER BY c.id",
            *parameters,
        )
        if callable(condition):
            with decoding(self.path):
                merged = [{**json.loads(document), **json.loads(place)} for _, document, place in rows]
            rows = [row for row, metadata in zip(rows, merged, strict=True) if condition(metadata)]
        return np.unique(np.fromiter((row[0] for row in rows), np.int64, len(rows)))

    def _chunks(self, column: str, values: list[Any], condition: MetadataFilter | None = None) -> Iterator[StoredChunk]:
        for part in batches(values):
            rows = self._rows(f"{_CHUNK_COLUMNS} WHERE {column} IN ({marks(part)}) ORDER BY c.id, d.id", *part)
            by_chunk: dict[int, list[StoredChunk]] = {}
            with decoding(self.path):
                for number, key, source, document, start, end, text, of_document, of_chunk, title in rows:
                    metadata = {**json.loads(of_document), **json.loads(of_chunk)}
                    chunk = StoredChunk(number, key, source, document, start, end, text, metadata, title)
                    by_chunk.setdefault(number, []).append(chunk)
            for same in by_chunk.values():
                yield _with_duplicates(same, condition)

    # -- writing -------------------------------------------------------------------------------------------------

    def writer(self) -> Writer:
        """What changes the knowledge base, from this thread. Its transactions wait for those of others."""
        from chains.knowledge_base_writer import Writer

        with translated(self.path):
            return Writer(self, self._connection())

    @contextlib.contextmanager
    def claimed(self, source: str) -> Iterator[None]:
        """The right to write a source, waited for: two runs that read the same file take turns."""
        stripe = zlib.crc32(source.encode()) % _LOCKS
        with self._lock:
            if stripe not in self._claims:  # kept: making one takes as long as claiming
                self._claims[stripe] = FileLock(self.path / "locks" / f"{stripe:02}.lock")
            lock = self._claims[stripe]
        with translated(self.path):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _creation_lock(self) -> FileLock:
        return FileLock(self.path / "create.lock")

    def _is_created(self) -> bool:
        """Whether there is a database with tables; SQLite makes the empty file first, and a crash may leave it."""
        if not self._database.exists():
            return False
        tables = "SELECT COUNT(*) FROM sqlite_master"
        if self._number(tables):
            return True
        traces = any(path for pattern in _TRACES for path in self.path.glob(pattern))
        if traces and not self._number(tables):  # not made just now by another process
            raise _damage(self.path, "0 bytes")
        return traces

    def _check_version(self) -> None:
        version, application = (self._number(f"PRAGMA {name}") for name in ("user_version", "application_id"))
        if application != schema.APPLICATION_ID:
            raise KnowledgeBaseError(
                f"{self._database} 不是知识库文件；请换一个 --kb 目录",
                f"{self._database} is not a knowledge base; choose another --kb directory",
            )
        if version < 1:
            raise _damage(self.path, f"format {version}")
        if version > schema.SCHEMA_VERSION:
            raise KnowledgeBaseError(
                f"知识库 {self.path} 的格式版本是 {version}，本程序只认识到 {schema.SCHEMA_VERSION}；请升级 ragproj",
                f"knowledge base {self.path} has format {version}, this program knows up to {schema.SCHEMA_VERSION};"
                " upgrade ragproj",
            )
        with translated(self.path):
            if not schema.is_current(self._connection()):
                with self._creation_lock():
                    schema.migrate(self._connection())
                for name in schema.OLD_FILES:
                    (self.path / name).unlink(missing_ok=True)

    def _connection(self) -> sqlite3.Connection:
        return self._connections.current()

    def _rows(self, sql: str, *parameters: Any) -> list[Any]:
        # all at once: damage shows while rows are read, too
        with translated(self.path):
            return self._connection().execute(sql, parameters).fetchall()

    def _row(self, sql: str, *parameters: Any) -> Any | None:
        with translated(self.path):
            return self._connection().execute(sql, parameters).fetchone()

    def _number(self, sql: str) -> int:
        row = self._row(sql)
        assert row is not None
        return int(row[0])


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's and the file system's errors as sentences a user can act on."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "decode to UTF-8" in str(error):  # its message goes on with the whole text
            raise _damage(path, "text that is not UTF-8") from error
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
        raise _damage(path, str(error)) from error
    except OSError as error:
        raise KnowledgeBaseError(
            f"无法读写知识库目录 {path}：{error}；请检查权限和剩余空间",
            f"cannot use the knowledge base directory {path}: {error}; check its permissions and free space",
        ) from error


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Values in the database that are not what was written, as the damage they are."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise _damage(path, str(error)) from error


def _damage(path: Path, what: str) -> KnowledgeBaseError:
    return KnowledgeBaseError(
        f"知识库文件 {path / 'kb.sqlite'} 已损坏（{what}），没有改动它；请从备份恢复，或换 --kb 目录重新 ingest",
        f"{path / 'kb.sqlite'} is damaged ({what}) and was left as it is; restore a backup, or ingest into another"
        " --kb directory",
    )


def vector_key(generation: int, chunk_id: int) -> int:
    """The key of a chunk's vector in a generation."""
    return generation << schema.GENERATION_SHIFT | chunk_id


def from_blob(blob: bytes) -> Vectors:
    """The vector, or vectors one after another, of a stored half-precision blob."""
    return np.frombuffer(blob, np.float16).astype(np.float32)


def batches(values: list[Any]) -> Iterator[list[Any]]:
    """The values in lists short enough for one statement."""
    for start in range(0, len(values), _BATCH):
        yield values[start : start + _BATCH]


def marks(values: Sequence[Any]) -> str:
    """Placeholders for the values."""
    return ",".join("?" * len(values))


def _with_duplicates(same: list[StoredChunk], condition: MetadataFilter | None) -> StoredChunk:
    """One chunk under the first of its documents, the others as its duplicates; of those that match, if asked for."""
    if condition is not None:
        same = [chunk for chunk in same if matches(chunk.metadata, condition)] or same[:1]
    chunk = same[0]
    others = tuple({**other.metadata, "source": other.source} for other in same[1:])
    return StoredChunk(**{**vars(chunk), "duplicates": others}) if others else chunk
