"""A service in memory: what the page's handlers need, without parsing, embedding or storing anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document

from loaders.errors import RagProjError
from ui.views import EmbedderState, Passage, SourceRow

HANDBOOK = "年假每年十天。加班须在事前申请，由部门主管批准后生效。出差住宿每晚不超过五百元。"


class FakeService:
    """Answers with the sentence that shares most characters with the question, from texts it was given."""

    def __init__(self, **texts: str) -> None:
        self.texts = dict(texts)
        self.asked: list[dict[str, Any]] = []
        self.pause = lambda: None
        self.pieces_sent = 0
        self.closed = threading.Event()
        self.fails: Exception | None = None
        self.state = EmbedderState("lexical-1024", "lexical-1024", differs=False)
        self.changes: list[bool] = []
        self.also_in: list[dict[str, str]] = []

    def stream(
        self,
        question: str,
        history: list[tuple[str, str]],
        *,
        llm: str | None,
        top_k: int | None,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        self.asked.append({"question": question, "history": history, "llm": llm, "top_k": top_k})
        try:
            if len(question) > 10_000:
                raise RagProjError("问题太长", "the question is too long")
            if self.fails:
                raise self.fails
            name, quote = self._best(question)
            found = [Document(self.texts[name], metadata={"source": f"/kb/{name}", "title": name})] if name else []
            yield {"query": question, "source_documents": found}
            for piece in [*(quote or "没有找到相关内容。"), *([" [1]"] if quote else [])]:
                if stop.is_set():
                    return
                self.pause()
                self.pieces_sent += 1
                yield {"result": piece}
            start = self.texts[name].find(quote) if quote else 0
            citation = {
                "n": 1,
                "source": f"/kb/{name}",
                "page": 2,
                "start": start,
                "end": start + len(quote),
                "quote": quote,
            }
            if self.also_in:
                citation["also_in"] = self.also_in
            yield {"citations": [citation] if quote else [], "refused": not quote}
        finally:
            self.closed.set()

    def _best(self, question: str) -> tuple[str, str]:
        sentences = [(name, part + "。") for name, text in self.texts.items() for part in text.split("。") if part]
        scored = [(len(set(question) & set(sentence)), name, sentence) for name, sentence in sentences]
        score, name, sentence = max(scored, default=(0, "", ""))
        return (name, sentence) if score >= 2 else ("", "")

    def generators(self) -> list[tuple[str, str]]:
        return [("摘录原文", "extractive"), ("大模型", "chat")]

    def sources(self) -> list[SourceRow]:
        return [
            SourceRow(f"/kb/{name}", name, 1, len(text), "2026-11-22T08:30:00+00:00")
            for name, text in self.texts.items()
        ]

    def upload(
        self, paths: list[Path], progress: Callable[[int, int, str], None], stop: threading.Event | None = None
    ) -> dict[str, Any]:
        failed, handled = [], 0
        for done, path in enumerate(paths):
            progress(done, len(paths), path.name)
            self.pause()
            if stop is not None and stop.is_set():
                break
            handled += 1
            if path.suffix == ".txt":
                self.texts[path.name] = path.read_text(encoding="utf-8")
            else:
                failed.append({"path": str(path), "reason": "文件已加密 / the file is encrypted"})
        stored = handled - len(failed)
        return {
            "added": stored,
            "updated": 0,
            "unchanged": 0,
            "removed": 0,
            "failed": failed,
            "chunks": stored,
            "seconds": 0.04,
        }

    def remove(self, sources: list[str]) -> int:
        return sum(self.texts.pop(source.removeprefix("/kb/"), None) is not None for source in sources)

    def passage(self, citation: dict[str, Any]) -> Passage:
        name = citation["source"].removeprefix("/kb/")
        if name not in self.texts:
            raise RagProjError(f"{name} 已被移除", f"{name} was removed")
        text, start, end = self.texts[name], citation["start"], citation["end"]
        return Passage(
            citation["source"],
            name,
            citation["page"],
            ["制度", "考勤"],
            text[:start],
            text[start:end],
            text[end:],
            also_in=citation.get("also_in", []),
        )

    def embedder(self) -> EmbedderState:
        if self.state.progress is not None:
            self._advance(self.state.progress)
        return self.state

    def _advance(self, progress: tuple[int, int]) -> None:
        """A change makes 50 vectors whenever somebody looks."""
        done, total = progress
        if self.state.stopping:
            self.state = replace(self.state, progress=None, stopping=False, stopped=True)
        elif done == total:
            old, new = self.state.answering, self.state.configured
            self.state = EmbedderState(new, new, differs=False, kept=old)
        else:
            self.state = replace(self.state, progress=(done + 50, total))

    def change_embedder(self, *, rollback: bool = False) -> None:
        self.changes.append(rollback)
        self.state = replace(self.state, progress=(0, 200), stopped=False, problem=None)

    def stop_change(self) -> None:
        self.state = replace(self.state, stopping=True)


@pytest.fixture
def service() -> FakeService:
    return FakeService(**{"handbook.txt": HANDBOOK})
