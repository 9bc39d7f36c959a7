"""Blocks put together: text, marks, titles."""

from __future__ import annotations

import pytest

from loaders.formats.blocks import Block, assemble, choose_title, plain_heading


def test_blocks_stand_a_blank_line_apart() -> None:
    text, marks = assemble([Block("甲"), Block("乙")])
    assert text == "甲\n\n乙"
    assert marks == [{"start": 0}]


def test_empty_blocks_leave_no_trace() -> None:
    assert assemble([Block(" \n"), Block("甲"), Block("\u200b"), Block("", header="")]) == ("甲", [{"start": 0}])


def test_no_blocks_are_an_empty_text_without_marks() -> None:
    assert assemble([]) == ("", [])


def test_headings_are_written_as_markdown_and_make_a_path() -> None:
    text, marks = assemble(
        [Block("总则", level=1), Block("甲"), Block("范围", level=2), Block("乙"), Block("附则", level=1), Block("丙")]
    )
    assert text == "# 总则\n\n甲\n\n## 范围\n\n乙\n\n# 附则\n\n丙"
    assert [(mark["start"], mark["headings"]) for mark in marks] == [
        (0, ["总则"]),
        (text.index("## 范围"), ["总则", "范围"]),
        (text.index("# 附则"), ["附则"]),
    ]


def test_a_skipped_level_does_not_invent_a_heading() -> None:
    _, marks = assemble([Block("一", level=1), Block("三", level=3), Block("二", level=2)])
    assert [mark["headings"] for mark in marks] == [["一"], ["一", "三"], ["一", "二"]]


def test_a_paragraph_with_a_heading_style_is_no_heading() -> None:
    text, marks = assemble([Block("很长" * 200, level=1)])
    assert text == "很长" * 200
    assert marks == [{"start": 0}]


def test_marks_are_complete_states_sorted_by_start() -> None:
    blocks = [
        Block("标题", level=1, place={"page": 1}),
        Block("正文", place={"page": 1}),
        Block("| 1 | 2 |", header="| a | b |\n| --- | --- |", place={"page": 2}),
        Block("后文", place={"page": 2}),
    ]
    text, marks = assemble(blocks)
    body = text.index("| 1 | 2 |")
    assert marks == [
        {"start": 0, "page": 1, "headings": ["标题"]},
        {"start": text.index("| a | b |"), "page": 2, "headings": ["标题"]},
        {"start": body - 1, "page": 2, "headings": ["标题"], "table_header": "| a | b |\n| --- | --- |"},
        {"start": text.index("后文"), "page": 2, "headings": ["标题"]},
    ]


def test_the_table_header_itself_lies_outside_the_table_mark() -> None:
    text, marks = assemble([Block("| 1 |", header="| a |\n| --- |")])
    assert text == "| a |\n| --- |\n| 1 |"
    assert marks[0] == {"start": 0}
    assert marks[1]["start"] == len("| a |\n| --- |")


def test_a_table_without_rows_is_its_header() -> None:
    assert assemble([Block("", header="| a |\n| --- |")])[0] == "| a |\n| --- |"


def test_a_continued_sentence_gets_no_gap_and_the_new_page_a_mark() -> None:
    text, marks = assemble([Block("前一页", place={"page": 1}), Block("后一页", continues=True, place={"page": 2})])
    assert text == "前一页后一页"
    assert marks == [{"start": 0, "page": 1}, {"start": 3, "page": 2}]


def test_a_continued_latin_sentence_gets_a_space() -> None:
    text, marks = assemble([Block("one"), Block("two", continues=True, place={"page": 2})])
    assert text == "one two"
    assert text[marks[1]["start"] :] == "two"


def test_offsets_are_those_of_the_normalised_text() -> None:
    text, marks = assemble([Block("ﬁ\u200b\r\n\r\n\r\n ", place={"page": 1}), Block("Ａ", place={"page": 2})])
    assert text == "fi\n\nA"
    assert text[marks[1]["start"] :] == "A"


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("**重点**", "重点"),
        ("`code` 用法", "code 用法"),
        ("[链接](http://x)", "链接"),
        ("![图](a.png) 说明", "图 说明"),
        ("snake_case 变量", "snake_case 变量"),
        ("*斜体* 与 __粗体__", "斜体 与 粗体"),
    ],
)
def test_heading_paths_have_no_markup(raw: str, plain: str) -> None:
    assert plain_heading(raw) == plain


@pytest.mark.parametrize(
    "junk",
    [
        "Microsoft Word - 文档1.doc",
        "Untitled",
        "无标题",
        "PowerPoint 演示文稿",
        "幻灯片 1",
        "a.docx",
        "1",
        "--",
        "",
        None,
        "x" * 300,
        "Slide 1",
        "稿子.indd",
    ],
)
def test_titles_that_programs_fill_in_are_passed_over(junk: str | None) -> None:
    assert choose_title([junk], "文件名") == "文件名"


def test_the_first_good_title_wins() -> None:
    assert choose_title([None, "无标题", " 劳动\n合同法 ", "其他"], "文件名") == "劳动 合同法"


def test_a_title_is_normalised() -> None:
    assert choose_title(["ＲＡＧ\u200b 入门"], "x") == "RAG 入门"
