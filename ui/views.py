"""The values the page is made of: a turn of the conversation, a source, a passage, a problem."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaders.errors import RagProjError
from ui.i18n import STRINGS, Language

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What went wrong, in both languages, so that the language switch reaches it too."""

    zh: str
    en: str

    @classmethod
    def of(cls, key: str, **values: object) -> Problem:
        """The string `key` of the table as a problem."""
        text = STRINGS[key]
        return cls(text.zh.format(**values), text.en.format(**values))

    @classmethod
    def of_error(cls, error: BaseException) -> Problem:
        """What a user reads about an error: its own words, or that the log knows more."""
        if isinstance(error, RagProjError):
            return cls(error.zh, error.en)
        logger.error("the page's work failed", exc_info=error)
        return cls.of("internal_error")

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The two halves of a `RagProjError`'s line; a text that is not one stays whole in both."""
        zh, _, en = text.partition(" / ")
        return cls(zh, en) if en and " / " not in en else cls(text, text)

    def say(self, language: Language) -> str:
        """The problem in one language."""
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class SourceRow:
    """One document of the knowledge base."""

    source: str
    title: str
    chunks: int
    characters: int
    added: str
    """ISO 8601"""


@dataclass(frozen=True)
class Passage:
    """A quote in its surroundings."""

    source: str
    title: str
    page: int | None
    headings: list[str]
    before: str
    quote: str
    after: str
    slide: int | None = None
    sheet: str | None = None
    also_in: list[dict[str, str]] = field(default_factory=list)
    """`source`, and `title` where there is one, of the other documents with the same text"""


@dataclass(frozen=True)
class EmbedderState:
    """Which embedder answers, which one the config asks for, and the change from one to the other."""

    configured: str
    answering: str
    differs: bool
    """whether the configured one did not make the vectors that answer"""
    kept: str | None = None
    """whose vectors are kept to go back to"""
    progress: tuple[int, int] | None = None
    """chunks that have a vector and chunks in all, while a change is in progress"""
    stopping: bool = False
    stopped: bool = False
    """whether the last change was stopped before its end"""
    problem: Problem | None = None


@dataclass
class Turn:
    """A question and its answer, complete or still growing."""

    question: str
    citations: list[dict[str, Any]] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    """title by source, of the passages that were found"""
    passages: int = 0
    """found for the answer"""
    used: int | None = None
    """of them, where the model's context had no room for all: the first so many"""
    truncated: bool = False
    """whether the generator had used up its tokens before the end"""
    refused: bool = False
    complete: bool = False
    """whether the stream reached its end"""
    stopped: bool = False
    problem: Problem | None = None
    length: int = 0
    _pieces: list[str] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        """Add one event of the chain's stream; pieces are only collected, joining them is left to the reader."""
        for document in event.get("source_documents", ()):
            metadata = document.metadata
            self.passages += 1
            self.titles[metadata["source"]] = metadata.get("title") or metadata["source"]
        if piece := event.get("result"):
            self._pieces.append(piece)
            self.length += len(piece)
        self.citations.extend(event.get("citations", ()))
        if "references_used" in event:
            self.used = len(event["references_used"])
        self.truncated = self.truncated or bool(event.get("truncated"))
        if "refused" in event:  # comes with the citations, last of all
            self.refused, self.complete = event["refused"], True

    @property
    def answer(self) -> str:
        """What has been said so far."""
        return "".join(self._pieces)

    @property
    def is_answered(self) -> bool:
        """Whether a follow-up question may refer to it."""
        return bool(self._pieces) and not self.refused and self.problem is None


@dataclass
class Report:
    """How the last upload went, or how far the running one is."""

    progress: tuple[int, int, str] | None = None
    """files done, files in all, the name of the one in work"""
    counts: dict[str, Any] | None = None
    failed: list[tuple[str, Problem]] = field(default_factory=list)
    problem: Problem | None = None
    stopping: bool = False
    """whether the user has asked to stop and a file is still in work"""
    skipped: int = 0
    """files that were left out because the user stopped"""

    def take(self, ingested: dict[str, Any], files: int) -> None:
        """Add what the ingest of so many files says: counts, and a reason for each file that failed."""
        self.counts = ingested
        done = sum(ingested[kind] for kind in ("added", "updated", "unchanged")) + len(ingested["failed"])
        self.skipped = max(0, files - done)
        self.failed += [(Path(entry["path"]).name, Problem.parse(entry["reason"])) for entry in ingested["failed"]]
