"""FullTextIndex: BM25 over Chinese terms with tantivy, a cache of the knowledge base."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from chains.analysis import index_terms, terms
from chains.caches import read_cache, write_cache
from chains.clause_scores import read_question
from chains.knowledge_base import Changes, Ids, KnowledgeBase, KnowledgeBaseError

logger = logging.getLogger(__name__)

_MAX_TERMS = 256  # of a question; more would be a document
_LEAST_BITS = 2.0  # of a single character asked for: 的, 是, 在 stand everywhere
# tantivy only marks what is removed and drops its words when segments are merged, some day. An index this small is
# written anew at once, in milliseconds; a bigger one by `compact`, or when half of it is dead.
_REWRITTEN_AT_ONCE = 1_000
_DEAD_SHARE_AT_MOST = 0.5
# `compact` writes an index anew up to this size (two seconds' work), or with such a share of it dead.
_COMPACTED_UP_TO = 20_000
_COMPACTED_SHARE = 0.1
_FEW = 1_000  # allowed ids that are part of the query; more are sieved from its hits
_WAIT_S = 2.0  # of a question, for another process that updates the index; then the state before answers
_WAIT_FIRST_S = 60.0  # where there is no state before
_HEAP_BYTES = 64 << 20
_FORMAT = 3  # of the terms and the schema; raise it when either changes and every index is rebuilt


class IndexBusyError(KnowledgeBaseError):
    """Another process is building the index, and there is no older one to answer from."""


class FullTextIndex:
    """BM25 search over a knowledge base's chunks.

    The index lives in a folder of its own below `fulltext/`, named by the state file `fulltext.state`. While the folder
    is being written the state says so; found like that, it is rebuilt. It follows the knowledge base at the cost of
    what changed. What is removed is found no more at once; its postings leave the disk with `compact`, which whoever
    removed something calls when the user has his answer.
    """

    def __init__(self, knowledge_base: KnowledgeBase) -> None:
        self._kb = knowledge_base
        self._root = knowledge_base.path / "fulltext"
        self._state_path = knowledge_base.path / "fulltext.state"
        self._lock = threading.Lock()
        self._revision = ""
        self._folder = ""
        self._index: Any = None
        self._verified: dict[str, _Verified] = {}  # files of the folder that were read through already

    def search(self, query: str, k: int, allowed: Ids | None = None) -> list[tuple[int, float]]:
        """(chunk id, BM25 score) of the k best chunks, best first, ties by id; only `allowed` ids where given.

        Raises:
            IndexBusyError: another process has been building the index for a minute, and there is no older one.
        """
        words = query_terms(query)
        if not words or k <= 0:
            return []
        for _ in range(2):
            with self._lock:
                self._refresh(_WAIT_S if self._index is not None else _WAIT_FIRST_S)
                index = self._index
            if index is None:
                return []
            try:
                return _search(index, words, k, allowed)
            except BaseException as error:  # a damaged file is a ValueError or a panic, which is no Exception
                if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                    raise
                logger.warning("the full-text index was damaged while in use (%s); rebuilding it", error)
                with self._lock:  # the checksums will not hold any more
                    self._index, self._revision, self._folder = None, "", ""
                    self._verified.clear()
        return []

    def ids(self) -> Ids:
        """Ids of the chunks it finds, ascending."""
        with self._lock:
            self._refresh(_WAIT_FIRST_S)
            return _ids_in(self._index) if self._index is not None else np.zeros(0, np.int64)

    @staticmethod
    def has_terms(text: str) -> bool:
        """Whether a text has anything to search for."""
        return bool(terms(text))

    def save_cache(self) -> None:
        """Bring the index up to date, so that the next question does not have to."""
        with self._lock, contextlib.suppress(IndexBusyError):  # then it is being brought up to date
            self._refresh(_WAIT_FIRST_S)

    def compact(self) -> None:
        """Drop the postings of what was removed from the disk, where that takes seconds or is much of the index.

        Questions are answered meanwhile. An index above 20,000 chunks keeps dead postings up to a tenth of it.
        """
        self.save_cache()
        with self._lock:
            index, folder, revision = self._index, self._folder, self._revision
        if index is None or not _worth_compacting(_dead_in(self._root / folder), index.searcher().num_docs):
            return
        try:
            with FileLock(self._kb.path / "fulltext.lock", timeout=60.0):
                if self._header().get("folder") != folder:
                    return  # another process has just done it
                made = self._written_anew()
        except (Timeout, OSError, ValueError) as error:
            logger.warning("cannot compact the full-text index (%s); its dead postings stay for now", error)
            return
        with self._lock:
            if self._revision == revision:
                self._use(*made)

    def _refresh(self, wait_s: float) -> None:
        """Catch up with the knowledge base; where another process is at it for longer, answer from the older state.

        Raises:
            IndexBusyError: there is no older state.
        """
        if self._kb.revision() == self._revision:
            return
        try:
            with FileLock(self._kb.path / "fulltext.lock", timeout=wait_s):
                self._use(*self._caught_up())
        except Timeout:
            if self._index is None:
                raise IndexBusyError(
                    f"知识库 {self._kb.path} 的关键词索引正在由另一个进程建立，请稍后重试",
                    f"another process is building the keyword index of knowledge base {self._kb.path}; try again later",
                ) from None
            logger.info("another process is updating the full-text index; answering from the previous state")
        except (OSError, ValueError) as error:  # tantivy tells I/O errors as ValueError
            logger.warning("cannot update the full-text index (%s); answering from the previous state", error)

    def _use(self, index: Any, folder: str, revision: str) -> None:
        self._index, self._folder, self._revision = index, folder, revision

    def _caught_up(self) -> tuple[Any, str, str]:
        """(index, its folder, its revision), brought up to date or built."""
        header = self._header()
        if header:
            try:
                return self._followed(header)
            except ValueError as error:  # what is there cannot be built upon
                logger.warning("the full-text index is damaged (%s); rebuilding it", error)
        return self._written_anew()

    def _followed(self, header: dict[str, Any]) -> tuple[Any, str, str]:
        """An index that is there, caught up at the cost of what changed, or written anew where much of it is dead.

        Raises:
            ValueError: tantivy cannot read it, or it does not hold what it should.
        """
        folder, revision = header["folder"], header["revision"]
        index = self._opened(folder, header["documents"])
        if revision == self._kb.revision():
            return index, folder, revision
        changes = self._kb.changes_since(revision) if header["whole"] else None
        if changes is None:
            newest, active = self._kb.snapshot()
            held = _ids_in(index)
            changes = Changes(newest, np.setdiff1d(active, held, True), np.setdiff1d(held, active, True))
        dead = _dead_in(self._root / folder) + len(changes.hidden)
        alive = header["documents"] + len(changes.shown) - len(changes.hidden)
        if dead and (alive <= _REWRITTEN_AT_ONCE or dead > _DEAD_SHARE_AT_MOST * (alive + dead)):
            return self._written_anew()
        return self._written(folder, changes, header["documents"])

    def _header(self) -> dict[str, Any]:
        """The state of an index that can be caught up; empty where one must be built."""
        cached = read_cache(self._state_path)
        if cached is None:
            return {}
        header, _ = cached
        if header.get("format") != _FORMAT or header.get("writing") or not self._kb.knows_revision(header["revision"]):
            logger.info("the full-text index is unfinished or belongs to another state; rebuilding it")
            return {}
        if self._checksums(header["folder"]) != header["files"]:
            logger.warning("the full-text index is damaged; rebuilding it")
            return {}
        return header

    def _written_anew(self) -> tuple[Any, str, str]:
        """A new index of everything, in a folder of its own."""
        revision, active = self._kb.snapshot()
        return self._written(f"index-{uuid.uuid4().hex[:12]}", Changes(revision, active, active[:0]), 0)

    def _written(self, folder: str, changes: Changes, held: int) -> tuple[Any, str, str]:
        """A folder that holds so many documents, with changes written to it, marked as being written meanwhile."""
        import tantivy

        path = self._root / folder
        path.mkdir(parents=True, exist_ok=True)
        header = {"format": _FORMAT, "revision": changes.revision, "folder": folder}
        write_cache(self._state_path, header | {"writing": True}, b"")
        index = tantivy.Index(_schema(), str(path))
        writer = index.writer(_HEAP_BYTES, 1)
        for chunk in changes.hidden:
            writer.delete_documents_by_term("id", int(chunk))
        for chunk_id, text in self._kb.index_texts(changes.shown):
            document = tantivy.Document()
            document.add_integer("id", chunk_id)
            document.add_text("text", " ".join(index_terms(text)))
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        del writer, index
        index = self._opened(folder)
        documents = index.searcher().num_docs
        # a chunk may have been removed since the changes were listed: its text is gone, the next time all is compared
        whole = documents == held + len(changes.shown) - len(changes.hidden)
        state = {"documents": documents, "whole": whole, "files": self._checksums(folder)}
        write_cache(self._state_path, header | state, b"")
        for other in self._root.iterdir():
            if other.name != folder:
                shutil.rmtree(other, ignore_errors=True)  # a reader that still maps it keeps its open files
        return index, folder, changes.revision

    def _opened(self, folder: str, documents: int | None = None) -> Any:
        """The index in a folder.

        Raises:
            ValueError: tantivy cannot read it, or it does not hold that many documents.
        """
        import tantivy

        index = tantivy.Index(_schema(), str(self._root / folder))
        if documents is not None and index.searcher().num_docs != documents:
            raise ValueError(f"{index.searcher().num_docs} documents instead of {documents}")
        return index

    def _checksums(self, folder: str) -> dict[str, int]:
        """CRC-32 of every file of a folder: tantivy itself would panic on a damaged one, in the middle of a query.

        tantivy never changes a file of a segment: one that was read through is not read again while it is the same.
        """
        known, self._verified = self._verified, {}
        for path in sorted((self._root / folder).glob("*")):
            if path.is_file() and not path.name.endswith(".lock"):
                stat = path.stat()
                signature = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                name = f"{folder}/{path.name}"
                same = name in known and known[name].signature == signature and path.suffix != ".json"
                checksum = known[name].checksum if same else zlib.crc32(path.read_bytes())
                self._verified[name] = _Verified(signature, checksum)
        return {name.partition("/")[2]: file.checksum for name, file in self._verified.items()}


@dataclass(frozen=True)
class _Verified:
    """A file that was read through: its inode, size and time of change, and its CRC-32."""

    signature: tuple[int, int, int]
    checksum: int


def _worth_compacting(dead: int, alive: int) -> bool:
    return dead > 0 and (alive <= _COMPACTED_UP_TO or dead > _COMPACTED_SHARE * (alive + dead))


def _dead_in(folder: Path) -> int:
    """Documents that are marked as removed and still in the segments, by tantivy's own list of these."""
    segments = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["segments"]
    return sum((segment["deletes"] or {"num_deleted_docs": 0})["num_deleted_docs"] for segment in segments)


