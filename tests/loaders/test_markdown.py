"""Markdown files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.formats.blocks import Parsed
from loaders.formats.markdown import markdown_blocks, read_markdown

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]
StateAt = Callable[[Parsed, str], dict[str, object]]


def levels(text: str) -> list[tuple[int, str]]:
    return [(block.level, block.text) for block in markdown_blocks(text) if block.level]


def test_headings_make_a_path(write: Write, read_one: ReadOne, state_at: StateAt) -> None:
    parsed = read_one(write("a.md", "# 手册\n\n前言\n\n## 安装 ##\n步骤\n\n## **使用**\n说明"))
    assert parsed.text == "# 手册\n\n前言\n\n## 安装\n\n步骤\n\n## **使用**\n\n说明"
    assert state_at(parsed, "步骤") == {"headings": ["手册", "安装"]}
    assert state_at(parsed, "说明") == {"headings": ["手册", "使用"]}


def test_underlined_headings_count() -> None:
    assert levels("标题\n====\n\n小节\n----\n正文") == [(1, "标题"), (2, "小节")]


def test_headings_without_a_space_count_before_chinese_and_not_before_a_hashtag() -> None:
    assert levels("##总则\n正文\n#1.目的\n\n#hashtag\n\n#!/bin/sh") == [(2, "总则"), (1, "1.目的")]


def test_comments_in_code_are_no_headings() -> None:
    assert levels("```python\n# 注释\n```\n\n    # 缩进的代码\n") == []


def test_headings_in_quotes_and_lists_are_no_sections() -> None:
    assert levels("> # 引用\n\n- # 列表") == []


def test_a_table_keeps_its_header_for_every_row(write: Write, read_one: ReadOne, state_at: StateAt) -> None:
    parsed = read_one(write("a.md", "前文\n\n| 姓名 | 年龄 |\n|:--|--:|\n| 张三 | 30 |\n| 李四 | 25 |\n\n后文"))
    assert state_at(parsed, "李四") == {"table_header": "| 姓名 | 年龄 |\n|:--|--:|"}
    assert state_at(parsed, "后文") == {}
    assert "| 张三 | 30 |\n| 李四 | 25 |" in parsed.text


def test_front_matter_is_left_out_and_gives_the_title(write: Write, read_one: ReadOne) -> None:
    parsed = read_one(write("a.md", '---\ntitle: "劳动合同法"\ndate: 2012-12-28\n---\n\n# 第一章\n\n正文'))
    assert parsed.text == "# 第一章\n\n正文"
    assert parsed.metadata["title"] == "劳动合同法"


def test_a_rule_at_the_top_is_not_front_matter_without_an_end(write: Write, read_one: ReadOne) -> None:
    assert "正文" in read_one(write("a.md", "---\n正文")).text


def test_the_highest_heading_is_the_title(write: Write, read_one: ReadOne) -> None:
    assert read_one(write("a.md", "## 目录\n\n# 员工手册\n\n正文")).metadata["title"] == "员工手册"


def test_without_a_heading_the_file_name_is_the_title(write: Write, read_one: ReadOne) -> None:
    assert read_one(write("会议 记录.md", "正文")).metadata["title"] == "会议 记录"


def test_nothing_but_the_layout_of_lines_changes() -> None:
    text = "前\n# 一\n- 甲\n  - 乙\n\n| a | b |\n|---|---|\n| 1 | 2 |\n尾"
    pieces = [f"{'#' * block.level} {block.text}" if block.level else block.text for block in markdown_blocks(text)]
    headers = [block.header for block in markdown_blocks(text)]
    assert "".join("".join(pieces + headers).split()).count("甲") == 1
    assert sorted("".join([*pieces, *headers]).replace("\n", "").replace(" ", "")) == sorted(
        text.replace("\n", "").replace(" ", "")
    )


@pytest.mark.parametrize("unit", ["> ", "- ", "[", "*", "`", "| a ", "# ", "\n\n", "    ", "```\n", "<a "])
def test_hostile_repetition_stays_fast(unit: str) -> None:
    started = time.perf_counter()
    list(markdown_blocks(unit * 20_000))
    assert time.perf_counter() - started < 5


def test_comments_are_not_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# 标题\n\n<!-- INFO END -->\n\n正文。\n\n```html\n<!-- 代码里的保留 -->\n```\n", encoding="utf-8")
    text = "\n".join(block.text for block in read_markdown(path).blocks)
    assert "INFO" not in text
    assert "正文。" in text
    assert "代码里的保留" in text
