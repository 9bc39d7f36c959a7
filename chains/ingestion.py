"""ingest: files -> knowledge base. Unchanged files cost nothing, unchanged chunks are not embedded again."""

from __future__ import annotations

import contextlib
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

from chains.embeddings import Vectors, embed_documents, max_tokens, token_counter
from chains.fulltext import FullTextIndex
from chains.knowledge_base import Generation, SourceState
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
from loaders.splitters import SplitterConfig, split_document

logger = logging.getLogger(__name__)

# Chunks embedded and committed together: enough to keep an embedder busy, few enough to lose little to a crash.
_BATCH_CHUNKS = 512
# Of what the embedder sees, the part that title, headings and table header may take from a chunk.
_CONTEXT_TOKENS = 96

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
    """What an ingest did, in files; `chunks` counts those of added and updated files."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    chunks: int = 0
    seconds: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there was no file at all."""
        return not (self.added or self.updated or self.unchanged or self.failed)

    def as_dict(self) -> dict[str, Any]:
        """The report as `ingest --json` prints it."""
        return asdict(self)

    @contextlib.contextmanager
    def failures_of(self, path: Path) -> Iterator[None]:
        """What keeps a file from being stored, and not the others, goes into the list."""
        try:
            yield
        except (LoadError, SourceRemovedError) as error:
            self.failed.append(_failure(path, error))


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
        found = find_files([_absolute(path) for path in paths])
        files = [path for path in found.files if not self._is_own(path)]
        failures = [*found.errors, *_unsupported(path for path in found.unsupported if not self._is_own(path))]
        report.failed += [_failure(path, error) for path, error in failures]
        self._forget_lost()
        run = _Run(progress, stop, len(files))
        try:
            self._ingest_files(files, report, run)
            if sync:
                unreadable = [path for path, _ in found.errors]
                report.removed = self._remove_gone(paths, set(files), unreadable)
        except StoppedError:
            logger.info("stopped after %d of %d files", run.done, len(files))
        finally:
            self.save_caches()
        if report.updated or report.removed:
            self.compact_caches()
        progress(len(files), len(files), "")
        report.seconds = round(time.monotonic() - started, 3)
        return report

    def _forget_lost(self) -> None:
        """Drop what a run that died left of files that are gone: no later run would take it up or name it."""
        for source in self._kb.staged_sources():
            if not Path(source).exists():
                with self._kb.claimed(source):
                    self._kb.writer().drop_staged(source)

    def _remove_gone(self, paths: Sequence[Path], files: set[Path], unreadable: Sequence[Path]) -> int:
        """Remove sources that came from the folders and are not among the files; nothing below what cannot be read."""
        folders = [_absolute(path) for path in paths if path.is_dir()]
        gone = [
            source
            for source in self._kb.file_sources()
            if Path(source) not in files
            and any(Path(source).is_relative_to(folder) for folder in folders)
            and not any(Path(source).is_relative_to(path) for path in unreadable)
        ]
        return self._kb.writer().remove_sources(gone) if gone else 0

    def _is_own(self, path: Path) -> bool:
        """Whether a file belongs to the knowledge base itself, which may lie in the folder; uploads are documents."""
        home = self._kb.path.absolute()
        return path.is_relative_to(home) and not path.is_relative_to(home / "files")

    def save_caches(self) -> None:
        """Bring the FAISS file and the full-text index up to date."""
        self._store.save_cache()
        self._fulltext.save_cache()

    def compact_caches(self) -> None:
        """Take what was removed out of the caches' files for good: seconds, for when nobody waits."""
        self._store.compact_cache()
        self._fulltext.compact()

    def _ingest_files(self, files: Sequence[Path], report: IngestReport, run: _Run) -> None:
        """Files in order; the new texts of small ones next to each other are embedded together."""
        waiting: list[_ReadFile] = []
        for number, path in enumerate(files):
            run.check()
            run.report(path.name, waiting[0].number if waiting else number)
            with report.failures_of(path):
                read = self._read(number, path)
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
            with report.failures_of(file.path):
                outcome, chunks = self._write_claimed(file, ahead, run)
                setattr(report, outcome, getattr(report, outcome) + 1)
                report.chunks += chunks

    def _read(self, number: int, path: Path) -> _ReadFile | None:
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
        return self._loaded(number, path, state)

    def _loaded(self, number: int, path: Path, state: SourceState) -> _ReadFile:
        documents = load_documents(path, self._loader)
        beginning = next(_batches(map(self._new_document, documents)))
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
            known = self._stored_vectors(str(file.path), generation)
            for document in file.beginning:
                if document.content_hash in new:
                    new.remove(document.content_hash)  # copies share the chunks of the first one
                    wanted |= dict.fromkeys(text for text in document.texts() if text not in known)
        texts = list(wanted)
        return dict(zip(texts, embed_documents(self._store.embeddings, texts), strict=True))

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
                    file = self._loaded(file.number, file.path, state)
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
        for batch in _batches(itertools.chain(file.beginning[stored:], map(self._new_document, rest))):
            run.check()
            _require_unchanged(path, state)  # else one version's text would be stored under another one's hash
            writer.add_documents(source_id, batch)
        _require_unchanged(path, state)
        while True:
            self._embed(writer, source_id, path, generation, ahead, run)
            try:
                return writer.activate(source_id, generation.id)
            except GenerationChangedError:
                generation = self._store.ensure_generation()  # or refused by name: by another embedder

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
        known = ChainMap(ahead, self._stored_vectors(str(path), generation) if len(missing) else {})
        for start in range(0, len(missing), _BATCH_CHUNKS):
            run.check()
            if len(missing) > _BATCH_CHUNKS:
                run.report(f"{path.name} {start}/{len(missing)}")
            texts = dict(self._kb.index_texts(missing[start : start + _BATCH_CHUNKS]))
            new = [text for text in dict.fromkeys(texts.values()) if text not in known]
            fresh = dict(zip(new, embed_documents(self._store.embeddings, new), strict=True))
            vectors = np.array([known[text] if text in known else fresh[text] for text in texts.values()], np.float32)
            writer.add_vectors(generation.id, np.array(list(texts), np.int64), vectors)

    def _stored_vectors(self, source: str, generation: Generation) -> dict[str, Vectors]:
        """Vectors the stored version of a source already has, by the text they were made of."""
        ids = self._kb.chunk_ids_of(source)
        if not len(ids):
            return {}
        texts = dict(self._kb.index_texts(ids))
        return {
            texts[int(i)]: vector
            for batch, vectors in self._kb.vectors(generation.id, ids)
            for i, vector in zip(batch, vectors, strict=True)
            if int(i) in texts
        }


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


def _absolute(path: Path) -> Path:
    """The path as sources are named: the same wherever the command runs, links as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100 resolve() would follow links


def _fit(config: SplitterConfig, limit: int | None) -> SplitterConfig:
    """The splitter's config with a chunk no longer than the embedder sees, title and headings included."""
    if limit is None or config.chunk_size + _CONTEXT_TOKENS <= limit:
        return config
    size = max(16, limit - _CONTEXT_TOKENS)
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
