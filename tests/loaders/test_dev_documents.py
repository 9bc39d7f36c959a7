"""The project's 29 development documents behave as their manifest expects."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from loaders.documents import LoaderConfig, load_documents
from loaders.errors import LoadError

# Read when the tests are collected, to have one test per file; the fixture skips them where the folder is absent.
MANIFEST = Path(__file__).resolve().parents[3] / "shared" / "data" / "docs" / "dev" / "manifest_dev.json"
ROWS: list[dict[str, Any]] = (
    json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.is_file() else [{"file": "none"}]
)
MARKUP = re.compile(r"\|[ |-]*")  # what a table costs beyond its text
# The manifest counts these with their HTML tags.
COUNTED_WITH_TAGS = {".html"}


def load(path: Path) -> tuple[str, dict[str, Any]]:
    (document,) = load_documents(path, LoaderConfig())
    return document.page_content, document.metadata


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_each_file_does_what_the_manifest_expects(row: dict[str, Any], shared_data: Path) -> None:
    path = shared_data / "docs" / row["file"]
    started = time.perf_counter()
    if "encrypted" in row["expected"]:
        with pytest.raises(LoadError, match="加密"):
            load(path)
        return
    if "no text" in row["expected"]:
        with pytest.raises(LoadError, match="没有文字"):
            load(path)
        return
    text, metadata = load(path)
    assert time.perf_counter() - started < 20
    assert metadata["format"] == row["format"]
    if "han_chars" in row:
        found = len(re.findall(r"[\u4e00-\u9fff]", text))
        assert found == pytest.approx(row["han_chars"], rel=0.05)
    if "text_chars" in row and path.suffix not in COUNTED_WITH_TAGS:
        assert len(MARKUP.sub(" ", text)) == pytest.approx(row["text_chars"], rel=0.12)


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_marks_are_sorted_and_inside_the_text(row: dict[str, Any], shared_data: Path) -> None:
    if row["expected"] not in ("text", "text or clean error"):
        pytest.skip("the file gives no text")
    text, metadata = load(shared_data / "docs" / row["file"])
    starts = [mark["start"] for mark in metadata["marks"]]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < len(text)


def test_pages_of_the_pdfs_are_counted(shared_data: Path) -> None:
    for row in ROWS:
        if row.get("pages") and row["expected"] == "text":
            _, metadata = load(shared_data / "docs" / row["file"])
            assert max(mark["page"] for mark in metadata["marks"]) == row["pages"], row["file"]


def test_the_two_column_journal_paper_reads_on_across_its_columns(shared_data: Path) -> None:
    """Sentences that the print breaks at the end of a line and of the left column (read off the page by eye)."""
    text, _ = load(shared_data / "docs/dev/01_Enco_zh_0.pdf")
    assert "其本质上是一种制度创新，能促进技术创新和产业变革。" in text.replace("\n", "")
    assert "国务院有近20次常务会议着重讨论相关实施政策，发布了22份文件" in text


def test_the_latin_two_column_paper_has_no_hyphens_left(shared_data: Path) -> None:
    text, _ = load(shared_data / "docs/dev/60_multicolumn.pdf")
    assert "consectetuer adipiscing elit. Ut purus elit, vestibulum ut, placerat ac, adipiscing vitae" in text


def test_the_quarterly_report_keeps_its_tables(shared_data: Path) -> None:
    """Figures copied from pages 3 and 4 of the report."""
    text, metadata = load(shared_data / "docs/dev/04_issue-67-example.pdf")
    assert "| 营业收入（元） | 4,755,785.11 | 5,699,227.63 | -16.55% |" in text
    assert "| 杨琴秀 | 境内自然人 | 3.20% | 27,955,752 |" in text
    offset = text.index("| 杨琴秀 | 境内自然人")
    mark = [mark for mark in metadata["marks"] if mark["start"] <= offset][-1]
    assert mark["page"] == 4
    assert mark["table_header"].startswith("| 股东名称 | 股东性质 | 持股比例 | 持股数量 |")


def test_the_statute_has_its_chapters(shared_data: Path) -> None:
    text, metadata = load(shared_data / "docs/dev/75_劳动合同法(2012-12-28).md")
    offset = text.index("第五十七条")
    mark = [mark for mark in metadata["marks"] if mark["start"] <= offset][-1]
    assert mark["headings"] == ["中华人民共和国劳动合同法", "第五章 特别规定", "第二节 劳务派遣"]


def test_the_merged_cells_of_the_workbook_stay_in_place(shared_data: Path) -> None:
    text, _ = load(shared_data / "docs/dev/30_excel_with_image.xlsx")
    assert text.startswith(
        "| 班级 | 姓名 | 英语 | 数学 | 语文 |\n| --- | --- | --- | --- | --- |\n| 一班 | 张三 | A |  |  |\n"
    )


def test_multi_line_cells_of_the_csv_are_one_row(shared_data: Path) -> None:
    text, _ = load(shared_data / "docs/dev/40_langchain-ChatGLM_closed.csv")
    lines = text.splitlines()
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns == {len(re.findall(r"(?<!\\)\|", lines[0]))}


def test_twenty_thousand_statutes_are_streamed_in_seconds(shared_data: Path) -> None:
    """1.4 s measured alone on the development machine (2 cores)."""
    started = time.perf_counter()
    count = sum(1 for _ in load_documents(shared_data / "statutes_core_passages.jsonl"))
    assert count == 20_030
    assert time.perf_counter() - started < 15
