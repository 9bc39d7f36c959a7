"""How long questions take as a knowledge base grows: BM25 and hybrid, against SQLite FTS5 and BM25 rebuilt per query.

    python -m benchmarks.search_latency                           # 20k, 118k and 1M chunks; 25 minutes, 8 GB of disk
    python -m benchmarks.search_latency --sizes 20000 --work DIR  # DIR keeps the knowledge bases for other runs
    python -m benchmarks.search_latency --ours-only --work DIR    # neither builds nor peers: minutes at 1M

Both full-text engines get the same terms of the same chunks and the same questions, 50 hits asked. A hybrid query is
`HybridRetriever.invoke` of the default config, 5 documents, with the question's vector given or computed. Opening is
timed in a fresh process with the files in the page cache, up to the first answer and without Python's imports.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, Report
from benchmarks.material import GivenVectors, passages, questions
from benchmarks.measuring import latency, run_child, seconds, serve_child
from benchmarks.stores import Opened, knowledge_base_of, opened
from chains.analysis import index_terms, terms
from chains.fulltext import query_terms
from chains.knowledge_base import SourceState
from chains.knowledge_base_writer import NewChunk, NewDocument
from chains.lexical_embeddings import LexicalEmbeddings

SIZES = (20_000, 118_000, 1_000_000)
TOP_LEXICAL = 50
HYBRID_BARS_MS = {118_000: 15.0, 1_000_000: 40.0}
OPEN_BAR_S, REMOVE_BAR_MS = 2.0, 100.0
REBUILD_UP_TO = 20_000
REBUILT_QUESTIONS = 3
REMOVED = 10
STAGED = 500


class FTS5:
    """SQLite's full-text search over our terms, contentless; the smallest index that still ranks by BM25."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("CREATE VIRTUAL TABLE chunks USING fts5(text, content='')")

    def fill(self, kb: Opened) -> None:
        """Index every chunk."""
        texts = kb.knowledge_base.index_texts(kb.knowledge_base.chunk_ids())
        with self._connection as connection:
            rows = ((chunk, " ".join(index_terms(text))) for chunk, text in texts)
            connection.executemany("INSERT INTO chunks (rowid, text) VALUES (?, ?)", rows)

    def search(self, query: str) -> list[int]:
        """Ids of the best chunks that hold any of the question's terms."""
        match = " OR ".join(f'"{term}"' for term in query_terms(query))
        sql = "SELECT rowid FROM chunks WHERE chunks MATCH ? ORDER BY rank LIMIT ?"
        return [row[0] for row in self._connection.execute(sql, (match, TOP_LEXICAL))]


def rebuilt_bm25(texts: Sequence[str], query: str) -> list[int]:
    """BM25 as retrievers that keep no index do it: count every text again for each question (as rank_bm25 does)."""
    counts = [Counter(terms(text)) for text in texts]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(lengths)
    holding = Counter(term for count in counts for term in count)
    scores = [0.0] * len(texts)
    for term in terms(query):
        idf = math.log(1 + (len(texts) - holding[term] + 0.5) / (holding[term] + 0.5))
        for number, count in enumerate(counts):
            times = count[term]
            scores[number] += idf * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * lengths[number] / mean))
    return sorted(range(len(texts)), key=lambda number: -scores[number])[:TOP_LEXICAL]


def measure_build(report: Report, kb_path: Path, scratch: Path, chunks: int) -> FTS5:
    """Every index made from nothing but the database."""
    for cache in kb_path.glob("f[au]*"):  # faiss-*, fulltext*
        shutil.rmtree(cache) if cache.is_dir() else cache.unlink()
    peer = FTS5(scratch / f"fts5-{chunks}.sqlite")
    with opened(kb_path) as kb:
        ours = seconds(kb.fulltext.save_cache)
        faiss_s = seconds(kb.store.save_cache)
        theirs = seconds(lambda: peer.fill(kb))
    report.add("build", chunks=chunks, tantivy_s=ours, fts5_s=theirs, fts5_to_ours=theirs / ours, faiss_s=faiss_s)
    return peer


