"""What the page does, as plain functions: a service and a session in, what to show out. No gradio here."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loaders.errors import RagProjError
from ui import markup
from ui.background import TICK_S, Background
from ui.i18n import Language, other, tr
from ui.views import EmbedderState, Passage, Problem, Report, SourceRow, Turn

__all__ = ["ChatView", "Passage", "Service", "Session", "SourceRow", "SourcesView"]

MAX_UPLOAD_MB = 200
WATCH_S = 0.2
# How many characters of a growing answer are rendered per second at most: a repaint costs its length, so repainting
# ever more rarely as the answer grows keeps the whole cost proportional to the time it takes, not to its square.
RENDERED_PER_SECOND = 100_000

Progress = Callable[[int, int, str], None]


class Service(Protocol):
    """What the page needs from the core; `ui/service.py` implements it, the tests have one in memory."""

    def stream(
        self,
        question: str,
        history: list[tuple[str, str]],
        *,
        llm: str | None,
        top_k: int | None,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """The chain's stream: the source documents, `result` piece by piece, then citations and `refused`."""

    def generators(self) -> list[tuple[str, str]]:
        """The generators to choose from as (label, key), the default first."""

    def sources(self) -> list[SourceRow]:
        """What the knowledge base holds."""

    def upload(self, paths: list[Path], progress: Progress, stop: threading.Event | None = None) -> dict[str, Any]:
        """Copy files into the knowledge base's own folder under their names and ingest them; the ingest report."""

    def remove(self, sources: list[str]) -> int:
        """Remove documents; how many there were."""

    def passage(self, citation: dict[str, Any]) -> Passage:
        """A citation's quote in its surroundings."""

    def embedder(self) -> EmbedderState:
        """Which embedder answers, which one is configured, and how far the change is."""

    def change_embedder(self, *, rollback: bool = False) -> None:
        """Begin to change over to the configured embedder, or back to the one before."""

    def stop_change(self) -> None:
        """End the change in progress."""


@dataclass
class Session:
    """One open page: its language, its conversation, and the work in progress if there is any."""

    language: Language = "zh"
    turns: list[Turn] = field(default_factory=list)
    filter: str = ""
    running: threading.Event | None = None
    uploading: threading.Event | None = None
    report: Report = field(default_factory=Report)
    # of the passage that is open: (turn, number of the citation)
    opened: tuple[int, int] | None = None

    def stop(self) -> None:
        """End the answer in progress; does nothing when there is none."""
        if self.running is not None:
            self.running.set()


@dataclass(frozen=True)
class ChatView:
    """What changes on the page; None leaves a part as it is."""

    conversation: str | None = None
    live: str | None = None
    running: bool | None = None
    question: str | None = None
    warning: str | None = None


@dataclass(frozen=True)
class SourcesView:
    """What changes in the knowledge base's tab; None leaves a part as it is."""

    dropzone: str | None = None
    table: str | None = None
    conversation: str | None = None


# ---------------------------------------------------------------- asking


def ask(
    service: Service, session: Session, question: str, *, examples: Sequence[str], llm: str | None, top_k: int | None
) -> Iterator[ChatView]:
    """The page while a question is answered: first the question, then the answer as it grows, then the whole."""
    question = question.strip()
    if not question:
        yield ChatView(warning=tr("empty_question", session.language))
        return
    if session.running is not None:
        yield ChatView(warning=tr("busy", session.language))
        return
    stop = session.running = threading.Event()
    turn = Turn(question)
    history = [(past.question, past.answer) for past in session.turns if past.is_answered]
    try:
        yield ChatView(
            conversation=_conversation(service, session, examples, started=True),
            live=markup.live_turn(turn, session.language),
            running=True,
            question="",
        )
        stream = functools.partial(service.stream, question, history, llm=llm, top_k=top_k, stop=stop)
        for _ in _grow(turn, stream, stop):
            yield ChatView(live=markup.live_turn(turn, session.language))
        session.turns.append(turn)
    finally:  # also when the browser went away in the middle: whatever still runs sees the event
        stop.set()
        session.running = None
    yield ChatView(conversation=_conversation(service, session, examples), live="", running=False)


def _grow(turn: Turn, open_stream: Callable[[], Iterator[dict[str, Any]]], stop: threading.Event) -> Iterator[None]:
    """Fill `turn` from the chain's events; yields whenever it is worth painting again."""

    def relay(report: Callable[[dict[str, Any]], None]) -> None:
        for event in open_stream():
            if stop.is_set():
                return
            report(event)

    work = Background(relay)
    painted, dirty = time.monotonic(), False
    for event in work:
        if stop.is_set():
            break
        if event is not None:
            turn.take(event)
            dirty = True
        now = time.monotonic()
        if dirty and now - painted >= paint_interval(turn.length):
            painted, dirty = now, False
            yield
    else:
        turn.problem = _problem(work)
    turn.stopped = stop.is_set() and not turn.complete


def paint_interval(length: int) -> float:
    """Seconds between two paints of an answer of `length` characters."""
    return max(TICK_S, length / RENDERED_PER_SECOND)


def generators(service: Service, language: Language) -> list[tuple[str, str]]:
    """The generators to choose from as (label, key), the default first."""
    return [(tr(key, language) if key == "extractive" else label, key) for label, key in service.generators()]


def stop(session: Session) -> None:
    """End the answer in progress; what it has said so far stays."""
    session.stop()


def clear(service: Service, session: Session, *, examples: Sequence[str]) -> ChatView:
    """An empty conversation; an answer in progress goes on and is kept."""
    session.turns.clear()
    session.opened = None
    return ChatView(conversation=_conversation(service, session, examples, started=session.running is not None))


