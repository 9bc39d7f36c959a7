from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from langchain_core.documents import Document

from ui import markup
from ui.views import EmbedderState, Passage, Problem, Report, SourceRow, Turn

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
    "section",
    "ul",
    "li",
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


def test_a_mark_that_its_source_does_not_bear_out_opens_nothing_and_says_so() -> None:
    turn = answered("甲[1]乙[2]。", 1, 2)
    turn.citations[1]["supported"] = False
    html = markup.turn(turn, 0, "zh")
    assert html.count('data-n="1"') == 2  # the mark and the source below the answer
    assert 'data-n="2"' not in html
    assert re.search(r'<span class="cite unsupported" title="资料中没有[^"]*">\[2\]</span>', html)
    assert "划掉的 [2]：资料中没有支持那句话的内容。" in html  # where there is no mouse to point with


@pytest.mark.parametrize("marks", ["[1][2]", "【1】【2】", "[1, 2]", "［1、2］", " [1] [2]"])
def test_marks_as_chinese_models_write_them_are_marks_too(marks: str) -> None:
    turn = answered(f"甲{marks}。", 1, 2)
    turn.citations[1]["supported"] = False
    html = markup.turn(turn, 0, "zh")
    marks = r'<button[^>]*data-n="1"[^>]*>1</button> ?<span class="cite unsupported"[^>]*>\[2\]</span>'
    assert re.search(f"甲 ?{marks}。", html)


def test_passages_that_the_model_had_no_room_for_are_told_of() -> None:
    turn = Turn("问题？")
    turn.take({"source_documents": [Document(text, metadata={"source": "a"}) for text in ("一", "二", "三")]})
    turn.take({"result": "甲[1]"})
    turn.take({"citations": [], "refused": False})
    assert "放不下" not in markup.turn(turn, 0, "zh")
    turn.take({"references_used": [1, 2]})
    assert "放不下全部 3 段资料，只用了前 2 段" in markup.turn(turn, 0, "zh")
    assert "all 3 passages: only the first 2" in markup.turn(turn, 0, "en")


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


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ({"page": 3}, "第 3 页"),
        ({"page": None, "slide": 4}, "第 4 张幻灯片"),
        ({"page": None, "sheet": "预算"}, "工作表 预算"),
        ({"page": None, "sheet": "<b>"}, "工作表 &lt;b&gt;"),
    ],
)
def test_a_citation_and_its_passage_tell_the_page_slide_or_sheet(place: dict[str, Any], shown: str) -> None:
    turn = answered("甲[1]。", 1)
    turn.citations[0] = {**turn.citations[0], **place}
    assert f'<span class="page">{shown}</span>' in markup.turn(turn, 0, "zh")
    found = Passage("/kb/a.pptx", "a", headings=[], before="", quote="引文", after="", **{"page": None, **place})
    assert f'<span class="page">{shown}</span>' in markup.passage(found, 1, "zh")


def test_further_sources_of_the_same_text_are_counted_and_then_named() -> None:
    also_in = [{"source": "/kb/旧版/制度.pdf", "title": "<旧制度>"}, {"source": "/kb/附件.txt"}]
    turn = answered("甲[1]。", 1)
    assert "另见" not in markup.turn(turn, 0, "zh")
    turn.citations[0] = {**turn.citations[0], "also_in": also_in}
    assert "另见 2 处" in markup.turn(turn, 0, "zh")
    html = markup.passage(Passage("/kb/a.txt", "a", None, [], "", "引文", "", also_in=also_in), 1, "zh")
    assert "同样的文字还见于" in html
    assert '<li title="&lt;旧制度&gt;">/kb/旧版/制度.pdf</li><li title="">/kb/附件.txt</li>' in html
    assert "还见于" not in markup.passage(Passage("/kb/a.txt", "a", None, [], "", "引文", ""), 1, "zh")


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
    report.take({**counts, "failed": [{"path": "/tmp/x/a.pdf", "reason": "a.pdf 已加密 / a.pdf is encrypted"}]}, 5)
    assert "新增 2 份，更新 1 份" in markup.dropzone(report, "zh")
    assert "用时 1.3 秒" in markup.dropzone(report, "zh")
    assert "<td>a.pdf</td><td>a.pdf 已加密</td>" in markup.dropzone(report, "zh")
    assert "<td>a.pdf</td><td>a.pdf is encrypted</td>" in markup.dropzone(report, "en")