def measure_lexical(report: Report, kb: Opened, peer: FTS5, asked: list[str], chunks: int) -> None:
    """BM25 alone, both engines in turn."""
    ours = latency(lambda query: kb.fulltext.search(query, TOP_LEXICAL), asked)
    few = asked[:: max(1, chunks // 100_000)]  # it takes seconds a query at 1M
    theirs = latency(peer.search, few, warm_up=2, rounds=1 if chunks > 200_000 else 3)
    same = [len({i for i, _ in kb.fulltext.search(q, 10)} & set(peer.search(q)[:10])) / 10 for q in few[:20]]
    words = sum(len(query_terms(question)) for question in asked) / len(asked)
    row: dict[str, Any] = {"terms_each": words, "ours_p50_ms": ours.p50, "ours_p95_ms": ours.p95}
    row |= {"fts5_p50_ms": theirs.p50, "fts5_p95_ms": theirs.p95, "fts5_to_ours_p50": theirs.p50 / ours.p50}
    row |= {"same_top_10": sum(same) / len(same)}
    if chunks <= REBUILD_UP_TO:
        texts = [f"{passage.title}\n{passage.text}" for passage in passages(chunks)]
        rebuilt = latency(lambda query: rebuilt_bm25(texts, query), asked[:REBUILT_QUESTIONS], warm_up=0, rounds=1)
        row |= {"rebuilt_p50_ms": rebuilt.p50, "rebuilt_to_ours_p50": rebuilt.p50 / ours.p50}
    report.add(f"lexical, top {TOP_LEXICAL}", chunks=chunks, questions=len(asked), **row)


def measure_hybrid(report: Report, kb_path: Path, asked: list[str], chunks: int) -> None:
    """The default retriever, and its legs."""
    given = GivenVectors(asked)
    with opened(kb_path, given) as kb:
        retriever = kb.hybrid()
        whole = latency(retriever.invoke, asked)
        dense = latency(lambda query: kb.store.search_ids(kb.store.embed_query(query), retriever.fetch), asked)
        lexical = latency(lambda query: kb.fulltext.search(query, retriever.fetch), asked)
        with staged(kb):
            meanwhile = latency(retriever.invoke, asked)
    with opened(kb_path) as kb:
        computed = latency(kb.hybrid().invoke, asked)
    row: dict[str, Any] = {"p50_ms": whole.p50, "p95_ms": whole.p95, "with_embedding_p95_ms": computed.p95}
    row |= {"during_ingest_p95_ms": meanwhile.p95}
    row |= {"dense_leg_p50_ms": dense.p50, "dense_leg_p95_ms": dense.p95}
    row |= {"lexical_leg_p50_ms": lexical.p50, "lexical_leg_p95_ms": lexical.p95}
    report.add("hybrid, top 5, vector given", chunks=chunks, questions=len(asked), **row)
    if chunks in HYBRID_BARS_MS:
        report.bar(f"hybrid p95 at {chunks} chunks", whole.p95, HYBRID_BARS_MS[chunks], "ms")


@contextlib.contextmanager
def staged(kb: Opened) -> Iterator[None]:
    """A source in the making, as while a file is being ingested: queries must pass over its chunks."""
    writer = kb.knowledge_base.writer()
    number, _ = writer.begin_source("/in/the/making", SourceState(0, 1, 1, "0", ""))
    texts = [f"{passage.title}，正在导入" for passage in passages(STAGED)]
    chunks = [NewChunk(f"staged-{place}", 0, len(text), text, {}) for place, text in enumerate(texts)]
    documents = [NewDocument(f"staged-{chunk.key}", "", chunk.text, {}, [chunk]) for chunk in chunks]
    writer.add_documents(number, documents)
    try:
        yield
    finally:
        writer.remove_sources(["/in/the/making"])


def open_and_ask(path: str, question: str) -> dict[str, float]:
    """In a fresh process: milestones of opening, in seconds since the imports were done."""
    import faiss  # noqa: F401  what an import costs is not the knowledge base's
    import tantivy  # noqa: F401

    LexicalEmbeddings().embed_query(question)  # loads its tables
    started = time.perf_counter()
    with opened(Path(path)) as kb:
        kb.store.check_embedder()
        checked = time.perf_counter() - started
        kb.fulltext.search(question, 10)
        lexical = time.perf_counter() - started
        found = kb.hybrid().invoke(question)
        assert found
        return {"opened_s": checked, "lexical_s": lexical, "first_answer_s": time.perf_counter() - started}


def measure_open(report: Report, kb_path: Path, question: str, chunks: int) -> None:
    """Opening, the best of three fresh processes: the first may read from disk."""
    runs = [run_child("benchmarks.search_latency", "open_and_ask", path=kb_path, question=question) for _ in range(3)]
    best = min(runs, key=lambda run: float(run.result["first_answer_s"]))
    report.add("open, to the first answer", chunks=chunks, **best.result, process_s=best.seconds, peak_mb=best.peak_mb)
    if chunks == 118_000:
        report.bar("opening 118,000 chunks, to the first answer", best.result["first_answer_s"], OPEN_BAR_S, "s")


def measure_removal(report: Report, kb_path: Path, scratch: Path, asked: list[str], chunks: int) -> None:
    """Removing small documents one by one: committed, gone from answers, caches saved, as `ragproj remove` does.

    Then what it does when the answer is given: what was removed is taken out of the index files, once for all.
    """
    folder = scratch / f"removed-{chunks}"
    folder.mkdir()
    for number, passage in enumerate(passages(REMOVED)):
        text = f"第 {number} 号临时文件，稍后删除。{passage.text}"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    with opened(kb_path, GivenVectors(asked)) as kb:
        kb.ingest([folder])
        retriever, writer = kb.hybrid(), kb.knowledge_base.writer()
        answering = latency(retriever.invoke, asked[:20]).p50
        steps: dict[str, list[float]] = {"committed_ms": [], "next_query_ms": [], "caches_ms": []}
        for name in sorted(folder.iterdir()):
            removal = seconds(lambda name=name: writer.remove_sources([str(name)]))  # type: ignore[misc]
            query = seconds(lambda: retriever.invoke(asked[1]))
            for step, took in zip(steps, (removal, query, seconds(kb.save_caches)), strict=True):
                steps[step].append(1e3 * took)
        compacting = {
            "compact_faiss_s": seconds(kb.store.compact_cache),
            "compact_fulltext_s": seconds(kb.fulltext.compact),
        }
    medians = {step: sorted(times)[len(times) // 2] for step, times in steps.items()}
    effective = medians["committed_ms"] + medians["next_query_ms"] - answering
    row = {**medians, "effective_ms": effective, "usual_query_ms": answering, **compacting}
    report.add("removing one document", chunks=chunks, **row)
    if chunks == 118_000:
        report.bar("removing one document of 118,000 chunks, no answer holds it", effective, REMOVE_BAR_MS, "ms")
        whole = medians["committed_ms"] + medians["next_query_ms"] - answering + medians["caches_ms"]
        report.bar("the same with the caches saved, as ragproj remove", whole, REMOVE_BAR_MS, "ms")


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="chunks")
    parser.add_argument("--work", type=Path, help="keeps what is made, for another run")
    parser.add_argument("--ours-only", action="store_true", help="no builds, no peers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    asked = questions()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        work = options.work or scratch
        work.mkdir(parents=True, exist_ok=True)
        with Report("search_latency", {"sizes": options.sizes}, options.results) as report:
            for chunks in options.sizes:
                kb_path = knowledge_base_of(work, chunks)
                if not options.ours_only:
                    peer = measure_build(report, kb_path, scratch, chunks)
                    with opened(kb_path) as kb:
                        measure_lexical(report, kb, peer, asked, chunks)
                measure_hybrid(report, kb_path, asked, chunks)
                measure_open(report, kb_path, asked[0], chunks)
                measure_removal(report, kb_path, scratch, asked, chunks)


if __name__ == "__main__" and not serve_child(sys.argv[1:], {"open_and_ask": open_and_ask}):
    main()