def conversation(service: Service, session: Session, *, examples: Sequence[str]) -> str:
    """The finished turns, or the welcome where there are none."""
    return _conversation(service, session, examples, started=session.running is not None)


def _conversation(service: Service, session: Session, examples: Sequence[str], *, started: bool = False) -> str:
    if session.turns or started:
        return markup.turns(session.turns, session.language)
    try:
        empty = not service.sources()
    except RagProjError:  # the table of documents says what is wrong, asking says it again
        empty = False
    return markup.welcome(examples, session.language, empty=empty)


def open_passage(service: Service, session: Session, turn: int, n: int) -> str:
    """The panel with the passage that citation `n` of a turn stands for."""
    session.opened = (turn, n)
    return passage(service, session)


def close_passage(session: Session) -> None:
    """Forget the opened passage."""
    session.opened = None


def passage(service: Service, session: Session) -> str:
    """The panel as it stands: empty when no citation is opened."""
    if session.opened is None:
        return ""
    turn, n = session.opened
    known = session.turns[turn].citations if 0 <= turn < len(session.turns) else []
    citation = next((citation for citation in known if citation["n"] == n), None)
    if citation is None:
        return markup.passage_problem(tr("passage_gone", session.language), session.language)
    try:
        found = service.passage(citation)
    except RagProjError as error:
        return markup.passage_problem(_say(error, session.language), session.language)
    return markup.passage(found, n, session.language)


# ---------------------------------------------------------------- the knowledge base


def upload(
    service: Service,
    session: Session,
    files: Sequence[str],
    refused: Sequence[str],
    *,
    inside: Path,
    examples: Sequence[str],
) -> Iterator[SourcesView]:
    """The tab while files that the browser sent are ingested; `refused` names those that did not arrive.

    `files` come back from the browser, so only those below `inside`, where uploads are received, are touched;
    they are deleted there once the knowledge base has its own copy.
    """
    limit = str(MAX_UPLOAD_MB)
    report = session.report = Report(failed=[(name, Problem.of("upload_refused", limit=limit)) for name in refused])
    paths = [path for path in map(Path, files) if path.resolve().is_relative_to(inside.resolve())]
    if paths:
        stop = session.uploading = threading.Event()
        work = Background[tuple[int, int, str]](
            lambda tell: report.take(service.upload(paths, lambda *at: tell(at), stop), len(paths))
        )
        try:
            for at in work:
                if at is not None:
                    report.progress = (at[0], at[1], Path(at[2]).name)
                if at is not None or stop.is_set() != report.stopping:
                    report.stopping = stop.is_set()
                    yield SourcesView(dropzone=markup.dropzone(report, session.language))
            report.problem = _problem(work)
        finally:
            stop.set()
            session.uploading = report.progress = None
            for path in paths:
                path.unlink(missing_ok=True)
    yield SourcesView(
        dropzone=markup.dropzone(report, session.language),
        table=table(service, session),
        conversation=conversation(service, session, examples=examples),
    )


def stop_upload(session: Session) -> None:
    """End the upload in progress; the files that are done stay."""
    if session.uploading is not None:
        session.uploading.set()


def dropzone(session: Session) -> str:
    """The place to drop files on, with the last report."""
    return markup.dropzone(session.report, session.language)


def table(service: Service, session: Session, *, notice: str = "") -> str:
    """The table of documents, filtered as the session says."""
    try:
        rows = service.sources()
    except RagProjError as error:
        return markup.sources_problem(_say(error, session.language))
    return markup.sources(rows, session.filter, session.language, notice=notice)


def filter_table(service: Service, session: Session, text: str) -> str:
    """The table of the documents whose name contains `text`."""
    session.filter = text.strip()
    return table(service, session)


def remove(service: Service, session: Session, sources: Sequence[str], *, examples: Sequence[str]) -> SourcesView:
    """The tab after removing documents, saying which went."""
    try:
        names = {row.source: row.title for row in service.sources()}
        chosen = [source for source in sources if source in names]
        count = service.remove(chosen) if chosen else 0
    except RagProjError as error:
        notice = _say(error, session.language)
    else:
        shown = "、".join(names[source] for source in chosen)
        notice = (
            tr("removed", session.language, count=count, names=shown) if count else tr("removed_none", session.language)
        )
    return SourcesView(
        table=table(service, session, notice=notice), conversation=conversation(service, session, examples=examples)
    )


# ---------------------------------------------------------------- the embedder


def embedder(service: Service, session: Session) -> str:
    """The panel that tells which embedder answers; empty where there is nothing to change."""
    return next(watch_embedder(service, session))


def watch_embedder(service: Service, session: Session) -> Iterator[str]:
    """The panel, and again whenever it is another one, until no change of embedder is in progress."""
    shown = None
    while True:
        try:
            state = service.embedder()
        except RagProjError as error:
            yield markup.embedder_problem(_say(error, session.language), session.language)
            return
        panel = markup.embedder(state, session.language)
        if panel != shown:
            shown = panel
            yield panel
        if state.progress is None:
            return
        time.sleep(WATCH_S)


def change_embedder(service: Service, session: Session, *, rollback: bool = False) -> Iterator[str]:
    """The panel while the configured embedder takes over, or the one before; the work outlives the page."""
    service.change_embedder(rollback=rollback)
    yield from watch_embedder(service, session)


# ---------------------------------------------------------------- the language


def switch_language(session: Session) -> Language:
    """The language the page has from now on."""
    session.language = other(session.language)
    return session.language


def _problem(work: Background[Any]) -> Problem | None:
    """What the user reads about how some work ended; None where it ended well."""
    error = work.error()
    return None if error is None else Problem.of_error(error)


def _say(error: RagProjError, language: Language) -> str:
    return error.zh if language == "zh" else error.en
