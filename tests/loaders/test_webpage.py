"""HTML files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.errors import LoadError
from loaders.formats.blocks import Parsed, assemble
from loaders.formats.webpage import html_blocks

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]


def text_of(html: str) -> str:
    return assemble(html_blocks(html)[0])[0]


def test_headings_paragraphs_and_tables_are_found(write: Write, read_one: ReadOne) -> None:
    html = (
        "<html><head><title>产品</title></head><body><h1>指南</h1><p>第一步。</p>"
        "<table><tr><th>姓名</th><th>年龄</th></tr><tr><td>张三</td><td>30</td></tr></table><h2>条款</h2><p>欢迎。</p>"
    )
    parsed = read_one(write("a.html", html))
    assert parsed.text == "# 指南\n\n第一步。\n\n| 姓名 | 年龄 |\n| --- | --- |\n| 张三 | 30 |\n\n## 条款\n\n欢迎。"
    assert parsed.metadata["title"] == "产品"
    assert parsed.metadata["marks"][-1]["headings"] == ["指南", "条款"]


@pytest.mark.parametrize(
    "dropped",
    [
        "<script>x()</script>",
        "<style>p{}</style>",
        "<nav>菜单</nav>",
        "<footer>版权</footer>",
        "<!-- 注释 -->",
        "<noscript>x</noscript>",
        "<div hidden>x</div>",
        '<p style="display: none">x</p>',
        "<svg><text>x</text></svg>",
        '<ul role="navigation"><li>x</ul>',
        "<button>x</button>",
        "<?php x ?>",
    ],
)
def test_what_is_not_content_is_dropped(dropped: str) -> None:
    assert text_of(f"<body><p>甲</p>{dropped}<p>乙</p>") == "甲\n\n乙"


def test_text_after_a_dropped_element_stays() -> None:
    assert text_of("<p>甲<script>x</script>乙</p>") == "甲乙"


def test_a_page_of_nothing_but_navigation_keeps_it() -> None:
    assert text_of("<nav><p>菜单</p></nav>") == "菜单"


def test_inline_markup_does_not_break_words() -> None:
    assert text_of("<p>知<b>识</b>库<a href='x'>问</a><span>答</span></p>") == "知识库问答"


def test_white_space_collapses_and_br_breaks() -> None:
    assert text_of("<p>one \n  two<br>three</p>") == "one two\nthree"


def test_preformatted_text_keeps_its_lines() -> None:
    assert text_of("<pre>def f():\n    return 1</pre>") == "def f():\n    return 1"


def test_lists_stay_together() -> None:
    assert (
        text_of("<p>前</p><ul><li>甲<li>乙</ul><ol><li>一</li><li>二</li></ol>后")
        == "前\n\n- 甲\n- 乙\n1. 一\n2. 二\n\n后"
    )


def test_text_outside_any_element_is_found() -> None:
    assert text_of("裸露的文字") == "裸露的文字"


def test_spans_of_header_cells_are_repeated_and_of_body_cells_left_empty() -> None:
    html = (
        "<table><tr><th rowspan=2>姓名</th><th colspan=2>成绩</th></tr><tr><th>数学</th><th>语文</th></tr>"
        "<tr><td rowspan=2>张三</td><td>90</td><td>80</td></tr><tr><td>70</td><td>60</td></tr></table>"
    )
    assert text_of(html).splitlines() == [
        "| 姓名 | 成绩 数学 | 成绩 语文 |",
        "| --- | --- | --- |",
        "| 张三 | 90 | 80 |",
        "|  | 70 | 60 |",
    ]


def test_a_table_that_only_arranges_the_page_is_not_a_table() -> None:
    inner = "<table><tr><td>a</td><td>b</td></tr><tr><td>1</td><td>2</td></tr></table>"
    html = f"<table><tr><td><h1>标题</h1>{inner}</td></tr></table>"
    assert text_of(html) == "# 标题\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_caption_stands_above_its_table() -> None:
    assert text_of("<table><caption>名单</caption><tr><td>a<td>b<tr><td>1<td>2</table>").startswith("名单\n\n| a | b |")


def test_blocks_inside_a_cell_are_separated() -> None:
    assert "| 甲 乙 | x |" in text_of("<table><tr><th>a<th>b<tr><td><p>甲</p><p>乙</p><td>x</table>")


@pytest.mark.parametrize("span", ["99999999999", "-3", "abc", "0", "1e9", "²"])
def test_an_absurd_span_is_harmless(span: str) -> None:
    assert "| 甲 |" in text_of(f"<table><tr><td colspan='{span}'>甲</td><td>乙</td></tr><tr><td>1<td>2</table>")


def test_a_declared_charset_is_honoured(write: Write, read_one: ReadOne) -> None:
    html = '<html><head><meta charset="euc-jp"></head><body>検索</body>'.encode("euc_jp")
    assert read_one(write("a.html", html)).text == "検索"


def test_a_wrong_declared_charset_is_overruled(write: Write, read_one: ReadOne) -> None:
    html = '<meta http-equiv="Content-Type" content="text/html; charset=utf-8"><p>中文网页的内容</p>'.encode("gbk")
    assert read_one(write("a.html", html)).text == "中文网页的内容"


def test_an_xml_declaration_is_no_obstacle(write: Write, read_one: ReadOne) -> None:
    html = '<?xml version="1.0" encoding="gb2312"?><html xmlns="http://www.w3.org/1999/xhtml"><body><p>镕</p></body></html>'
    assert read_one(write("a.xhtml", html.encode("gbk"))).text == "镕"


@pytest.mark.parametrize("html", ["<html></html>", "<!-- x -->", "<script>x</script>", "   "])
def test_a_page_without_text_says_so(html: str, write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        read_one(write("a.html", html))


def test_an_image_under_the_name_html_is_refused(write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="PNG"):
        read_one(write("a.html", b"\x89PNG\r\n\x1a\n"))


def test_the_alternative_text_of_an_image_is_kept() -> None:
    assert text_of("<p>如图<img alt='流程图' src=x>所示</p>") == "如图流程图所示"


@pytest.mark.parametrize("html", ["<div>" * 20_000 + "深", "<b>" * 20_000 + "深", "<li>项" * 20_000, "<p>段" * 20_000])
def test_deep_and_long_pages_stay_fast(html: str) -> None:
    started = time.perf_counter()
    html_blocks(html)
    assert time.perf_counter() - started < 5


def test_a_table_of_many_rows_stays_fast() -> None:
    started = time.perf_counter()
    rows = "<tr><td>1<td>2<td>3" * 20_000
    assert len(text_of(f"<table><tr><th>a<th>b<th>c{rows}</table>").splitlines()) == 20_002
    assert time.perf_counter() - started < 5
