from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ui import markup
from ui.views import Passage, Problem, Report, SourceRow, Turn

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe src=javascript:alert(1)>",
    "</div></article><style>body{display:none}</style>",
    "[click](javascript:alert(1))",
    "![pixel](http://evil.example/pixel.png)",
    "<http://evil.example/>",
    "[1]: http://evil.example/\n\n[1]",
    '```html" onmouseover="alert(1)\n<b>\n```',
]
OURS = {
    "article",
    "aside",
    "div",
    "p",
    "span",
    "b",
    "small",
    "strong",
    "br",
    "button",
    "header",
    "h2",
    "mark",
    "pre",
    "code",
}
TABLES = {"table", "thead", "tbody", "tr", "th", "td", "input", "label", "progress"}


class Seen(HTMLParser):
    """The tags and attributes a browser would act upon."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def assert_inert(html: str) -> None:
    seen = Seen(html)
    assert seen.tags <= OURS | TABLES
    assert not {name for name in seen.attributes if name.startswith("on") or name in {"href", "src", "style"}}


def answered(text: str, *citations: int, source: str = "/kb/a.txt") -> Turn:
    turn = Turn("问题？")
    turn.take({"result": text})
    turn.take(
        {"citations": [{"n": n, "source": source, "page": 3, "start": 0, "end": 1, "quote": "x"} for n in citations]}
    )
    return turn


@pytest.mark.parametrize("attack", ATTACKS)
def test_markup_in_answers_questions_and_sources_is_inert(attack: str) -> None:
    turn = answered(attack, 1, source=attack)
    turn.question = attack
    turn.titles = {attack: attack}
    turn.problem = Problem(attack, attack)
    assert_inert(markup.turn(turn, 0, "zh"))
    assert_inert(markup.live_turn(turn, "zh"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_markup_in_passages_is_inert(attack: str) -> None:
    html = markup.passage(Passage(attack, attack, 1, [attack], attack, attack, attack), 1, "zh")
    assert_inert(html)
    assert_inert(markup.passage_problem(attack, "zh"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_markup_in_file_names_and_reasons_is_inert(attack: str) -> None:
    rows = [SourceRow(attack, attack, 1, 1, attack)]
    assert_inert(markup.sources(rows, "", "zh", notice=attack))
    assert_inert(markup.dropzone(Report(failed=[(attack, Problem(attack, attack))], progress=(0, 1, attack)), "zh"))


def test_marks_open_the_citations_that_exist() -> None:
    html = markup.turn(answered("甲[1]乙[2]。", 1), 4, "zh")
    assert re.search(r'甲<button[^>]*data-turn="4" data-n="1"[^>]*>1</button>乙<span class="cite">\[2\]</span>。', html)


def test_marks_inside_code_stay_text() -> None:
    assert "<code>a[1]</code>" in markup.answer("`a[1]`", {1}, 0, "zh")


def test_answers_are_markdown() -> None:
    html = markup.answer("**重点**\n\n- 一\n- 二\n\n| 甲 | 乙 |\n|---|---|\n| 1 | 2 |", set(), 0, "zh")
    assert "<strong>重点</strong>" in html
    assert html.count("<li>") == 2
    assert "<td>2</td>" in html


def test_a_line_break_in_an_answer_is_kept() -> None:
    assert "一<br" in markup.answer("一\n二", set(), 0, "zh")


def test_a_passage_highlights_the_quote_between_its_surroundings() -> None:
    found = Passage("/kb/制度.pdf", "员工制度", 7, ["第二章", "考勤"], "前文。", "引文。", "后文。")
    html = markup.passage(found, 2, "zh")
    assert "前文。<mark>引文。</mark>后文。" in html
    for shown in ("员工制度", "/kb/制度.pdf", "第 7 页", "第二章 › 考勤"):
        assert shown in html


def test_a_passage_without_page_or_headings_shows_neither() -> None:
    html = markup.passage(Passage("/kb/a.txt", "a", None, [], "", "引文", ""), 1, "zh")
    assert "页" not in html
    assert 'class="headings"' not in html


def test_a_refusal_and_a_stop_are_named() -> None:
    turn = answered("没有相关内容。")
    turn.refused = turn.stopped = True
    html = markup.turn(turn, 0, "zh")
    assert "知识库里没有找到依据" in html
    assert "已停止" in html


def test_a_very_long_question_is_shortened_in_the_conversation() -> None:
    turn = Turn("长" * 100_000)
    assert len(markup.turn(turn, 0, "zh")) < 2_000


def test_an_empty_knowledge_base_leads_to_the_upload() -> None:
    html = markup.welcome(["例？"], "zh", empty=True)
    assert "知识库还是空的" in html
    assert 'data-action="upload"' in html
    assert "例？" not in html


def test_examples_carry_their_question() -> None:
    html = markup.welcome(['A "b" <c>?'], "zh", empty=False)
    assert 'data-question="A &quot;b&quot; &lt;c&gt;?"' in html


def test_the_table_is_filtered_by_title_and_path() -> None:
    rows = [SourceRow("/kb/one.txt", "考勤", 2, 1234, ""), SourceRow("/kb/two.txt", "差旅", 1, 5, "")]
    html = markup.sources(rows, "ONE", "zh")
    assert "考勤" in html
    assert "差旅" not in html
    assert "1,234" in html
    assert "没有名称匹配" in markup.sources(rows, "three", "zh")
    assert "还没有文档" in markup.sources([], "", "zh")


def test_a_long_table_says_that_it_is_cut() -> None:
    rows = [SourceRow(f"/kb/{n}.txt", str(n), 1, 1, "") for n in range(markup.ROWS_SHOWN + 1)]
    html = markup.sources(rows, "", "zh")
    assert html.count("data-source=") == markup.ROWS_SHOWN
    assert f"共 {markup.ROWS_SHOWN + 1} 份" in html
    assert f"只列出前 {markup.ROWS_SHOWN} 份" in html


def test_a_report_lists_each_failure_in_the_pages_language() -> None:
    report = Report()
    counts = {"added": 2, "updated": 1, "unchanged": 0, "removed": 0, "chunks": 9, "seconds": 1.26}
    report.take({**counts, "failed": [{"path": "/tmp/x/a.pdf", "reason": "a.pdf 已加密 / a.pdf is encrypted"}]})
    assert "新增 2 份，更新 1 份" in markup.dropzone(report, "zh")
    assert "用时 1.3 秒" in markup.dropzone(report, "zh")
    assert "<td>a.pdf</td><td>a.pdf 已加密</td>" in markup.dropzone(report, "zh")
    assert "<td>a.pdf</td><td>a.pdf is encrypted</td>" in markup.dropzone(report, "en")


def test_a_reason_that_is_not_two_halves_stays_whole() -> None:
    assert Problem.parse("a / b / c") == Problem("a / b / c", "a / b / c")
    assert Problem.parse("only one") == Problem("only one", "only one")
