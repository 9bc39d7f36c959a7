"""ingest: files -> knowledge base. Unchanged files cost nothing, unchanged chunks are not embedded again."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from langchain_core.documents import Document

from chains.embeddings import Vectors, count_tokens, embed_documents, max_tokens
from chains.fulltext import FullTextIndex
from chains.knowledge_base import Generation, NewChunk, NewDocument, SourceState, Writer
from chains.vectorstores import FaissVectorStore
from loaders.documents import LoaderConfig, check_path, find_files, load_documents
from loaders.errors import LoadError, RagProjError
from loaders.splitters import SplitterConfig, context_lines, embedding_text, split_document

logger = logging.getLogger(__name__)

# Chunks embedded and committed together: enough to keep an embedder busy, few enough to lose little to a crash.
_BATCH_CHUNKS = 512
# Of what the embedder sees, the part that title, headings and table header may take from a chunk.
_CONTEXT_TOKENS = 96

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
        self._splitter = _fit(splitter or SplitterConfig(), max_tokens(store.embeddings))
        # what a stored file depends on beside its bytes
        settings = {"pipeline": _PIPELINE_VERSION, "ocr": self._loader.ocr, **self._splitter.model_dump()}
        self._settings = json.dumps(settings, sort_keys=True)

    def ingest(
        self,
        paths: Sequence[Path],
        *,
        progress: Progress = lambda done, total, name: None,
        stop: threading.Event | None = None,
    ) -> IngestReport:
        """Store every supported file at or below the paths.

        Files that cannot be read are listed in the report; the others are stored all the same.

        Args:
            paths: files and folders.
            progress: called with files done, files in all, and the name of the one being read.
            stop: set it to end after the batch in hand; the report then covers the finished files.

        Raises:
            KnowledgeBaseError: the knowledge base cannot be written; finished files are stored.
        """
        started = time.monotonic()
        report = IngestReport()
        # absolute, so that a source has one name wherever the command runs
        found = find_files([Path(os.path.abspath(path)) for path in paths])  # noqa: PTH100 resolve() follows links
        files = [path for path in found.files if not self._is_own(path)]
        failures = [*found.errors, *_unsupported(path for path in found.unsupported if not self._is_own(path))]
        report.failed += [_failure(path, error) for path, error in failures]
        try:
            for done, path in enumerate(files):
                progress(done, len(files), path.name)
                self._ingest_reporting(path, report, stop)
        except StoppedError:
            logger.info("stopped after %d of %d files", done, len(files))
        finally:
            self.save_caches()
        progress(len(files), len(files), "")
        report.seconds = round(time.monotonic() - started, 3)
        return report

    def _is_own(self, path: Path) -> bool:
        """Whether a file belongs to the knowledge base itself, which may lie in the folder; uploads are documents."""
        home = self._kb.path.absolute()
        return path.is_relative_to(home) and not path.is_relative_to(home / "files")

    def save_caches(self) -> None:
        """Bring the FAISS file and the full-text index up to date."""
        self._store.save_cache()
        self._fulltext.save_cache()

    def _ingest_reporting(self, path: Path, report: IngestReport, stop: threading.Event | None) -> None:
        try:
            outcome, chunks = self._ingest_file(path, stop)
        except LoadError as error:
            report.failed.append(_failure(path, error))
            return
        setattr(report, outcome, getattr(report, outcome) + 1)
        report.chunks += chunks

    def _ingest_file(self, path: Path, stop: threading.Event | None) -> tuple[str, int]:
        """("added" | "updated" | "unchanged", chunks stored)."""
        source = str(path)
        state = _file_state(path, self._settings)
        known = self._kb.source_state(source)
        if known is not None and known.settings == self._settings:
            if (known.size, known.mtime_ns) == (state.size, state.mtime_ns):
                return "unchanged", 0
            state = _with_hash(path, state)
            if known.sha256 == state.sha256:
                with self._kb.writing() as writer:
                    writer.touch(known.id, state)
                return "unchanged", 0
        state = _with_hash(path, state)
        with self._kb.writing() as writer:
            return "added" if known is None else "updated", self._write(writer, path, state, stop)

    def _write(self, writer: Writer, path: Path, state: SourceState, stop: threading.Event | None) -> int:
        """Parse, split, embed and store one file; it becomes visible at the end, whole."""
        documents = load_documents(path, self._loader)
        first = next(documents)  # an unreadable file fails before anything is written
        generation = self._store.ensure_generation(writer)
        source_id, stored = writer.begin_source(str(path), state)
        reusable = self._stored_vectors(str(path), generation)
        chunks = 0
        remaining = itertools.islice(itertools.chain([first], documents), stored, None)
        for batch in _batches((document, self._split(document)) for document in remaining):
            if stop is not None and stop.is_set():
                raise StoppedError
            rows = [chunk for _, parts in batch for chunk in parts]
            vectors = self._embed(rows, reusable, generation)
            entries = [
                NewDocument(_title(document), document.page_content, _new_chunks(parts)) for document, parts in batch
            ]
            writer.add_documents(source_id, entries, generation.id, vectors)
            chunks += len(rows)
        writer.activate(source_id)
        return chunks

    def _split(self, document: Document) -> list[Document]:
        return split_document(document, self._splitter, lambda text: count_tokens(self._store.embeddings, text))

    def _stored_vectors(self, source: str, generation: Generation) -> dict[str, Vectors]:
        """Vectors the stored version of a source already has, by the text they were made of."""
        ids = self._kb.chunk_ids_of(source)
        texts = dict(self._kb.index_texts(ids))
        return {
            texts[int(i)]: vector
            for batch, vectors in self._kb.vectors(generation.id, ids)
            for i, vector in zip(batch, vectors, strict=True)
        }

    def _embed(self, chunks: Sequence[Document], reusable: dict[str, Vectors], generation: Generation) -> Vectors:
        texts = [embedding_text(chunk) for chunk in chunks]
        vectors = np.zeros((len(texts), generation.dimensions), np.float32)
        missing = [row for row, text in enumerate(texts) if text not in reusable]
        if missing:
            vectors[missing] = embed_documents(self._store.embeddings, [texts[row] for row in missing])
        for row, text in enumerate(texts):
            if text in reusable:
                vectors[row] = reusable[text]
        return vectors


def _failure(path: Path, error: LoadError) -> dict[str, str]:
    name, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (str(path), str(error)))
    return {"path": name, "reason": reason}


def _unsupported(paths: Iterable[Path]) -> Iterator[tuple[Path, LoadError]]:
    for path in paths:
        try:
            check_path(path)
        except LoadError as error:
            yield path, error


def _fit(config: SplitterConfig, limit: int | None) -> SplitterConfig:
    """The splitter's config with a chunk no longer than the embedder sees, title and headings included."""
    if limit is None or config.chunk_size + _CONTEXT_TOKENS <= limit:
        return config
    size = max(16, limit - _CONTEXT_TOKENS)
    logger.warning("chunk_size %d reduced to %d: the embedder sees %d tokens", config.chunk_size, size, limit)
    return config.model_copy(update={"chunk_size": size, "chunk_overlap": min(config.chunk_overlap, size // 4)})


def _batches(
    split: Iterable[tuple[Document, list[Document]]],
) -> Iterator[list[tuple[Document, list[Document]]]]:
    """Documents with their chunks, gathered until a batch has enough chunks."""
    batch: list[tuple[Document, list[Document]]] = []
    size = 0
    for document, chunks in split:
        batch.append((document, chunks))
        size += len(chunks)
        if size >= _BATCH_CHUNKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _new_chunks(chunks: Iterable[Document]) -> list[NewChunk]:
    return [
        NewChunk(_chunk_key(chunk), chunk.metadata["start"], chunk.metadata["end"], chunk.page_content, chunk.metadata)
        for chunk in chunks
    ]


def _chunk_key(chunk: Document) -> str:
    """A chunk's public id: the same for the same place and text of the same source, so that links to it last."""
    metadata = chunk.metadata
    place = json.dumps([metadata.get("source"), metadata.get("id"), metadata["start"], *context_lines(chunk)])
    return hashlib.blake2b(f"{place}\n{chunk.page_content}".encode(), digest_size=16).hexdigest()


def _title(document: Document) -> str:
    return str(document.metadata.get("title", ""))


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
