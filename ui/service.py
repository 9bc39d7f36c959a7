"""RagService: one knowledge base with its chain, for the page and the command line."""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage

from chains.config import ChatModelConfig, ExtractiveConfig, RagConfig
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor, Progress
from chains.retrieval_qa import RetrievalQA, build_retrieval_qa, build_vectorstore
from loaders.errors import RagProjError
from ui.streams import EventLoopThread
from ui.views import Passage, SourceRow

# Characters of the document shown on either side of a quote.
_SURROUNDINGS = 400


class RagService:
    """What the page and the command line do with a knowledge base; safe to share between threads."""

    def __init__(
        self,
        config: RagConfig,
        *,
        create: bool = False,
        embeddings: Embeddings | None = None,
        llm: BaseChatModel | None = None,
    ) -> None:
        """Open the knowledge base and build the chain.

        Raises:
            KnowledgeBaseError: it does not exist and `create` is false, or cannot be read.
            FingerprintError: another embedder made its vectors.
        """
        self.config = config
        self._loop = EventLoopThread()
        self.store = build_vectorstore(config, embeddings, create=create)
        self.knowledge_base = self.store.knowledge_base
        self.fulltext = FullTextIndex(self.knowledge_base)
        self.qa: RetrievalQA = build_retrieval_qa(config, vectorstore=self.store, fulltext=self.fulltext, llm=llm)
        # as sources are named
        self._files = Path(os.path.abspath(self.knowledge_base.path)) / "files"  # noqa: PTH100

    def close(self) -> None:
        """Close the database and end what still runs."""
        self._loop.close()
        self.knowledge_base.close()

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

    def ingestor(self) -> Ingestor:
        """The way into the knowledge base."""
        return Ingestor(self.store, self.fulltext, loader=self.config.loader, splitter=self.config.splitter)

    def upload(self, paths: list[Path], progress: Progress, stop: threading.Event | None = None) -> dict[str, Any]:
        """Copy files into the knowledge base's own folder under their names and ingest them; the ingest report.

        A file of a name that is already there is a new version of it; one that cannot be read is not kept, and the
        version before stays. Of files with the same name in one upload the later ones get a number.
        """
        kept = _UploadFolder(self._files)
        try:
            copies = [kept.add(path) for path in paths]
            return self.ingestor().ingest(copies, progress=progress, stop=stop).as_dict()
        finally:
            kept.settle(self._is_stored)

    def _is_stored(self, path: Path) -> bool:
        """Whether the knowledge base holds this very version of a file."""
        state, stat = self.knowledge_base.source_state(str(path)), path.stat()
        return state is not None and (state.size, state.mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    def remove(self, sources: Sequence[str]) -> int:
        """Remove documents, uploaded copies with them; how many were there. Files elsewhere are not touched."""
        removed = self.knowledge_base.writer().remove_sources(sources)
        for source in sources:
            if Path(source).parent == self._files:
                Path(source).unlink(missing_ok=True)
        self.ingestor().save_caches()
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
        )


class _UploadFolder:
    """Uploaded files on their way in: replaced versions are put aside until it is known that the new ones are read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: dict[Path, Path | None] = {}

    def add(self, path: Path) -> Path:
        """The copy of a file, in the folder."""
        target = self._folder / path.name
        number = 2
        while target in self._before:
            target = self._folder / f"{path.stem} ({number}){path.suffix}"
            number += 1
        beside, aside = (self._folder / f".{uuid.uuid4().hex}" for _ in range(2))
        try:
            self._folder.mkdir(exist_ok=True)
            shutil.copyfile(path, beside)
            self._before[target] = target.replace(aside) if target.exists() else None
            beside.replace(target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise RagProjError(
                f"无法保存上传的文件 {path.name}：{error.strerror}；请检查磁盘空间",
                f"cannot keep the uploaded file {path.name}: {error.strerror}; check the disk space",
            ) from error
        return target

    def settle(self, is_stored: Callable[[Path], bool]) -> None:
        """Keep the copies that were stored; drop the others, putting back what they replaced."""
        for target, before in self._before.items():
            if target.exists() and is_stored(target):
                if before is not None:
                    before.unlink(missing_ok=True)
            elif before is not None:
                before.replace(target)
            else:
                target.unlink(missing_ok=True)


def _label(key: str, choice: ExtractiveConfig | ChatModelConfig | None) -> str:
    if isinstance(choice, ChatModelConfig):
        return choice.model if key == choice.type else f"{key} · {choice.model}"
    return {"extractive": "摘录原文 · Extractive"}.get(key, key)
