"""RagService: one knowledge base with its chain, for the page and the command line."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage

from chains.config import ChatGLM3Config, ExtractiveConfig, GeneratorConfig, HuggingFaceConfig, RagConfig
from chains.embeddings import PROBE, embed_query, fingerprint
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor, IngestReport, Progress
from chains.knowledge_base import FingerprintError
from chains.reembedding import reembed
from chains.retrieval_qa import RetrievalQA, build_reranker, build_retrieval_qa, open_vectorstore
from chains.vectorstores import FaissVectorStore
from loaders.errors import RagProjError
from ui.embedder_change import EmbedderChange
from ui.embedder_change import Report as ChangeReport
from ui.embedders import StoredEmbedders
from ui.streams import EventLoopThread
from ui.uploads import NamesInWork, UploadFolder, clear_leftovers, targets
from ui.views import EmbedderState, Passage, SourceRow

# Characters of the document shown on either side of a quote.
_SURROUNDINGS = 400
# For the batch of a change of embedder that is in hand at the end; what is not committed is made again next time.
_CLOSING_WAIT_S = 30


@dataclass(frozen=True)
class _Answering:
    """A store with its embedder, and the chain over it."""

    store: FaissVectorStore
    qa: RetrievalQA


class RagService:
    """What the page and the command line do with a knowledge base; safe to share between threads."""

    def __init__(
        self,
        config: RagConfig,
        *,
        create: bool = False,
        embeddings: Embeddings | None = None,
        llm: BaseChatModel | None = None,
        any_embedder: bool = False,
        only_documents: bool = False,
    ) -> None:
        """Open the knowledge base and build the chain.

        Args:
            config: what to build.
            create: make the knowledge base where there is none.
            embeddings: in place of the configured embedder.
            llm: in place of the configured generator.
            any_embedder: answer with the embedder that made the vectors where that is not the configured one, also
                when it is changed later; `change_embedder` then lets the configured one take over.
            only_documents: nothing will be asked or added, so it does not matter whether the configured embedder is
                the one that made the vectors, and no model is loaded.

        Raises:
            KnowledgeBaseError: it does not exist and `create` is false, or cannot be read.
            FingerprintError: another embedder made its vectors, and may not or cannot be used.
        """
        self.config = config
        self._llm = llm
        self._loop = EventLoopThread()
        self._lock = threading.Lock()
        self._change = EmbedderChange()
        self._compacting: list[threading.Thread] = []
        self._keeps_loaded = False
        store = open_vectorstore(config, embeddings, create=create)
        self.knowledge_base = store.knowledge_base
        self.fulltext = FullTextIndex(self.knowledge_base)
        self._embedders = StoredEmbedders(store, config.vectorstore) if any_embedder else None
        if self._embedders is not None:
            store = self._embedders.answering_store()
        elif not only_documents:
            store.check_embedder()
        self._current = self._chain_over(store)
        # as sources are named
        self._files = Path(os.path.abspath(self.knowledge_base.path)) / "files"  # noqa: PTH100
        self._uploading = NamesInWork()
        if not only_documents:
            clear_leftovers(self._files)

    def close(self) -> None:
        """Close the database and end what still runs."""
        self._change.stop()
        self._change.wait(_CLOSING_WAIT_S)
        for thread in self._compacting:
            thread.join()
        self._loop.close()
        self.knowledge_base.close()

    @property
    def store(self) -> FaissVectorStore:
        """The vector store that answers now."""
        return self._answering().store

    @property
    def qa(self) -> RetrievalQA:
        """The chain that answers now; a question that was asked before a change ends with the chain it began with."""
        return self._answering().qa

    def _answering(self) -> _Answering:
        """What answers now: where the embedder was changed, by this process or another one, by the new one."""
        with self._lock:
            if self._embedders is not None and not self._change.running and not _is_current(self._current.store):
                self._current = self._chain_over(self._embedders.answering_store())
            return self._current

    def _chain_over(self, store: FaissVectorStore) -> _Answering:
        qa = build_retrieval_qa(self.config, vectorstore=store, fulltext=self.fulltext, llm=self._llm)
        if self._keeps_loaded:
            qa.load_generator()  # the weights that the chain before it has, while it still has them
        return _Answering(store, qa)

    def load(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Load the models and indexes that answer by default, so that the first question need not wait for them.

        Further generators, `config.llms`, load when they are chosen.

        Args:
            tell: given the name of each model before it is loaded.

        Raises:
            RagProjError: a model cannot be found or loaded; it says which.
        """
        self._keeps_loaded = True
        current = self._answering()
        if model := (current.store.embedder or {}).get("model"):
            tell(str(model))
        embed_query(current.store.embeddings, PROBE)
        if self.config.reranker is not None:
            tell(self.config.reranker.model)
            build_reranker(self.config.reranker).compress_documents([Document(PROBE)], PROBE)
        current.qa.retriever.invoke(PROBE)  # opens the indexes
        if isinstance(self.config.llm, ChatGLM3Config | HuggingFaceConfig):
            tell(self.config.llm.model)
        current.qa.load_generator()

    # -- asking --------------------------------------------------------------------------------------------------

    def stream(
        self,
        question: str,
        history: list[tuple[str, str]],
        *,
        llm: str | None,
        top_k: int | None,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """The chain's stream, ended early when `stop` is set or the iterator is closed.

        The chain runs in an event loop of its own, so that stopping cancels whatever it waits for, such as a server
        that has not sent its first word, and closes the connection.
        """
        messages = [message for q, a in history for message in (HumanMessage(q), AIMessage(a))]
        chosen = {key: value for key, value in (("llm", llm), ("top_k", top_k)) if value is not None}
        pieces = self.qa.astream({"query": question, "chat_history": messages}, {"configurable": chosen})
        return self._loop.iterate(pieces, stop)

    def generators(self) -> list[tuple[str, str]]:
        """The generators to choose from as (label, key), the default first."""
        configured = {self.config.llm.type: self.config.llm, **self.config.llms}
        return [(_label(key, configured.get(key)), key) for key in self.qa.choices("llm")]

    def sources(self) -> list[SourceRow]:
        """What the knowledge base holds."""
        return [
            SourceRow(info.source, info.title, info.chunks, info.characters, info.added)
            for info in self.knowledge_base.sources()
        ]

    # -- documents -----------------------------------------------------------------------------------------------

    def ingestor(self) -> Ingestor:
        """The way into the knowledge base."""
        return Ingestor(self.store, self.fulltext, loader=self.config.loader, splitter=self.config.splitter)

    def upload(self, paths: list[Path], progress: Progress, stop: threading.Event | None = None) -> dict[str, Any]:
        """Copy files into the knowledge base's own folder under their names and ingest them; the ingest report.

        A file of a name that is already there is a new version of it; one that cannot be read is not kept, and the
        version before stays. Of files with the same name in one upload the later ones get a number. Who uploads a name
        that somebody else is uploading waits for him.
        """
        copies = targets(paths, self._files)
        with self._uploading.claimed(copies, stop) as free:
            if not free:
                return IngestReport().as_dict()
            kept = UploadFolder(self._files)
            try:
                for path, copy in zip(paths, copies, strict=True):
                    kept.add(path, copy)
                return self._ingest(copies, progress, stop).as_dict()
            finally:
                writer = self.knowledge_base.writer()
                for path in kept.settle(self._is_stored, self._is_known):  # a stopped run left what it had of them
                    writer.drop_staged(str(path))

    def _ingest(self, files: list[Path], progress: Progress, stop: threading.Event | None) -> IngestReport:
        ingestor = self.ingestor()
        try:
            return ingestor.ingest(files, progress=progress, stop=stop)
        except FingerprintError:
            if self._embedders is None:
                raise
        # the embedder was changed meanwhile: the new one goes on; what the old one has stored counts as unchanged
        self._change.wait()
        return self.ingestor().ingest(files, progress=progress, stop=stop)

    def _is_stored(self, path: Path) -> bool:
        """Whether the knowledge base holds this very version of a file."""
        state, stat = self.knowledge_base.source_state(str(path)), path.stat()
        return state is not None and (state.size, state.mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    def _is_known(self, path: Path) -> bool:
        return self.knowledge_base.source_state(str(path)) is not None

    def remove(self, sources: Sequence[str]) -> int:
        """Remove documents, uploaded copies with them; how many were there. Files elsewhere are not touched.

        They are in no answer when this returns. What big indexes still hold of them leaves the disk a little later.
        """
        ingestor = self.ingestor()
        removed = ingestor.remove(sources)
        for source in sources:
            if Path(source).parent == self._files:
                Path(source).unlink(missing_ok=True)
        ingestor.save_caches()
        self._compacting = [thread for thread in self._compacting if thread.is_alive()]
        # no daemon: the command line, which does not close the service, ends when this is done
        self._compacting.append(threading.Thread(target=ingestor.compact_caches, name="ragproj-compact"))
        self._compacting[-1].start()
        return removed

    def passage(self, citation: dict[str, Any]) -> Passage:
        """A citation's quote in its surroundings.

        Raises:
            RagProjError: the document has been removed or changed since.
        """
        document_id, start, end = citation.get("document_id"), citation["start"], citation["end"]
        text = None if document_id is None else self.knowledge_base.document_text(document_id)
        if text is None or text[start:end] != citation["quote"]:
            raise RagProjError(
                f"引用的资料 {citation['source']} 已被移除或更新，请重新提问",
                f"the cited document {citation['source']} was removed or updated; ask again",
            )
        chunks = self.knowledge_base.neighbours(int(document_id or 0))
        metadata = next((chunk.metadata for chunk in chunks if chunk.start <= start < chunk.end), {})
        return Passage(
            source=citation["source"],
            title=str(metadata.get("title") or Path(citation["source"]).stem),
            page=citation["page"],
            headings=list(metadata.get("headings", [])),
            before=text[max(0, start - _SURROUNDINGS) : start],
            quote=text[start:end],
            after=text[end : end + _SURROUNDINGS],
            slide=citation.get("slide"),
            sheet=citation.get("sheet"),
            also_in=citation.get("also_in", []),
        )

    # -- the embedder --------------------------------------------------------------------------------------------

    def embedder(self) -> EmbedderState:
        """Which embedder answers, which one is configured, and how far the change is."""
        answering = fingerprint(self.store.embeddings)
        if self._embedders is None:
            return EmbedderState(answering, answering, differs=False)
        configured = self._embedders.configured
        return EmbedderState(
            configured=fingerprint(configured.embeddings),
            answering=answering,
            differs=self.store.embeddings is not configured.embeddings,
            kept=self._embedders.kept(),
            progress=self._change.progress if self._change.running else None,
            stopping=self._change.stopping,
            stopped=self._change.stopped,
            problem=self._change.problem,
        )

    def change_embedder(self, *, rollback: bool = False) -> None:
        """Begin to make vectors by the configured embedder, which answers when all are made; or go back to those kept.

        The embedder that answers goes on answering meanwhile. Does nothing while a change is in progress.
        """
        embedders = self._embedders
        if embedders is None:
            raise ValueError("the service was not opened with any_embedder")

        def work(report: ChangeReport, stop: threading.Event) -> None:
            store = embedders.kept_store() if rollback else embedders.configured_store()
            reembed(store, rollback=rollback, progress=report, stop=stop)
            store.save_cache()  # questions find the new index made
            fresh = self._chain_over(store)
            with self._lock:
                self._current = fresh

        self._change.start(work)

    def stop_change(self) -> None:
        """End the change in progress after the batch in hand; the next one goes on from there."""
        self._change.stop()


def _is_current(store: FaissVectorStore) -> bool:
    """Whether the generation that answers in the knowledge base is the one a store reads."""
    answering = store.knowledge_base.generation()
    try:
        held = store.check_embedder()
    except FingerprintError:  # a write through it has found out already
        return False
    return answering is None or (held is not None and held.id == answering.id)


def _label(key: str, choice: ExtractiveConfig | GeneratorConfig | None) -> str:
    if choice is not None and not isinstance(choice, ExtractiveConfig):
        return choice.model if key == choice.type else f"{key} · {choice.model}"
    return {"extractive": "摘录原文 · Extractive"}.get(key, key)
