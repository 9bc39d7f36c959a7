"""PDF files, written by hand (see conftest)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import LoadError
from loaders.formats.blocks import Parsed

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]
StateAt = Callable[[Parsed, str], dict[str, object]]
MakePdf = Callable[..., Path]
XS, YS = [72, 172, 272, 372], [700, 680, 660, 640]
LONG = "这一段文字很长很长需要写满整整一行才会换到下一行继续写下去所以还没有写完"


def rulings(xs: list[int] = XS, ys: list[int] = YS) -> list[tuple[float, float, float, float]]:
    return [(xs[0], y, xs[-1], y) for y in ys] + [(x, ys[0], x, ys[-1]) for x in xs]


def cells(*rows: str, xs: list[int] = XS, ys: list[int] = YS) -> list[tuple[float, float, float, str]]:
    """Texts in the cells of the grid; each row is written "甲 乙 丙", "-" for an empty cell."""
    return [
        (xs[column] + 5, ys[row + 1] + 5, 10, text)
        for row, texts in enumerate(rows)
        for column, text in enumerate(texts.split(" "))
        if text != "-"
    ]


def test_text_carries_its_page(make_pdf: MakePdf, read_one: ReadOne, state_at: StateAt) -> None:
    parsed = read_one(make_pdf({"texts": [(72, 700, 12, "第一页。")]}, {"texts": [(72, 700, 12, "第二页。")]}))
    assert parsed.text == "第一页。\n\n第二页。"
    assert state_at(parsed, "第二页") == {"page": 2}


def test_a_paragraph_broken_over_lines_is_joined(make_pdf: MakePdf, read_one: ReadOne) -> None:
    texts = [(72, 700, 12, LONG), (72, 680, 12, "接着写完这一句。"), (96, 660, 12, "另起一段。")]
    assert read_one(make_pdf({"texts": texts})).text == f"{LONG}接着写完这一句。\n另起一段。"


def test_a_heading_does_not_run_into_its_paragraph(make_pdf: MakePdf, read_one: ReadOne) -> None:
    texts = [(72, 720, 14, "一、引言"), (96, 700, 12, LONG), (72, 680, 12, "完。")]
    assert read_one(make_pdf({"texts": texts})).text == f"一、引言\n{LONG}完。"


def test_a_sentence_goes_on_over_the_page_break(make_pdf: MakePdf, read_one: ReadOne) -> None:
    first = [(72, 200, 12, LONG), (72, 180, 12, LONG)]
    parsed = read_one(make_pdf({"texts": first}, {"texts": [(72, 780, 12, "到这里才结束。")]}))
    assert parsed.text == f"{LONG}{LONG}到这里才结束。"
    assert parsed.metadata["marks"] == [{"start": 0, "page": 1}, {"start": 2 * len(LONG), "page": 2}]


def test_running_heads_and_page_numbers_stay_once(make_pdf: MakePdf, read_one: ReadOne) -> None:
    pages = [
        {"texts": [(72, 810, 9, "公司年度报告"), (300, 20, 9, str(number)), (72, 600, 12, f"第{number}页的内容。")]}
        for number in (1, 2, 3)
    ]
    text = read_one(make_pdf(*pages)).text
    assert text.count("公司年度报告") == 1
    assert [f"第{number}页的内容。" in text for number in (1, 2, 3)] == [True] * 3


def test_text_in_the_middle_that_repeats_stays(make_pdf: MakePdf, read_one: ReadOne) -> None:
    page = {"texts": [(72, 500, 12, "每页都有的正文。")]}
    assert read_one(make_pdf(page, page)).text.count("每页都有的正文。") == 2


def test_a_ruled_table_stands_where_it_belongs(make_pdf: MakePdf, read_one: ReadOne, state_at: StateAt) -> None:
    texts = [(72, 750, 12, "表前。"), *cells("姓名 年龄 城市", "张三 30 北京", "李四 25 上海"), (72, 600, 12, "表后。")]
    parsed = read_one(make_pdf({"texts": texts, "lines": rulings()}))
    assert parsed.text == (
        "表前。\n\n| 姓名 | 年龄 | 城市 |\n| --- | --- | --- |\n| 张三 | 30 | 北京 |\n| 李四 | 25 | 上海 |\n\n表后。"
    )
    assert state_at(parsed, "李四") == {
        "page": 1,
        "table_header": "| 姓名 | 年龄 | 城市 |\n| --- | --- | --- |",
    }
    assert state_at(parsed, "表后") == {"page": 1}


def test_a_cell_of_two_lines_is_joined(make_pdf: MakePdf, read_one: ReadOne) -> None:
    ys = [700, 660, 620]
    texts = [
        *cells("项目 金额 说明", ys=ys),
        (77, 645, 10, "香港中央结算"),
        (77, 630, 10, "有限公司"),
        (177, 640, 10, "5"),
    ]
    text = read_one(make_pdf({"texts": texts, "lines": rulings(ys=ys)})).text
    assert text.splitlines()[2] == "| 香港中央结算有限公司 | 5 |  |"


def test_merged_header_cells_name_each_column(make_pdf: MakePdf, read_one: ReadOne) -> None:
    lines = [line for line in rulings() if line[0] != 272 or line[2] != 272]
    lines += [(272, 680, 272, 640)]  # no vertical line in the first row between the second and third column
    lines = [line for line in lines if line != (72, 680, 372, 680)] + [(172, 680, 372, 680)]  # first column: two rows
    texts = [*cells("- 数学成绩 -", "- 期中 期末", "张三 90 80"), (77, 675, 10, "姓名")]
    text = read_one(make_pdf({"texts": texts, "lines": lines})).text
    assert text.splitlines()[0] == "| 姓名 | 数学成绩 期中 | 数学成绩 期末 |"


def test_a_table_open_at_its_sides_keeps_its_outer_columns(make_pdf: MakePdf, read_one: ReadOne) -> None:
    lines = [line for line in rulings() if line[0] != line[2] or line[0] in (172, 272)]
    texts = cells("姓名 年龄 城市", "张三 30 北京", "李四 25 上海")
    text = read_one(make_pdf({"texts": texts, "lines": lines})).text
    assert text.splitlines()[3] == "| 李四 | 25 | 上海 |"


def test_a_table_drawn_as_thin_rectangles_is_found(make_pdf: MakePdf, read_one: ReadOne) -> None:
    bars = [f"{x0} {min(y0, y1)} {max(x1 - x0, 0.5)} {max(abs(y1 - y0), 0.5)} re f" for x0, y0, x1, y1 in rulings()]
    page = {"texts": cells("姓名 年龄 城市", "张三 30 北京", "李四 25 上海"), "operators": "\n".join(bars)}
    assert "| 张三 | 30 | 北京 |" in read_one(make_pdf(page)).text


def test_a_table_that_goes_on_gets_its_header_again(make_pdf: MakePdf, read_one: ReadOne, state_at: StateAt) -> None:
    first = {"texts": cells("姓名 年龄 城市", "张三 30 北京", "李四 25 上海"), "lines": rulings()}
    second = {"texts": cells("王五 41 广州", "赵六 52 深圳", "孙七 63 成都"), "lines": rulings()}
    parsed = read_one(make_pdf(first, second))
    assert parsed.text.count("| 姓名 | 年龄 | 城市 |") == 2
    assert state_at(parsed, "赵六") == {"page": 2, "table_header": "| 姓名 | 年龄 | 城市 |\n| --- | --- | --- |"}


def test_a_repeated_header_is_not_doubled(make_pdf: MakePdf, read_one: ReadOne) -> None:
    page = {"texts": cells("姓名 年龄 城市", "张三 30 北京", "李四 25 上海"), "lines": rulings()}
    assert read_one(make_pdf(page, page)).text.count("| 姓名 | 年龄 | 城市 |") == 2


def test_a_row_across_the_table_before_other_columns_begins_a_section(make_pdf: MakePdf, read_one: ReadOne) -> None:
    """As in the quarterly reports of listed companies: two tables in one frame."""
    ys = [700, 680, 660, 640, 620]
    verticals = [
        (72, 700, 72, 620),
        (372, 700, 372, 620),
        (222, 700, 222, 680),
        (172, 660, 172, 620),
        (272, 660, 272, 620),
    ]
    texts = [(77, 685, 10, "股东总数"), (227, 685, 10, "79053"), (77, 665, 10, "前十名股东")]
    texts += [(x + 5, 645, 10, text) for x, text in zip(XS, ["名称", "比例", "数量"], strict=False)]
    texts += [(x + 5, 625, 10, text) for x, text in zip(XS, ["香港中央", "29", "257"], strict=False)]
    text = read_one(make_pdf({"texts": texts, "lines": [(72, y, 372, y) for y in ys] + verticals})).text
    assert text == (
        "| 股东总数 | 79053 |\n| --- | --- |\n\n前十名股东\n\n"
        "| 名称 | 比例 | 数量 |\n| --- | --- | --- |\n| 香港中央 | 29 | 257 |"
    )


def test_a_box_around_a_text_is_no_table(make_pdf: MakePdf, read_one: ReadOne) -> None:
    page = {"texts": [(80, 650, 12, "框里的一句话。")], "lines": rulings([72, 372], [700, 640])}
    assert read_one(make_pdf(page)).text == "框里的一句话。"


def test_the_grid_of_a_plot_is_no_table(make_pdf: MakePdf, read_one: ReadOne) -> None:
    xs, ys = [*range(72, 400, 20)], [*range(700, 400, -20)]
    page = {"texts": [(200, 555, 10, "曲线"), (100, 655, 10, "峰值")], "lines": rulings(xs, ys)}
    assert "|" not in read_one(make_pdf(page)).text


def test_a_rotated_page_reads_as_shown(make_pdf: MakePdf, read_one: ReadOne) -> None:
    """A landscape page: the content is turned by a matrix, /Rotate turns it back."""
    low = [y - 300 for y in YS]
    page: dict[str, Any] = {
        "texts": [(50, 560, 12, "横向页面。"), *cells("姓名 年龄 城市", "张三 30 北京", "李四 25 上海", ys=low)],
        "lines": rulings(ys=low),
        "rotate": 90,
        "operators": "0 1 -1 0 595 0 cm",
    }
    assert read_one(make_pdf(page)).text == (
        "横向页面。\n\n| 姓名 | 年龄 | 城市 |\n| --- | --- | --- |\n| 张三 | 30 | 北京 |\n| 李四 | 25 | 上海 |"
    )


def two_columns(order: str) -> list[tuple[float, float, float, str]]:
    left = [(50, 780 - 16 * row, 11, f"左{row:02d}栏的文字一直写到栏的右边界为止") for row in range(14)]
    right = [(310, 780 - 16 * row, 11, f"右{row:02d}栏的文字一直写到栏的右边界为止") for row in range(14)]
    if order == "by column":
        return left + right
    return [text for pair in zip(left, right, strict=True) for text in pair]


@pytest.mark.parametrize("order", ["by column", "by row"])
def test_two_columns_are_read_one_after_the_other(order: str, make_pdf: MakePdf, read_one: ReadOne) -> None:
    text = read_one(make_pdf({"texts": two_columns(order)})).text
    places = [text.index(f"{side}{row:02d}") for side in "左右" for row in range(14)]
    assert places == sorted(places)


def test_a_title_across_both_columns_stays_above_them(make_pdf: MakePdf, read_one: ReadOne) -> None:
    title = (50, 810, 11, "横跨两栏的标题横跨两栏的标题横跨两栏的标题横跨两栏的标题横跨两栏")
    text = read_one(make_pdf({"texts": [title, *two_columns("by row")]})).text
    assert text.startswith("横跨两栏的标题")
    assert text.index("左13") < text.index("右00")


def test_short_cells_in_two_columns_stay_row_by_row(make_pdf: MakePdf, read_one: ReadOne) -> None:
    """A form without rulings: label and value belong together."""
    texts = [
        item
        for row in range(14)
        for item in ((50, 780 - 16 * row, 11, "姓名"), (310, 780 - 16 * row, 11, f"值{row:02d}"))
    ]
    text = read_one(make_pdf({"texts": texts})).text
    assert text.splitlines()[:2] == ["姓名 值00", "姓名 值01"]


def test_a_title_in_the_metadata_counts_when_the_page_shows_it(make_pdf: MakePdf, read_one: ReadOne) -> None:
    page = {"texts": [(72, 700, 12, "劳动合同管理办法")]}
    assert read_one(make_pdf(page, title="劳动合同 管理办法")).metadata["title"] == "劳动合同 管理办法"
    assert read_one(make_pdf(page, title="模板文件")).metadata["title"] == "made"


def test_a_file_that_is_no_pdf_is_refused(write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="PNG"):
        read_one(write("a.pdf", b"\x89PNG\r\n\x1a\n" + bytes(100)))


def test_a_truncated_pdf_is_called_damaged(write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="损坏"):
        read_one(write("a.pdf", b"%PDF-1.7\n1 0 obj\n<<"))


def test_a_pdf_without_text_and_pictures_has_no_text(make_pdf: MakePdf, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        read_one(make_pdf({}))


def test_radicals_and_ligatures_are_normalised(make_pdf: MakePdf, read_one: ReadOne) -> None:
    assert read_one(make_pdf({"texts": [(72, 700, 12, "⽤⼾⻓期")]})).text == "用户长期"


def test_many_rulings_stay_fast(make_pdf: MakePdf, read_one: ReadOne) -> None:
    lines = rulings([*range(20, 580, 2)], [*range(820, 20, -2)])
    path = make_pdf({"texts": [(72, 700, 12, "密密麻麻的网格。")], "lines": lines})
    started = time.perf_counter()
    read_one(path)
    assert time.perf_counter() - started < 10
