"""ingest: files -> knowledge base. Unchanged files cost nothing, unchanged chunks are not embedded again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from langchain_core.documents import Document

from chains.embeddings import Vectors, cut_texts, embed_documents, max_tokens, token_counter
from chains.fulltext import FullTextIndex
from chains.knowledge_base import Generation, Ids, KnowledgeBase, SourceState, batches
from chains.knowledge_base_titles import retitle
from chains.knowledge_base_writer import (
    GenerationChangedError,
    NewChunk,
    NewDocument,
    SourceRemovedError,
    Writer,
    content_hash,
)
from chains.vectorstores import FaissVectorStore
from loaders.documents import LoaderConfig, check_path, find_files, load_documents
from loaders.errors import LoadError, RagProjError
from loaders.splitters import CONTEXT_TOKENS, SplitterConfig, split_document

logger = logging.getLogger(__name__)

# Chunks embedded and committed together: enough to keep an embedder busy, few enough to lose little to a crash.
_BATCH_CHUNKS = 512
_ATTEMPTS = 3  # to read a file that is being replaced
# Raise it when a change to the loaders or the splitter should make stored files be read again.
_PIPELINE_VERSION = 1

Progress = Callable[[int, int, str], None]


class StoppedError(RagProjError):
    """The user stopped the run; what was committed stays."""

    def __init__(self) -> None:
        super().__init__("已停止，完成的文件已保存", "stopped; finished files are stored")


@dataclass
class IngestReport:
    """What an ingest did, in files; `chunks` counts those of added and updated files.

    `cut` counts texts of new chunks whose end the embedder did not see, as far as it says so.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    chunks: int = 0
    cut: int = 0
    seconds: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there was no file at all, and none that had to be removed."""
        return not (self.added or self.updated or self.unchanged or self.removed or self.failed)

    def as_dict(self) -> dict[str, Any]:
        """The report as `ingest --json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class _ReadFile:
    """A file that was read and cut, to be written: all of a small one, of a big one the beginning."""

    number: int
    """its place among the files of the run"""
    path: Path
    state: SourceState
    beginning: list[NewDocument]
    chunks: int
    """of the beginning"""
    rest: Iterator[Document] | None
    """documents that are not read yet; None where there are none"""


class Ingestor:
    """Writes files into one knowledge base with one embedder and one way of splitting."""

    def __init__(
        self,
        store: FaissVectorStore,
        fulltext: FullTextIndex,
        *,
        loader: LoaderConfig | None = None,
        splitter: SplitterConfig | None = None,
    ) -> None:
        self._store = store
        self._kb = store.knowledge_base
        self._fulltext = fulltext
        self._too_long = 0
        self._loader = loader or LoaderConfig()
        self._count_tokens = token_counter(store.embeddings)
        self._splitter = _fit(splitter or SplitterConfig(), max_tokens(store.embeddings))
        # what a stored file depends on beside its bytes
        settings = {"pipeline": _PIPELINE_VERSION, "ocr": self._loader.ocr, **self._splitter.model_dump()}
        self._settings = json.dumps(settings, sort_keys=True)

    def ingest(
        self,
        paths: Sequence[Path],
        *,
        sync: bool = False,
        progress: Progress = lambda done, total, name: None,
        stop: threading.Event | None = None,
    ) -> IngestReport:
        """Store every supported file at or below the paths.

        Files that cannot be read are listed in the report; the others are stored all the same.

        Args:
            paths: files and folders.
            sync: also remove what was ingested from these folders and is not there any more.
            progress: called with files done, files in all, and the name of the one being read.
            stop: set it to end after the batch in hand; the report then covers the finished files.

        Raises:
            KnowledgeBaseError: the knowledge base cannot be written; finished files are stored.
        """
        started = time.monotonic()
        report = IngestReport()
        self._too_long = 0
        found = find_files([_absolute(path) for path in paths])
        files = [path for path in found.files if not self._is_own(path)]
        failures = [*found.errors, *_unsupported(path for path in found.unsupported if not self._is_own(path))]
        report.failed += [_failure(path, error) for path, error in failures]
        self._forget_lost()
        run = _Run(progress, stop, len(files))
        try:
            self._ingest_files(files, report, run)
            if sync:
                report.removed = self._remove_gone(paths)
        except StoppedError:
            logger.info("stopped after %d of %d files", run.done, len(files))
        finally:
            self.save_caches()
        if report.updated or report.removed:
            self.compact_caches()
        progress(len(files), len(files), "")
        report.cut = self._too_long
        report.seconds = round(time.monotonic() - started, 3)
        return report

    def _forget_lost(self) -> None:
        """Drop what a run that died left of files that are gone: no later run would take it up or name it."""
        for source in self._kb.staged_sources():
            if _is_gone(source):
                self._drop_staged(source)

    def _drop_staged(self, source: str) -> None:
        if source in self._kb.staged_sources():
            with self._kb.claimed(source):  # not what another run is writing
                self._kb.writer().drop_staged(source)

    def _remove_gone(self, paths: Sequence[Path]) -> int:
        """Remove sources that came from the folders and whose files are not there any more.

        Each is looked for now: since the folders were listed, others may have added and ingested files.
        """
        folders = [_absolute(path) for path in paths if os.path.isdir(path)]  # noqa: PTH112 Path.is_dir may raise
        gone = [
            source
            for source in self._kb.file_sources()
            if any(Path(source).is_relative_to(folder) for folder in folders) and _is_gone(source)
        ]
        return self.remove(gone)

    def remove(self, sources: Sequence[str]) -> int:
        """Remove sources, half-written versions too, with everything that only they have; how many were visible."""
        if not sources:
            return 0
        retitle(self._store, self._kb.source_ids(sources))
        return self._kb.writer().remove_sources(sources)

    def _is_own(self, path: Path) -> bool:
        """Whether a file belongs to the knowledge base itself, which may lie in the folder; uploads are documents."""
        home = _absolute(self._kb.path)
        return path.is_relative_to(home) and not path.is_relative_to(home / "files")

    def save_caches(self) -> None:
        """Bring the FAISS file and the full-text index up to date."""
        self._store.save_cache()
        self._fulltext.save_cache()

    def compact_caches(self) -> None:
        """Take what was removed out of the caches' files for good: seconds, for when nobody waits."""
        self._store.compact_cache()
        self._fulltext.compact()
        if self._kb.owes_space:
            self._kb.writer().give_back_space()

    def _ingest_files(self, files: Sequence[Path], report: IngestReport, run: _Run) -> None:
        """Files in order; the new texts of small ones next to each other are embedded together."""
        waiting: list[_ReadFile] = []
        for number, path in enumerate(files):
            run.check()
            run.report(path.name, waiting[0].number if waiting else number)
            with self._failing_alone(path, report):
                read = self._read(number, path, run)
                if read is None:
                    report.unchanged += 1
                else:
                    waiting.append(read)
            if waiting and (waiting[-1].rest is not None or sum(file.chunks for file in waiting) >= _BATCH_CHUNKS):
                self._write_waiting(waiting, report, run)
                waiting = []
        self._write_waiting(waiting, report, run)

    def _write_waiting(self, waiting: Sequence[_ReadFile], report: IngestReport, run: _Run) -> None:
        ahead = self._vectors_ahead(waiting)
        for file in waiting:
            run.check()
            run.report(file.path.name, file.number)
            with self._failing_alone(file.path, report):
                outcome, chunks = self._write_claimed(file, ahead, run)
                setattr(report, outcome, getattr(report, outcome) + 1)
                report.chunks += chunks

    @contextlib.contextmanager
    def _failing_alone(self, path: Path, report: IngestReport) -> Iterator[None]:
        """What keeps this file from being stored, and not the others, goes into the report.

        Nothing stays of a version that cannot be read whole: no run could take it up.
        """
        try:
            yield
        except (LoadError, SourceRemovedError) as error:
            report.failed.append(_failure(path, error))
            self._drop_staged(str(path))

    def _read(self, number: int, path: Path, run: _Run) -> _ReadFile | None:
        """A file's beginning, or all of a small one; None for one that is stored as it is.

        Raises:
            LoadError: it cannot be read.
        """
        state = _file_state(path, self._settings)
        known = self._kb.source_state(str(path))
        same = known if known is not None and known.settings == state.settings else None
        if same is not None and (same.size, same.mtime_ns) == (state.size, state.mtime_ns):
            return None
        state = _with_hash(path, state)
        if same is not None and same.sha256 == state.sha256:
            self._kb.writer().touch(same.id, state)
            return None
        return self._loaded(number, path, state, run)

    def _loaded(self, number: int, path: Path, state: SourceState, run: _Run) -> _ReadFile:
        documents = load_documents(path, self._loader)
        beginning = next(_batches(self._cut(documents, run)))
        chunks = sum(len(document.chunks) for document in beginning)
        return _ReadFile(number, path, state, beginning, chunks, documents if chunks >= _BATCH_CHUNKS else None)

    def _vectors_ahead(self, files: Sequence[_ReadFile]) -> dict[str, Vectors]:
        """Vectors of texts of several small files, by text, so that a model gets more than a file's few at a time.

        What is stored already is left out; a single file is embedded piece by piece when it is written.
        """
        small = [file for file in files if file.rest is None]
        if len(small) < 2:
            return {}
        generation = self._store.ensure_generation()
        new = self._kb.unknown_contents(document.content_hash for file in small for document in file.beginning)
        wanted: dict[str, None] = {}
        for file in small:
            known = _KnownVectors(self._kb, generation, self._kb.chunk_ids_of(str(file.path)))
            for document in file.beginning:
                if document.content_hash in new:
                    new.remove(document.content_hash)  # copies share the chunks of the first one
                    texts = document.texts()
                    stored = known.of(texts)
                    wanted |= dict.fromkeys(text for text in texts if text not in stored)
        texts = list(wanted)
        return dict(zip(texts, self._embedded(texts), strict=True))

    def _write_claimed(self, file: _ReadFile, ahead: dict[str, Vectors], run: _Run) -> tuple[str, int]:
        """("added" | "updated" | "unchanged", chunks stored)."""
        source = str(file.path)
        with self._kb.claimed(source):
            known = self._kb.source_state(source)
            for _ in range(_ATTEMPTS):
                if known is not None and (known.sha256, known.settings) == (file.state.sha256, file.state.settings):
                    return "unchanged", 0  # another run was faster
                try:
                    self._write(file, ahead, run)
                    return "added" if known is None else "updated", len(self._kb.chunk_ids_of(source))
                except _FileChangedError:
                    self._kb.writer().drop_staged(source)
                    state = _with_hash(file.path, _file_state(file.path, self._settings))
                    file = self._loaded(file.number, file.path, state, run)
        raise LoadError(
            f"{file.path}：读取时文件一直在变化，请稍后重试",
            f"{file.path}: it keeps changing while it is read; try later",
        )

    def _write(self, file: _ReadFile, ahead: dict[str, Vectors], run: _Run) -> None:
        """Store and embed one file; it becomes visible at the end, whole.

        A run that is stopped or dies leaves what it stored and embedded, to be taken up by the next one.
        """
        path, state = file.path, file.state
        generation = self._store.ensure_generation()
        writer = self._kb.writer()
        source_id, stored = writer.begin_source(str(path), state)
        rest = itertools.islice(file.rest or (), max(0, stored - len(file.beginning)), None)
        for batch in _batches(itertools.chain(file.beginning[stored:], self._cut(rest, run))):
            run.check()
            _require_unchanged(path, state)  # else one version's text would be stored under another one's hash
            writer.add_documents(source_id, batch)
        _require_unchanged(path, state)
        while True:
            self._embed(writer, source_id, path, generation, ahead, run)
            retitle(self._store, self._kb.source_ids([str(path)]) - {source_id})
            try:
                return writer.activate(source_id, generation.id)
            except GenerationChangedError:
                generation = self._store.ensure_generation()  # or refused by name: by another embedder

    def _cut(self, documents: Iterable[Document], run: _Run) -> Iterator[NewDocument]:
        for document in documents:
            run.check()
            yield self._new_document(document)

    def _new_document(self, document: Document) -> NewDocument:
        metadata = {key: value for key, value in document.metadata.items() if key != "marks"}
        title = str(metadata.get("title", ""))
        text, marks = document.page_content, document.metadata.get("marks", [])
        # a copy under another name is the same: a title taken from the file's name is not part of the content, nor is
        # one that the text itself begins with
        stem = re.escape(Path(str(metadata.get("source", ""))).stem)
        told = re.fullmatch(rf"{stem}(?: \d+)?", title) is not None or title in text[: len(title) + 100]
        own_title = "" if told else title
        identity = content_hash(self._settings, own_title, text, marks)
        chunks = split_document(document, self._splitter, self._count_tokens)
        new = [_new_chunk(chunk, identity, set(metadata)) for chunk in chunks]
        return NewDocument(identity, title, text, metadata, new)

    def _embedded(self, texts: Sequence[str]) -> Vectors:
        """Vectors of new texts, (n, dimensions); those that the embedder had to cut are counted."""
        embeddings = self._store.embeddings
        before = cut_texts(embeddings)
        vectors = embed_documents(embeddings, texts)
        self._too_long += cut_texts(embeddings) - before
        return vectors

    def _embed(
        self,
        writer: Writer,
        source_id: int,
        path: Path,
        generation: Generation,
        ahead: dict[str, Vectors],
        run: _Run,
    ) -> None:
        """Give every chunk of a staged source its vector: the one its text has already, or a new one."""
        missing = self._kb.without_vector(generation.id, source_id=source_id)
        replaced = self._kb.chunk_ids_of(str(path), but_of=source_id) if len(missing) else missing
        known = _KnownVectors(self._kb, generation, replaced)
        for start in range(0, len(missing), _BATCH_CHUNKS):
            run.check()
            if len(missing) > _BATCH_CHUNKS:
                run.report(f"{path.name} {start}/{len(missing)}")
            texts = dict(self._kb.index_texts(missing[start : start + _BATCH_CHUNKS]))
            stored = ChainMap(ahead, known.of(texts.values()))
            new = [text for text in dict.fromkeys(texts.values()) if text not in stored]
            fresh = dict(zip(new, self._embedded(new), strict=True))
            vectors = np.array([stored[text] if text in stored else fresh[text] for text in texts.values()], np.float32)
            writer.add_vectors(generation.id, np.array(list(texts), np.int64), vectors)


class _KnownVectors:
    """Vectors that chunks have already, found by the texts these were made of.

    Holds 16 bytes a chunk: the texts and vectors of a file of a million records would be gigabytes.
    """

    def __init__(self, knowledge_base: KnowledgeBase, generation: Generation, ids: Ids) -> None:
        self._kb, self._generation = knowledge_base, generation
        rows = ((hash(text), number) for number, text in knowledge_base.index_texts(ids))
        hashed = np.fromiter(rows, [("hash", np.int64), ("id", np.int64)])
        self._hashes, first = np.unique(hashed["hash"], return_index=True)
        self._ids = hashed["id"][first]

    def of(self, texts: Iterable[str]) -> dict[str, Vectors]:
        """Vectors of those of the texts that have one."""
        if not len(self._ids):
            return {}
        wanted = np.array([hash(text) for text in texts], np.int64)
        ids = self._ids[np.isin(self._hashes, wanted)]
        found: dict[str, Vectors] = {}
        for part in batches(ids.tolist()):
            by_id = dict(self._kb.index_texts(np.array(part)))  # read back: hashes may be equal where texts are not
            for batch, vectors in self._kb.vectors(self._generation.id, np.array(part)):
                found.update((by_id[int(i)], v) for i, v in zip(batch, vectors, strict=True) if int(i) in by_id)
        return found


class _Run:
    """One ingest on its way: where it stands, and whether it shall go on."""

    def __init__(self, progress: Progress, stop: threading.Event | None, total: int) -> None:
        self._progress, self._stop = progress, stop
        self.done, self.total = 0, total

    def report(self, name: str, done: int | None = None) -> None:
        """Tell what is being read or written, and how many files are finished, all before the next one."""
        self.done = self.done if done is None else done
        self._progress(self.done, self.total, name)

    def check(self) -> None:
        """Raise `StoppedError` when the user wants to stop."""
        if self._stop is not None and self._stop.is_set():
            raise StoppedError


def _is_gone(source: str) -> bool:
    """Whether there is nothing of that name; what the system does not tell (no permission) is taken to be there."""
    try:
        os.lstat(source)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


def _absolute(path: Path) -> Path:
    """The path as sources are named: the same wherever the command runs, links as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100 resolve() would follow links


def _fit(config: SplitterConfig, limit: int | None) -> SplitterConfig:
    """The splitter's config with a chunk no longer than the embedder sees, title and headings included."""
    if limit is None or config.chunk_size + CONTEXT_TOKENS <= limit:
        return config
    size = max(16, limit - CONTEXT_TOKENS)
    logger.warning("chunk_size %d reduced to %d: the embedder sees %d tokens", config.chunk_size, size, limit)
    return config.model_copy(update={"chunk_size": size, "chunk_overlap": min(config.chunk_overlap, size // 4)})


def _batches(documents: Iterable[NewDocument]) -> Iterator[list[NewDocument]]:
    """Documents gathered until they have enough chunks for a transaction."""
    batch: list[NewDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.chunks)
        if size >= _BATCH_CHUNKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _failure(path: Path, error: RagProjError) -> dict[str, str]:
    name, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (str(path), str(error)))
    return {"path": name, "reason": reason}


def _unsupported(paths: Iterable[Path]) -> Iterator[tuple[Path, LoadError]]:
    for path in paths:
        try:
            check_path(path)
        except LoadError as error:
            yield path, error


def _new_chunk(chunk: Document, identity: str, shared: set[str]) -> NewChunk:
    """A chunk as it is stored; its key is the same for the same place of the same content, so that links to it last."""
    start, end = chunk.metadata["start"], chunk.metadata["end"]
    key = hashlib.blake2b(f"{identity}:{start}:{end}".encode(), digest_size=16).hexdigest()
    place = {name: value for name, value in chunk.metadata.items() if name not in shared}
    return NewChunk(key, start, end, chunk.page_content, place)


class _FileChangedError(Exception):
    """A file is not the version that was hashed any more."""


def _require_unchanged(path: Path, state: SourceState) -> None:
    now = _file_state(path, cast("str", state.settings))
    if (now.size, now.mtime_ns) != (state.size, state.mtime_ns):
        raise _FileChangedError


def _file_state(path: Path, settings: str) -> SourceState:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a GBK name, say, from an archive unpacked elsewhere: no database stores it
        raise LoadError(f"{path}：文件名不是 UTF-8，请改名", f"{path}: the file name is not UTF-8; rename it") from None
    try:
        stat = path.stat()
    except OSError as error:
        raise LoadError(f"无法读取 {path}：{error.strerror}", f"cannot read {path}: {error.strerror}") from error
    return SourceState(0, stat.st_size, stat.st_mtime_ns, None, settings)


def _with_hash(path: Path, state: SourceState) -> SourceState:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"无法读取 {path}：{error.strerror}", f"cannot read {path}: {error.strerror}") from error
    return SourceState(state.id, state.size, state.mtime_ns, digest, cast("str", state.settings))
