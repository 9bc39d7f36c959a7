"""PowerPoint files, built with python-pptx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pptx
import pytest
from pptx.chart.data import CategoryChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.util import Cm

from loaders.errors import LoadError
from loaders.formats.blocks import Parsed

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]
StateAt = Callable[[Parsed, str], dict[str, object]]
TITLE_ONLY, BLANK = 5, 6


@pytest.fixture
def read_deck(tmp_path: Path, read_one: ReadOne) -> Callable[[Any], Parsed]:
    def reader(deck: Any) -> Parsed:
        deck.save(str(tmp_path / "a.pptx"))
        return read_one(tmp_path / "a.pptx")

    return reader


ReadDeck = Callable[[Any], Parsed]


def add_slide(deck: Any, title: str | None = None) -> Any:
    slide = deck.slides.add_slide(deck.slide_layouts[BLANK if title is None else TITLE_ONLY])
    if title is not None:
        slide.shapes.title.text = title
    return slide


def add_box(shapes: Any, text: str, left: float = 1, top: float = 5) -> None:
    shapes.add_textbox(Cm(left), Cm(top), Cm(5), Cm(1)).text_frame.text = text


def test_titles_are_headings_and_slides_are_counted(read_deck: ReadDeck, state_at: StateAt) -> None:
    deck = pptx.Presentation()
    add_box(add_slide(deck, "背景").shapes, "第一页正文")
    add_box(add_slide(deck, "结论").shapes, "第二页正文")
    parsed = read_deck(deck)
    assert parsed.text == "# 背景\n\n第一页正文\n\n# 结论\n\n第二页正文"
    assert state_at(parsed, "第二页正文") == {"slide": 2, "headings": ["结论"]}
    assert parsed.metadata["title"] == "背景"


def test_shapes_are_read_from_top_to_bottom_and_left_to_right(read_deck: ReadDeck) -> None:
    deck = pptx.Presentation()
    shapes = add_slide(deck).shapes
    add_box(shapes, "下", top=12)
    add_box(shapes, "右", left=12, top=3)
    add_box(shapes, "左", left=1, top=3.01)
    assert read_deck(deck).text == "左\n\n右\n\n下"


def test_grouped_shapes_are_read(read_deck: ReadDeck) -> None:
    deck = pptx.Presentation()
    group = add_slide(deck).shapes.add_group_shape()
    add_box(group.shapes, "组内")
    add_box(group.shapes.add_group_shape().shapes, "组中组", top=9)
    assert read_deck(deck).text == "组内\n\n组中组"


def test_notes_follow_their_slide(read_deck: ReadDeck, state_at: StateAt) -> None:
    deck = pptx.Presentation()
    slide = add_slide(deck, "标题")
    slide.notes_slide.notes_text_frame.text = "讲稿"
    parsed = read_deck(deck)
    assert parsed.text == "# 标题\n\n备注：讲稿"
    assert state_at(parsed, "讲稿")["slide"] == 1


def test_tables_are_rows_with_their_header(read_deck: ReadDeck, state_at: StateAt) -> None:
    deck = pptx.Presentation()
    table = add_slide(deck).shapes.add_table(3, 2, Cm(1), Cm(1), Cm(8), Cm(3)).table
    for row, cells in enumerate([["姓名", "年龄"], ["张三", "30"], ["李四", "25"]]):
        for column, text in enumerate(cells):
            table.cell(row, column).text = text
    parsed = read_deck(deck)
    assert parsed.text == "| 姓名 | 年龄 |\n| --- | --- |\n| 张三 | 30 |\n| 李四 | 25 |"
    assert state_at(parsed, "李四")["table_header"] == "| 姓名 | 年龄 |\n| --- | --- |"


def test_merged_cells_are_empty_in_the_body_and_repeated_in_the_first_row(read_deck: ReadDeck) -> None:
    deck = pptx.Presentation()
    table = add_slide(deck).shapes.add_table(3, 3, Cm(1), Cm(1), Cm(8), Cm(3)).table
    for number in range(9):
        table.cell(number // 3, number % 3).text = str(number)
    table.cell(0, 1).merge(table.cell(0, 2))
    table.cell(1, 0).merge(table.cell(2, 0))
    lines = read_deck(deck).text.splitlines()
    assert lines[0] == "| 0 | 1 2 | 1 2 |"
    assert lines[3] == "|  | 7 | 8 |"


def test_charts_are_tables_of_their_numbers(read_deck: ReadDeck) -> None:
    data = CategoryChartData()
    data.categories = ["一季度", "二季度"]
    data.add_series("收入", (1.5, 2))
    deck = pptx.Presentation()
    add_slide(deck).shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, Cm(1), Cm(1), Cm(8), Cm(5), data)
    assert read_deck(deck).text == "|  | 收入 |\n| --- | --- |\n| 一季度 | 1.5 |\n| 二季度 | 2 |"


def test_line_breaks_and_paragraphs_stay(read_deck: ReadDeck) -> None:
    deck = pptx.Presentation()
    add_box(add_slide(deck).shapes, "甲\v乙\n丙")
    assert read_deck(deck).text == "甲\n乙\n丙"


def test_a_deck_without_text_says_so(read_deck: ReadDeck) -> None:
    deck = pptx.Presentation()
    add_slide(deck)
    with pytest.raises(LoadError, match="没有文字"):
        read_deck(deck)


def test_a_picture_under_the_name_pptx_is_refused(write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="JPEG"):
        read_one(write("a.pptx", b"\xff\xd8\xff\xe0"))
