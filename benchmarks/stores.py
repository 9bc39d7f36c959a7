"""Knowledge bases to measure, made the way users make them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from langchain_core.embeddings import Embeddings

from benchmarks.material import passages, write_records
from chains.config import HybridRetrieverConfig
from chains.faiss_index import FaissConfig
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor, IngestReport
from chains.knowledge_base import KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings
from chains.retrievers import HybridRetriever
from chains.vectorstores import FaissVectorStore


@dataclass(frozen=True)
class Opened:
    """A knowledge base with what answers from it."""

    store: FaissVectorStore
    fulltext: FullTextIndex

    @property
    def knowledge_base(self) -> KnowledgeBase:
        """The truth below the indexes."""
        return self.store.knowledge_base

    def hybrid(self, top_k: int = 5) -> HybridRetriever:
        """The retriever of the default config."""
        settings = HybridRetrieverConfig().model_dump(exclude={"type"})
        return HybridRetriever(store=self.store, fulltext=self.fulltext, top_k=top_k, **settings)

    def ingest(self, paths: Sequence[Path]) -> IngestReport:
        """Store files as `ragproj ingest` does; none may fail."""
        report = Ingestor(self.store, self.fulltext).ingest(paths)
        assert not report.failed, report.failed[:3]
        return report

    def save_caches(self) -> None:
        """As after every ingest and removal."""
        self.store.save_cache()
        self.fulltext.save_cache()


@contextlib.contextmanager
def opened(path: Path, embeddings: Embeddings | None = None) -> Iterator[Opened]:
    """The knowledge base in a folder, made if need be."""
    with KnowledgeBase(path, create=True) as knowledge_base:
        store = FaissVectorStore(embeddings or LexicalEmbeddings(), knowledge_base, config=FaissConfig())
        yield Opened(store, FullTextIndex(knowledge_base))


def knowledge_base_of(work: Path, count: int) -> Path:
    """A knowledge base of the first `count` passages, ingested once and kept in `work`."""
    path = work / f"kb-{count}"
    if not path.exists():
        making = work / f"making-{count}"
        records = write_records(work / f"passages-{count}.jsonl", passages(count))
        with opened(making) as kb:
            kb.ingest([records])
        records.unlink()
        making.rename(path)
    return path


def part_of(work: Path, first: int, last: int) -> Path:
    """Passages `first` to `last` as one file."""
    path = work / f"passages-{first:07}-{last:07}.jsonl"
    return write_records(path, islice(passages(last), first, None), first=first)
