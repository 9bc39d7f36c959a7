"""FullTextIndex: BM25 over Chinese terms with tantivy, a cache of the knowledge base."""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from chains.analysis import index_terms, terms
from chains.caches import read_cache, write_cache
from chains.clause_scores import read_question
from chains.knowledge_base import Ids, KnowledgeBase

logger = logging.getLogger(__name__)

_MAX_TERMS = 256  # of a question; more would be a document
_LEAST_BITS = 2.0  # of a single character asked for: 的, 是, 在 stand everywhere
# tantivy only marks what is removed and drops its words when segments are merged, some day. An index this small (a
# second's work), or with so much to remove, is written anew without them.
_SOON_REBUILT = 20_000
_DEAD_SHARE = 0.1
_FEW = 1_000  # allowed ids that are part of the query; more are sieved from its hits
_HEAP_BYTES = 64 << 20
_FORMAT = 2  # of the terms and the schema; raise it when either changes and every index is rebuilt


class FullTextIndex:
    """BM25 search over a knowledge base's chunks.

    The index lives in a folder of its own below `fulltext/`, named by the state file `fulltext.state`, which also
    holds the ids it contains. While the folder is being written the state says so; found like that, it is rebuilt.
    """

    def __init__(self, knowledge_base: KnowledgeBase) -> None:
        self._kb = knowledge_base
        self._root = knowledge_base.path / "fulltext"
        self._state_path = knowledge_base.path / "fulltext.state"
        self._lock = threading.Lock()
        self._revision = ""
        self._folder = ""
        self._index: Any = None

    def search(self, query: str, k: int, allowed: Ids | None = None) -> list[tuple[int, float]]:
        """(chunk id, BM25 score) of the k best chunks, best first, ties by id; only `allowed` ids where given."""
        words = query_terms(query)
        if not words or k <= 0:
            return []
        for _ in range(2):
            with self._lock:
                self._refresh(wait_s=2.0)
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
        return []

    def ids(self) -> Ids:
        """Ids of the chunks it finds, ascending."""
        import tantivy

        with self._lock:
            self._refresh(wait_s=60.0)
            if self._index is None:
                return np.zeros(0, np.int64)
            searcher = self._index.searcher()
        if not searcher.num_docs:
            return np.zeros(0, np.int64)
        hits = searcher.search(tantivy.Query.all_query(), searcher.num_docs, count=False).hits
        return np.sort(np.array([searcher.doc(address)["id"][0] for _, address in hits], np.int64))

    @staticmethod
    def has_terms(text: str) -> bool:
        """Whether a text has anything to search for."""
        return bool(terms(text))

    def save_cache(self) -> None:
        """Bring the index up to date, so that the next question does not have to."""
        with self._lock:
            self._refresh(wait_s=60.0)

    def _refresh(self, wait_s: float) -> None:
        """Catch up with the knowledge base; where another process is at it for longer, answer from the older state."""
        revision = self._kb.revision()
        if revision == self._revision:
            return
        try:
            with FileLock(self._kb.path / "fulltext.lock", timeout=wait_s):
                self._catch_up(revision)
        except Timeout:
            logger.info("another process is updating the full-text index; answering from the previous state")
        except (OSError, ValueError) as error:  # tantivy tells I/O errors as ValueError
            logger.warning("cannot update the full-text index (%s); answering from the previous state", error)

    def _catch_up(self, revision: str) -> None:
        active, nothing = self._kb.chunk_ids(), np.zeros(0, np.int64)
        state = self._read_state()
        if state is not None:
            current, folder, held = state
            gone = len(np.setdiff1d(held, active))
            rewrite = gone and (gone > _DEAD_SHARE * len(held) or len(active) <= _SOON_REBUILT)
            try:
                if current == revision:
                    self._open(folder, revision, len(held))
                    return
                if not rewrite:
                    self._write(folder, revision, held, active)
                    return
            except ValueError as error:  # what is there cannot be built upon
                logger.warning("the full-text index is damaged (%s); rebuilding it", error)
        self._write(_new_folder(), revision, nothing, active)

    def _read_state(self) -> tuple[str, str, Ids] | None:
        """(revision, folder, ids held) of an index that can be caught up; None where one must be built."""
        cached = read_cache(self._state_path)
        if cached is None:
            return None
        header, payload = cached
        if header.get("format") != _FORMAT or header.get("writing") or not self._kb.knows_revision(header["revision"]):
            logger.info("the full-text index is unfinished or belongs to another state; rebuilding it")
            return None
        if _checksums(self._root / header["folder"]) != header["files"]:
            logger.warning("the full-text index is damaged; rebuilding it")
            return None
        return header["revision"], header["folder"], np.frombuffer(payload, np.int64)

    def _write(self, folder: str, revision: str, held: Ids, active: Ids) -> None:
        """Bring a folder from the ids it holds to the active ones, marked as being written meanwhile."""
        import tantivy

        path = self._root / folder
        path.mkdir(parents=True, exist_ok=True)
        header = {"format": _FORMAT, "revision": revision, "folder": folder}
        write_cache(self._state_path, header | {"writing": True}, b"")
        index = tantivy.Index(_schema(), str(path))
        writer = index.writer(_HEAP_BYTES, 1)
        for chunk in np.setdiff1d(held, active):
            writer.delete_documents_by_term("id", int(chunk))
        written: list[int] = []
        for chunk_id, text in self._kb.index_texts(np.setdiff1d(active, held)):
            document = tantivy.Document()
            document.add_integer("id", chunk_id)
            document.add_text("text", " ".join(index_terms(text)))
            writer.add_document(document)
            written.append(chunk_id)
        writer.commit()
        writer.wait_merging_threads()
        del writer, index
        # what was really written: a chunk may have been removed since the ids were listed
        ids = np.union1d(np.intersect1d(held, active), np.array(written, np.int64))
        self._open(folder, revision, len(ids))
        write_cache(self._state_path, header | {"files": _checksums(path)}, ids.tobytes())
        for other in self._root.iterdir():
            if other.name != folder:
                shutil.rmtree(other, ignore_errors=True)  # a reader that still maps it keeps its open files

    def _open(self, folder: str, revision: str, documents: int) -> None:
        """Answer from a folder from now on.

        Raises:
            ValueError: tantivy cannot read it, or it does not hold that many documents.
        """
        import tantivy

        index = tantivy.Index(_schema(), str(self._root / folder))
        if index.searcher().num_docs != documents:
            raise ValueError(f"{index.searcher().num_docs} documents instead of {documents}")
        self._index, self._folder, self._revision = index, folder, revision


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
        found = [(searcher.doc(address)["id"][0], float(score)) for score, address in hits]
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


def _new_folder() -> str:
    return f"index-{uuid.uuid4().hex[:12]}"


def _schema() -> Any:
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("id", stored=True, indexed=True)
    # terms come separated by spaces from chains.analysis; positions are not needed for BM25
    builder.add_text_field("text", stored=False, tokenizer_name="whitespace", index_option="freq")
    return builder.build()


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every index file of a folder: tantivy itself would panic on a damaged one, in the middle of a query."""
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}