def _ids_in(index: Any) -> Ids:
    """Ids of the chunks an index holds, ascending."""
    import tantivy

    searcher = index.searcher()
    if not searcher.num_docs:
        return np.zeros(0, np.int64)
    hits = searcher.search(tantivy.Query.all_query(), searcher.num_docs, count=False).hits
    return np.sort(np.array(searcher.fast_field_values("id", [address for _, address in hits]), np.int64))


def _search(index: Any, words: list[str], k: int, allowed: Ids | None) -> list[tuple[int, float]]:
    import tantivy

    clauses = [(tantivy.Occur.Should, tantivy.Query.term_query(index.schema, "text", word, "freq")) for word in words]
    question = tantivy.Query.boolean_query(clauses)
    if allowed is not None and len(allowed) <= _FEW:  # looked up by id instead of found among everything
        chosen = tantivy.Query.term_set_query(index.schema, "id", allowed.tolist())
        unscored = tantivy.Query.boost_query(chosen, 0.0)
        question = tantivy.Query.boolean_query([(tantivy.Occur.Must, question), (tantivy.Occur.Must, unscored)])
    searcher = index.searcher()
    wanted = None if allowed is None else {int(i) for i in allowed}
    fetch = min(k + 1, searcher.num_docs)  # one more, to see whether a tie goes on behind the last one
    while fetch:
        hits = searcher.search(question, fetch, count=False).hits
        ids = searcher.fast_field_values("id", [address for _, address in hits])
        found = [(chunk, float(score)) for chunk, (score, _) in zip(ids, hits, strict=True)]
        kept = found if wanted is None else [hit for hit in found if hit[0] in wanted]
        complete = len(hits) < fetch or fetch == searcher.num_docs
        if complete or (len(kept) > k and kept[k - 1][1] > found[-1][1]):
            return sorted(kept, key=lambda hit: (-hit[1], hit[0]))[:k]
        fetch = min(fetch * 8, searcher.num_docs)
    return []


def query_terms(question: str) -> list[str]:
    """What is asked of the index: pairs, words and telling single characters, each once, question words left out.

    A question of nothing but such words is asked for as it stands.
    """
    asked = read_question(question)
    telling = (character for character, bits in asked.characters.items() if bits >= _LEAST_BITS)
    return list(dict.fromkeys([*asked.pairs, *telling] or terms(question)))[:_MAX_TERMS]


def _schema() -> Any:
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("id", indexed=True, fast=True)
    # terms come separated by spaces from chains.analysis; positions are not needed for BM25
    builder.add_text_field("text", stored=False, tokenizer_name="whitespace", index_option="freq")
    return builder.build()