def test_an_upload_in_progress_can_be_stopped_once() -> None:
    report = Report(progress=(3, 9, "a.pdf"))
    assert '<button type="button" data-action="halt">停止</button>' in markup.dropzone(report, "zh")
    report.stopping = True
    html = markup.dropzone(report, "zh")
    assert "正在停止…" in html
    assert 'data-action="halt" disabled' in html


def test_a_stopped_upload_tells_how_many_files_are_left_out() -> None:
    report = Report()
    counts = {"added": 2, "updated": 1, "unchanged": 3, "removed": 0, "chunks": 9, "seconds": 1.2}
    report.take({**counts, "failed": [{"path": "/tmp/x/a.pdf", "reason": "坏 / bad"}]}, 10)
    assert "已停止，还有 3 份没有处理" in markup.dropzone(report, "zh")
    report.take({**counts, "failed": []}, 6)
    assert "已停止" not in markup.dropzone(report, "zh")


# -- the embedder --------------------------------------------------------------------------------------------------

DIFFERS = EmbedderState("new-512", "old-1024", differs=True)


def actions(html: str) -> list[str]:
    return re.findall(r'data-action="([\w-]+)"', html)


def test_where_the_configured_embedder_answers_there_is_no_panel() -> None:
    assert markup.embedder(EmbedderState("a", "a", differs=False), "zh") == ""


def test_another_embedder_than_the_configured_one_is_named_with_the_way_to_change() -> None:
    html = markup.embedder(DIFFERS, "zh")
    assert "现在由 <code>old-1024</code> 回答，配置的是 <code>new-512</code>。" in html
    assert "重新生成向量" in html
    assert actions(html) == ["reembed"]
    assert "old-1024</code> answers now" in markup.embedder(DIFFERS, "en")


def test_vectors_that_are_kept_make_the_change_a_switch() -> None:
    html = markup.embedder(replace(DIFFERS, kept="new-512"), "zh")
    assert actions(html) == ["reembed"]
    assert ">切换</button>" in html
    assert "重新生成向量" not in html


def test_after_the_change_there_is_a_way_back() -> None:
    html = markup.embedder(EmbedderState("new-512", "new-512", differs=False, kept="old-1024"), "zh")
    assert "<code>old-1024</code> 的向量仍然保留" in html
    assert actions(html) == ["roll-back"]


def test_a_change_in_progress_shows_how_far_it_is_and_can_only_be_stopped() -> None:
    html = markup.embedder(replace(DIFFERS, progress=(1536, 6001)), "zh")
    assert "正在生成向量 1,536/6,001" in html
    assert '<progress max="6001" value="1536"' in html
    assert actions(html) == ["halt"]
    stopping = markup.embedder(replace(DIFFERS, progress=(1536, 6001), stopping=True), "zh")
    assert 'data-action="halt" disabled' in stopping
    assert "正在停止…" in stopping


def test_a_change_that_was_stopped_or_failed_says_so_beside_the_button() -> None:
    stopped = markup.embedder(replace(DIFFERS, stopped=True), "zh")
    assert "已停止，做好的向量已保存" in stopped
    failed = markup.embedder(replace(DIFFERS, problem=Problem("磁盘<已满>", "the disk is full")), "zh")
    assert '<p class="problem" role="alert">磁盘&lt;已满&gt;</p>' in failed
    assert actions(stopped) == actions(failed) == ["reembed"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_names_of_embedders_are_text(attack: str) -> None:
    for state in (EmbedderState(attack, attack, differs=True), EmbedderState(attack, "a", differs=False, kept=attack)):
        assert_inert(markup.embedder(state, "zh"))


def test_a_reason_that_is_not_two_halves_stays_whole() -> None:
    assert Problem.parse("a / b / c") == Problem("a / b / c", "a / b / c")
    assert Problem.parse("only one") == Problem("only one", "only one")


def test_an_answer_that_ran_out_of_tokens_says_so_below_it() -> None:
    turn = Turn("问题？")
    turn.take({"result": "甲"})
    turn.take({"citations": [], "refused": False})
    assert "没有写完" not in markup.turn(turn, 0, "zh")
    turn.take({"truncated": True})
    assert "回答没有写完" in markup.turn(turn, 0, "zh")
    assert "The answer is cut off" in markup.turn(turn, 0, "en")
