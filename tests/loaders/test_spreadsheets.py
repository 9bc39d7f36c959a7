"""Workbooks built with openpyxl, and delimited text."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest

from loaders.errors import LoadError
from loaders.formats.blocks import Parsed

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]
StateAt = Callable[[Parsed, str], dict[str, object]]


@pytest.fixture
def read_book(tmp_path: Path, read_one: ReadOne) -> Callable[[openpyxl.Workbook], Parsed]:
    def reader(book: openpyxl.Workbook) -> Parsed:
        book.save(tmp_path / "a.xlsx")
        return read_one(tmp_path / "a.xlsx")

    return reader


ReadBook = Callable[[openpyxl.Workbook], Parsed]


def book_of(*rows: list[object]) -> openpyxl.Workbook:
    book = openpyxl.Workbook()
    for row in rows:
        book.worksheets[0].append(row)
    return book


def test_each_sheet_is_a_table_with_its_name_as_place(read_book: ReadBook, state_at: StateAt) -> None:
    book = book_of(["姓名", "年龄"], ["张三", 30])
    second = book.create_sheet("部门")
    second.append(["编号", "名称"])
    second.append([1, "研发"])
    parsed = read_book(book)
    assert parsed.text == (
        "| 姓名 | 年龄 |\n| --- | --- |\n| 张三 | 30 |\n\n| 编号 | 名称 |\n| --- | --- |\n| 1 | 研发 |"
    )
    assert state_at(parsed, "张三") == {"sheet": "Sheet", "table_header": "| 姓名 | 年龄 |\n| --- | --- |"}
    assert state_at(parsed, "研发") == {"sheet": "部门", "table_header": "| 编号 | 名称 |\n| --- | --- |"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1, "1"),
        (1.0, "1"),
        (0.1 + 0.2, "0.3"),
        (-2.5, "-2.5"),
        (12345678901234, "12345678901234"),
        (True, "TRUE"),
        (datetime.date(2023, 5, 1), "2023-05-01"),
        (datetime.datetime(2023, 5, 1, 8, 30), "2023-05-01 08:30:00"),
        ("多行\n文字", "多行 文字"),
        ("a|b", "a\\|b"),
        ("００１", "001"),
    ],
)
def test_cells_are_written_as_the_sheet_shows_them(value: object, shown: str, read_book: ReadBook) -> None:
    assert f"| x | {shown} |" in read_book(book_of(["键", "值"], ["x", value])).text


def test_merged_body_cells_keep_their_value_in_the_first_cell(read_book: ReadBook) -> None:
    book = book_of(["班级", "姓名"], ["一班", "张三"], [None, "李四"], ["二班", "王五"])
    book.worksheets[0].merge_cells("A2:A3")
    assert read_book(book).text.splitlines()[2:] == ["| 一班 | 张三 |", "|  | 李四 |", "| 二班 | 王五 |"]


def test_merged_header_cells_are_repeated(read_book: ReadBook) -> None:
    book = book_of(["姓名", "成绩", None], [None, "数学", "语文"], ["张三", 90, 80])
    book.worksheets[0].merge_cells("A1:A2")
    book.worksheets[0].merge_cells("B1:C1")
    assert read_book(book).text.splitlines()[0] == "| 姓名 | 成绩 数学 | 成绩 语文 |"


def test_a_title_row_above_the_header_is_a_caption(read_book: ReadBook) -> None:
    book = book_of(["2023年销售表", None, None], ["地区", "数量", "金额"], ["华北", 3, 4])
    book.worksheets[0].merge_cells("A1:C1")
    assert read_book(book).text.startswith("2023年销售表\n\n| 地区 | 数量 | 金额 |")


def test_empty_rows_and_a_far_away_cell_cost_nothing(read_book: ReadBook) -> None:
    book = book_of(["a", "b"], [1, 2])
    book.worksheets[0]["B20000"] = "远"
    assert read_book(book).text.splitlines()[-1] == "|  | 远 |"


def test_hidden_sheets_are_left_out(read_book: ReadBook) -> None:
    book = book_of(["a", "b"], [1, 2])
    hidden = book.create_sheet("隐藏")
    hidden.append(["秘密", "数据"])
    hidden.sheet_state = "hidden"
    assert "秘密" not in read_book(book).text


def test_a_workbook_without_cells_has_no_text(read_book: ReadBook) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        read_book(openpyxl.Workbook())


def test_a_zip_of_something_else_under_the_name_xlsx_is_refused(
    make_zip: Callable[[str, dict[str, str]], Path], read_one: ReadOne
) -> None:
    with pytest.raises(LoadError, match="ZIP"):
        read_one(make_zip("a.xlsx", {"readme.txt": "x"}))


def test_a_damaged_workbook_is_called_damaged(
    make_zip: Callable[[str, dict[str, str]], Path], read_one: ReadOne
) -> None:
    with pytest.raises(LoadError, match="损坏"):
        read_one(make_zip("a.xlsx", {"xl/workbook.xml": "<broken"}))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(delimiter: str, write: Write, read_one: ReadOne) -> None:
    rows = [["姓名", "年龄", "城市"], ["张三", "30", "北京，朝阳"], ["李四", "25", "上海"]]
    content = "\n".join(delimiter.join(row) for row in rows)
    assert read_one(write("a.csv", content)).text.splitlines()[2] == "| 张三 | 30 | 北京，朝阳 |"


def test_quoted_cells_may_hold_lines_and_delimiters(write: Write, read_one: ReadOne) -> None:
    content = '标题,内容\r\n甲,"第一行\r\n第二行，有,逗号和""引号"""\r\n乙,短\r\n'
    lines = read_one(write("a.csv", content)).text.splitlines()
    assert lines[2:] == ['| 甲 | 第一行 第二行，有,逗号和"引号" |', "| 乙 | 短 |"]


def test_a_table_header_goes_with_every_row(write: Write, read_one: ReadOne, state_at: StateAt) -> None:
    parsed = read_one(write("a.csv", "a,b\n1,2\n3,4\n"))
    assert state_at(parsed, "| 3 | 4 |") == {"table_header": "| a | b |\n| --- | --- |"}


def test_a_gbk_csv_is_decoded(write: Write, read_one: ReadOne) -> None:
    content = "姓名,备注\n张三,这是用办公软件保存的表格\n".encode("gbk")
    assert "| 张三 | 这是用办公软件保存的表格 |" in read_one(write("a.csv", content)).text


def test_one_column_is_plain_lines(write: Write, read_one: ReadOne) -> None:
    assert read_one(write("a.csv", "第一行\n第二行\n")).text == "第一行\n第二行"


def test_tab_separated_files_are_read(write: Write, read_one: ReadOne) -> None:
    assert read_one(write("a.tsv", "a\tb\n1\t2, 3\n")).text.splitlines()[2] == "| 1 | 2, 3 |"


@pytest.mark.parametrize(
    "content", ['a,b\n"never closed,1\n2,3', 'a,b\n1,"x"y\n', ",,,\n1,2", "a,b\n1,2\n" * 50 + "\0"]
)
def test_untidy_csv_is_read_all_the_same(content: str, write: Write, read_one: ReadOne) -> None:
    assert read_one(write("a.csv", content)).text


def test_a_csv_of_delimiters_only_has_no_text(write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        read_one(write("a.csv", ",,,\n,,,\n"))
