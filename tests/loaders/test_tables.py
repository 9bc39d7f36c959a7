"""Rows of cells as Markdown."""

from __future__ import annotations

from loaders.formats.blocks import assemble
from loaders.formats.tables import clean_cell, spread_header, table_blocks


def markdown(rows: list[list[str]], header_rows: int = 1) -> str:
    return assemble(table_blocks(rows, header_rows=header_rows))[0]


def test_the_first_row_is_the_header() -> None:
    assert markdown([["姓名", "年龄"], ["张三", "30"]]) == "| 姓名 | 年龄 |\n| --- | --- |\n| 张三 | 30 |"


def test_empty_rows_and_columns_are_dropped() -> None:
    assert (
        markdown([["", "", ""], ["a", "", "b"], ["", " ", ""], ["1", "", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    )


def test_ragged_rows_are_filled_up() -> None:
    assert markdown([["a", "b", "c"], ["1"], ["1", "2", "3"]]).splitlines()[2] == "| 1 |  |  |"


def test_no_rows_are_no_table() -> None:
    assert markdown([]) == markdown([[]]) == markdown([["", ""], [" "]]) == ""


def test_one_column_is_plain_lines() -> None:
    assert markdown([["甲", ""], ["乙", ""]]) == "甲\n乙"


def test_a_cell_is_one_line_with_its_pipes_escaped() -> None:
    assert clean_cell(" a|b\n\tc ") == "a\\|b c"


def test_a_caption_above_the_header_is_a_line_of_its_own() -> None:
    rows = [["员工名单", "", ""], ["姓名", "年龄", "部门"], ["张三", "30", "研发"]]
    assert markdown(rows) == "员工名单\n\n| 姓名 | 年龄 | 部门 |\n| --- | --- | --- |\n| 张三 | 30 | 研发 |"


def test_a_caption_repeated_over_every_column_counts_as_one() -> None:
    rows = [["员工名单"] * 3, ["姓名", "年龄", "部门"], ["张三", "30", "研发"]]
    assert markdown(rows).startswith("员工名单\n\n| 姓名 |")


def test_a_header_of_two_rows_gives_each_column_both_names() -> None:
    rows = [["姓名", "成绩", "成绩"], ["姓名", "数学", "语文"], ["张三", "90", "80"]]
    assert markdown(rows, header_rows=2).splitlines()[0] == "| 姓名 | 成绩 数学 | 成绩 语文 |"


def test_a_merged_header_cell_is_repeated_and_makes_the_header_two_rows() -> None:
    rows = [["姓名", "成绩", ""], ["", "数学", "语文"], ["张三", "90", "80"]]
    merges = [((0, 0), (1, 0)), ((0, 1), (0, 2))]
    assert spread_header(rows, merges) == 2
    assert rows[0] == ["姓名", "成绩", "成绩"]


def test_a_merge_in_the_body_changes_nothing() -> None:
    rows = [["班级", "姓名"], ["一班", "张三"], ["", "李四"]]
    assert spread_header(rows, [((1, 0), (2, 0))]) == 1
    assert rows[2] == ["", "李四"]


def test_a_row_merged_over_the_whole_width_is_a_caption_above_the_header() -> None:
    rows = [["成绩单", "", ""], ["姓名", "数学", "语文"], ["张三", "90", "80"]]
    assert spread_header(rows, [((0, 0), (0, 2))]) == 2
    assert markdown(rows, header_rows=2).startswith("成绩单\n\n| 姓名 | 数学 | 语文 |")


def test_empty_rows_above_do_not_count_as_header() -> None:
    assert spread_header([["", ""], ["a", "b"], ["1", "2"]], []) == 1


def test_a_table_knows_its_place() -> None:
    blocks = list(table_blocks([["a", "b"], ["1", "2"]], place={"page": 3}))
    assert [block.place for block in blocks] == [{"page": 3}]
    assert blocks[0].header == "| a | b |\n| --- | --- |"
