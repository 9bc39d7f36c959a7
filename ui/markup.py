"""Values to HTML. Documents, file names, questions and answers are untrusted: everything goes through `escape` or
through a Markdown renderer that knows neither HTML nor links nor images."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from chains.answerers import CITATION_MARK
from ui.i18n import Language, tr
from ui.views import EmbedderState, Passage, Report, SourceRow, Turn

ROWS_SHOWN = 200
QUESTION_SHOWN = 300


def header(language: Language) -> str:
    """The name of the product and what it promises."""
    return (
        f'<div class="brand" data-title="{tr("title", language)}" data-lang="{"zh-CN" if language == "zh" else "en"}">'
        '<span class="logo" aria-hidden="true">知</span>'
        f"<div><h1>{tr('brand', language)} <small>RagProj</small></h1><p>{tr('tagline', language)}</p></div></div>"
    )


# ---------------------------------------------------------------- the conversation


def welcome(examples: Sequence[str], language: Language, *, empty: bool) -> str:
    """What stands where the conversation will be: examples to start from, or the way to the upload."""
    if empty:
        action = f'<button type="button" class="primary" data-action="upload">{tr("go_upload", language)}</button>'
        title, hint, body = tr("kb_empty", language), tr("kb_empty_hint", language), action
    else:
        title, hint = tr("welcome", language), tr("welcome_hint" if examples else "welcome_plain", language)
        body = "".join(
            f'<button type="button" class="example" data-action="example" data-question="{escape(question)}">'
            f"{escape(question)}</button>"
            for question in examples
        )
    return f'<section class="welcome"><h2>{title}</h2><p>{hint}</p><div class="examples">{body}</div></section>'


def turns(conversation: Sequence[Turn], language: Language) -> str:
    """Finished turns, oldest first."""
    return "".join(turn(one, number, language) for number, one in enumerate(conversation))


def turn(one: Turn, number: int, language: Language) -> str:
    """A finished turn: question, answer with its marks, the sources they stand for, a copy button."""
    cited = {citation["n"] for citation in _supported(one)}
    unsupported = {citation["n"] for citation in one.citations} - cited
    parts = []
    if one.answer:
        note = f'<p class="note">{tr("refused", language)}</p>' if one.refused else ""
        body = answer(one.answer, cited, number, language, unsupported=unsupported)
        parts.append(f'<div class="answer{" refused" if one.refused else ""}">{note}{body}</div>')
    if one.problem:
        parts.append(
            f'<div class="answer failed" role="alert"><p class="note">{tr("failed", language)}</p>'
            f"<p>{escape(one.problem.say(language))}</p></div>"
        )
    parts.append(_citations(one, number, language))
    parts += [f'<p class="remark">{remark}</p>' for remark in _remarks(one, unsupported, language)]
    parts.append(_tools(one, language))
    return f'<article class="turn">{_question(one)}{"".join(parts)}</article>'


def live_turn(one: Turn, language: Language) -> str:
    """The turn in progress: what has been said so far, or what is being done. Its marks open nothing yet."""
    if one.length:
        body = f'<div class="answer growing">{answer(one.answer, set(), 0, language)}</div>'
    else:
        state = tr("writing" if one.titles else "searching", language)
        body = f'<div class="answer waiting"><span class="dots" aria-hidden="true"></span>{state}</div>'
    return f'<article class="turn">{_question(one)}{body}</article>'


def answer(
    text: str, cited: set[int], turn_number: int, language: Language, *, unsupported: Collection[int] = ()
) -> str:
    """Markdown with its `[n]` as buttons where `n` is in `cited`, as plain marks elsewhere.

    A mark in `unsupported` says that the source does not bear out what stands before it.
    """
    marks = {n: _cite(n, turn_number, language) for n in cited}
    marks |= {
        n: f'<span class="cite unsupported" title="{tr("unsupported", language)}">[{n}]</span>' for n in unsupported
    }
    tokens = _markdown().parse(text)
    for token in tokens:
        if token.children is not None:
            token.children = [piece for child in token.children for piece in _mark(child, marks)]
    return str(_markdown().renderer.render(tokens, _markdown().options, {}))


def _mark(token: Token, marks: Mapping[int, str]) -> Iterable[Token]:
    """One inline token with the citations in it as tokens of their own: as in `marks`, else plain.

    Models write 【1】 and [1, 2] as well; the chain takes these for citations, so they must look like them.
    """
    if token.type != "text":
        yield token
        return
    end = 0
    for found in CITATION_MARK.finditer(token.content):
        mark = found.group().lstrip()
        yield Token("text", "", 0, content=token.content[end : found.end() - len(mark)])
        end = found.end()
        for number in map(int, re.findall(r"\d+", mark)):
            plain = f'<span class="cite">[{number}]</span>'
            yield Token("html_inline", "", 0, content=marks.get(number, plain))
    yield Token("text", "", 0, content=token.content[end:])


def _cite(n: int, turn_number: int, language: Language) -> str:
    label = tr("open_citation", language, n=n)
    return (
        f'<button type="button" class="cite" data-action="cite" data-turn="{turn_number}" data-n="{n}" '
        f'aria-label="{label}" title="{label}">{n}</button>'
    )


@functools.cache
def _markdown() -> MarkdownIt:
    """CommonMark and tables, less all that could fetch, run or lead elsewhere."""
    off = ["html_block", "html_inline", "link", "image", "autolink", "reference", "code", "lheading"]
    return MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable(off)


def _question(one: Turn) -> str:
    text = one.question if len(one.question) <= QUESTION_SHOWN else one.question[:QUESTION_SHOWN] + "…"
    return f'<div class="question">{escape(text)}</div>'


def _supported(one: Turn) -> list[dict[str, Any]]:
    """The citations whose source bears out the answer."""
    return [citation for citation in one.citations if citation.get("supported", True)]


def _citations(one: Turn, number: int, language: Language) -> str:
    if not _supported(one):
        return ""
    items = "".join(_citation(one, citation, number, language) for citation in _supported(one))
    return f'<div class="citations"><span class="label">{tr("citations", language)}</span>{items}</div>'


def _citation(one: Turn, citation: dict[str, Any], number: int, language: Language) -> str:
    title = one.titles.get(citation["source"]) or PurePath(citation["source"]).name
    more = len(citation.get("also_in", ()))
    further = f'<span class="more">{tr("more_sources", language, count=more)}</span>' if more else ""
    return (
        f'<button type="button" class="source" data-action="cite" data-turn="{number}" data-n="{citation["n"]}" '
        f'title="{escape(citation["source"])}"><b>{citation["n"]}</b><span class="title">{escape(title)}</span>'
        f"{_place(citation, language)}{further}</button>"
    )


def _place(place: Mapping[str, Any], language: Language) -> str:
    """Where in its document something stands: the page, slide or sheet, nothing for a plain text."""
    for key in ("page", "slide", "sheet"):
        if place.get(key) is not None:
            return f'<span class="page">{escape(tr(key, language, **{key: place[key]}))}</span>'
    return ""


def _remarks(one: Turn, unsupported: Collection[int], language: Language) -> list[str]:
    """What to know about an answer besides: that it ends early, marks nothing bears out, passages left out."""
    remarks = [tr("truncated", language)] if one.truncated else []
    if unsupported:
        numbers = " ".join(f"[{number}]" for number in sorted(unsupported))
        remarks.append(tr("struck_out", language, numbers=numbers))
    if one.used is not None:
        remarks.append(tr("references_used", language, found=one.passages, used=one.used))
    return remarks


def _tools(one: Turn, language: Language) -> str:
    stopped = f'<span class="stopped">{tr("stopped", language)}</span>' if one.stopped else ""
    copy = (
        f'<button type="button" class="copy" data-action="copy" data-copied="{tr("copied", language)}">'
        f"{tr('copy', language)}</button>"
        if one.answer
        else ""
    )
    return f'<div class="tools">{copy}{stopped}</div>'


# ---------------------------------------------------------------- the source passage


def passage(found: Passage, n: int, language: Language) -> str:
    """A quote, highlighted in its surroundings, under the place it comes from."""
    headings = " › ".join(map(escape, found.headings))
    body = (
        f'<p class="where"><b class="number">{n}</b><strong>{escape(found.title)}</strong>'
        f'{_place(vars(found), language)}</p><p class="path">{escape(found.source)}</p>'
        + (f'<p class="headings">{headings}</p>' if headings else "")
        + _also_in(found, language)
        + f'<div class="text" tabindex="0">{escape(found.before)}<mark>{escape(found.quote)}</mark>'
        f"{escape(found.after)}</div>"
    )
    return _panel(body, language)


def _also_in(found: Passage, language: Language) -> str:
    """The other documents that hold the same text."""
    if not found.also_in:
        return ""
    # by path: copies mostly have the same title
    items = "".join(
        f'<li title="{escape(entry.get("title", ""))}">{escape(entry["source"])}</li>' for entry in found.also_in
    )
    return f'<div class="also"><span>{tr("also_in", language)}</span><ul>{items}</ul></div>'


def passage_problem(text: str, language: Language) -> str:
    """The panel when there is no passage to show."""
    return _panel(f'<p class="problem" role="alert">{escape(text)}</p>', language)


def _panel(body: str, language: Language) -> str:
    return (
        f'<aside class="passage" aria-label="{tr("passage", language)}"><header><h2>{tr("passage", language)}</h2>'
        f'<button type="button" data-action="close" aria-label="{tr("close", language)}" '
        f'title="{tr("close", language)}">✕</button></header>{body}</aside>'
    )


# ---------------------------------------------------------------- the knowledge base


def dropzone(report: Report, language: Language) -> str:
    """Where files are dropped, and below it how far the upload is or how it went."""
    busy = ' aria-busy="true"' if report.progress else ""
    disabled = " disabled" if report.progress else ""
    # the browser fills {done}, {total} and {name} while files are on their way
    uploading = tr("uploading", language, done="{done}", total="{total}", name="{name}")
    return (
        f'<label class="drop"{busy} data-uploading="{uploading}">'
        f'<input type="file" multiple{disabled} aria-label="{tr("drop_files", language)}">'
        f'<span class="icon" aria-hidden="true">↑</span><strong>{tr("drop_files", language)}</strong>'
        f"<small>{tr('drop_hint', language)}</small></label>"
        f'<div class="report" aria-live="polite">{_progress(report, language)}{_outcome(report, language)}</div>'
    )


def _progress(report: Report, language: Language) -> str:
    if report.progress is None:
        return ""
    done, total, name = report.progress
    text = tr("stopping", language) if report.stopping else tr("ingesting", language, done=done, total=total, name=name)
    return _bar(text, done, total, language, stopping=report.stopping)


def _bar(text: str, done: int, total: int, language: Language, *, stopping: bool) -> str:
    """Work in progress: what is being done, how far it is, and the button that ends it."""
    disabled = " disabled" if stopping else ""
    return (
        f'<div class="work"><p>{escape(text)}</p>'
        f'<button type="button" data-action="halt"{disabled}>{tr("stop", language)}</button>'
        f'<progress max="{max(total, 1)}" value="{done}" aria-label="{escape(text)}"></progress></div>'
    )


def _outcome(report: Report, language: Language) -> str:
    parts = []
    if report.problem:
        parts.append(f'<p class="problem" role="alert">{escape(report.problem.say(language))}</p>')
    if report.counts and any(report.counts[kind] for kind in ("added", "updated", "unchanged")):
        counts = {**report.counts, "seconds": f"{report.counts['seconds']:.1f}"}
        parts.append(f'<p class="done">{tr("ingest_done", language, **counts)}</p>')
    if report.skipped:
        parts.append(f'<p class="problem">{tr("ingest_stopped", language, count=report.skipped)}</p>')
    if report.failed:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(reason.say(language))}</td></tr>" for name, reason in report.failed
        )
        parts.append(
            f'<p class="problem" role="alert">{tr("ingest_failed", language, count=len(report.failed))}</p>'
            f'<table class="failures"><thead><tr><th>{tr("file", language)}</th><th>{tr("reason", language)}</th></tr>'
            f"</thead><tbody>{rows}</tbody></table>"
        )
    return "".join(parts)


def sources(rows: Sequence[SourceRow], wanted: str, language: Language, *, notice: str = "") -> str:
    """The documents whose title or path contains `wanted`, each to be selected, with remove and what was removed."""
    found = [row for row in rows if wanted.lower() in f"{row.title}\n{row.source}".lower()]
    said = f'<p class="done" role="status">{escape(notice)}</p>' if notice else ""
    if not found:
        return f'{said}<p class="nothing">{tr("no_match" if rows else "no_sources", language)}</p>'
    totals = tr("totals", language, count=len(found), chunks=sum(row.chunks for row in found))
    more = f" {tr('first_only', language, shown=ROWS_SHOWN)}" if len(found) > ROWS_SHOWN else ""
    # the browser fills {count} with the number of selected rows
    confirm = tr("confirm_remove", language, count="{count}")
    return (
        f'{said}<div class="bar"><span>{totals}{more}</span>'
        f'<button type="button" class="danger" data-action="remove" data-confirm="{confirm}" disabled>'
        f"{tr('remove', language)}</button>"
        f'<button type="button" data-action="cancel" hidden>{tr("cancel", language)}</button></div>'
        f'<table class="sources"><thead><tr><th class="pick"><input type="checkbox" data-action="all" '
        f'aria-label="{tr("select_all", language)}"></th><th>{tr("source_name", language)}</th>'
        f'<th class="number">{tr("chunks", language)}</th><th class="number">{tr("characters", language)}</th>'
        f"<th>{tr('added', language)}</th></tr></thead><tbody>"
        + "".join(_source(row, language) for row in found[:ROWS_SHOWN])
        + "</tbody></table>"
    )


def embedder(state: EmbedderState, language: Language) -> str:
    """Which embedder answers and how another one takes over; nothing where there is nothing to change."""
    answering, configured = _code(state.answering), _code(state.configured)
    ready = state.kept == state.configured
    if state.differs:
        said = tr("embedder_differs", language, answering=answering, configured=configured)
        hint = f"<small>{tr('embedder_ready' if ready else 'embedder_hint', language)}</small>"
        button = _button("reembed", "switch_over" if ready else "reembed", language)
    elif state.kept is not None:
        said, hint = tr("embedder_kept", language, answering=answering, kept=_code(state.kept)), ""
        button = _button("roll-back", "roll_back", language)
    elif state.progress is not None or state.problem is not None:
        said, hint, button = answering, "", ""
    else:
        return ""
    if state.progress is not None:
        text = tr("stopping", language) if state.stopping else ""
        done, total = state.progress
        text = text or tr("reembedding", language, done=f"{done:,}", total=f"{total:,}")
        button = _bar(text, done, total, language, stopping=state.stopping)
    return _embedder_panel(f"<div><p>{said}</p>{hint}{_change_outcome(state, language)}</div>{button}", language)


def embedder_problem(text: str, language: Language) -> str:
    """The panel when it cannot be told which embedder answers."""
    return _embedder_panel(f'<p class="problem" role="alert">{escape(text)}</p>', language)


def _embedder_panel(body: str, language: Language) -> str:
    return f'<section class="embedder"><h2>{tr("embedder", language)}</h2>{body}</section>'


def _change_outcome(state: EmbedderState, language: Language) -> str:
    if state.problem is not None:
        return f'<p class="problem" role="alert">{escape(state.problem.say(language))}</p>'
    return f'<p class="done" role="status">{tr("reembed_stopped", language)}</p>' if state.stopped else ""


def _button(action: str, key: str, language: Language) -> str:
    return f'<button type="button" data-action="{action}">{tr(key, language)}</button>'


def _code(name: str) -> str:
    return f"<code>{escape(name)}</code>"


def sources_problem(text: str) -> str:
    """What stands in the table's place when the documents cannot be listed."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def _source(row: SourceRow, language: Language) -> str:
    label = escape(tr("select", language, name=row.title))
    added = row.added[:16].replace("T", " ")
    return (
        f'<tr><td class="pick"><input type="checkbox" data-source="{escape(row.source)}" aria-label="{label}"></td>'
        f'<td class="name"><strong>{escape(row.title)}</strong><small>{escape(row.source)}</small></td>'
        f'<td class="number" data-label="{tr("chunks", language)}">{row.chunks:,}</td>'
        f'<td class="number" data-label="{tr("characters", language)}">{row.characters:,}</td>'
        f'<td data-label="{tr("added", language)}">{escape(added)}</td></tr>'
    )
