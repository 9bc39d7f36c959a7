"""Word files, built with python-docx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import docx
import lxml.etree
import pytest
from docx.oxml import parse_xml

from loaders.errors import LoadError
from loaders.formats.blocks import Parsed

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]
StateAt = Callable[[Parsed, str], dict[str, object]]
NS = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def saver(document: Any) -> Path:
        document.save(str(tmp_path / "a.docx"))
        return tmp_path / "a.docx"

    return saver


Save = Callable[[Any], Path]


def test_headings_paragraphs_and_tables_stand_in_order(save: Save, read_one: ReadOne, state_at: StateAt) -> None:
    document = docx.Document()
    document.add_heading("总则", level=1)
    document.add_paragraph("第一段。")
    document.add_heading("范围", level=2)
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(table._cells, ["姓名", "年龄", "张三", "30"], strict=True):
        cell.text = text
    document.add_paragraph("末段。")
    parsed = read_one(save(document))
    assert parsed.text == ("# 总则\n\n第一段。\n\n## 范围\n\n| 姓名 | 年龄 |\n| --- | --- |\n| 张三 | 30 |\n\n末段。")
    assert state_at(parsed, "张三") == {
        "headings": ["总则", "范围"],
        "table_header": "| 姓名 | 年龄 |\n| --- | --- |",
    }
    assert state_at(parsed, "末段") == {"headings": ["总则", "范围"]}


def test_the_title_style_gives_the_title(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    document.core_properties.title = "另一个标题"
    document.add_heading("员工手册", level=0)
    document.add_paragraph("正文")
    assert read_one(save(document)).metadata["title"] == "员工手册"


def test_the_property_gives_the_title_and_a_template_name_does_not(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    document.core_properties.title = "考勤制度"
    document.add_paragraph("正文")
    assert read_one(save(document)).metadata["title"] == "考勤制度"
    document.core_properties.title = "Microsoft Word - 文档1"
    assert read_one(save(document)).metadata["title"] == "a"


def test_a_style_based_on_a_heading_is_a_heading(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    style = document.styles.add_style("公司标题", 1)
    style.base_style = document.styles["Heading 3"]
    document.add_paragraph("自定义", style="公司标题")
    assert read_one(save(document)).text == "### 自定义"


def test_an_outline_level_makes_a_heading(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    paragraph = document.add_paragraph("大纲")
    paragraph._p.get_or_add_pPr().append(parse_xml(f'<w:outlineLvl {NS} w:val="1"/>'))
    assert read_one(save(document)).text == "## 大纲"


def test_list_items_stay_together(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    document.add_paragraph("前")
    document.add_paragraph("甲", style="List Bullet")
    document.add_paragraph("乙", style="List Bullet")
    document.add_paragraph("后")
    assert read_one(save(document)).text == "前\n\n- 甲\n- 乙\n\n后"


def test_numbered_items_show_their_numbers(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    document.add_paragraph("甲", style="List Number")
    document.add_paragraph("乙", style="List Number")
    assert read_one(save(document)).text == "1. 甲\n\n2. 乙"


def test_nested_tables_are_read_once_after_their_table(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    outer = document.add_table(rows=2, cols=2)
    for cell, text in zip(outer._cells, ["甲", "乙", "丙", "丁"], strict=True):
        cell.text = text
    inner = outer.cell(1, 1).add_table(rows=2, cols=2)
    for cell, text in zip(inner._cells, ["子", "丑", "寅", "卯"], strict=True):
        cell.text = text
    text = read_one(save(document)).text
    assert text == "| 甲 | 乙 |\n| --- | --- |\n| 丙 | 丁 |\n\n| 子 | 丑 |\n| --- | --- |\n| 寅 | 卯 |"


def test_merged_cells_keep_their_value_in_the_first_cell(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    table = document.add_table(rows=3, cols=3)
    for number, cell in enumerate(table._cells):
        cell.text = str(number)
    merged = table.cell(1, 0).merge(table.cell(2, 0))
    merged.text = "合并"
    lines = read_one(save(document)).text.splitlines()
    assert lines[2:] == ["| 合并 | 4 | 5 |", "|  | 7 | 8 |"]


def test_headers_footers_and_deleted_text_are_left_out(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    document.sections[0].header.paragraphs[0].text = "页眉"
    document.sections[0].footer.paragraphs[0].text = "页脚"
    paragraph = document.add_paragraph("留下")
    paragraph._p.append(parse_xml(f"<w:del {NS}><w:r><w:delText>删去</w:delText></w:r></w:del>"))
    paragraph._p.append(parse_xml(f"<w:ins {NS}><w:r><w:t>加上</w:t></w:r></w:ins>"))
    assert read_one(save(document)).text == "留下加上"


def test_a_text_box_is_read_once(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    box = f"<w:txbxContent {NS}><w:p><w:r><w:t>框内</w:t></w:r></w:p></w:txbxContent>"
    mc = "http://schemas.openxmlformats.org/markup-compatibility/2006"
    run = document.add_paragraph("框外").runs[0]._r
    run.append(
        lxml.etree.fromstring(
            f'<mc:AlternateContent xmlns:mc="{mc}"><mc:Choice Requires="wps">{box}</mc:Choice>'
            f"<mc:Fallback>{box}</mc:Fallback></mc:AlternateContent>"
        )
    )
    assert read_one(save(document)).text == "框外\n\n框内"


def test_content_controls_and_hyperlinks_are_read(save: Save, read_one: ReadOne) -> None:
    document = docx.Document()
    paragraph = document.add_paragraph("见")
    paragraph._p.append(parse_xml(f"<w:hyperlink {NS}><w:r><w:t>附件</w:t></w:r></w:hyperlink>"))
    document.element.body.insert(
        1, parse_xml(f"<w:sdt {NS}><w:sdtContent><w:p><w:r><w:t>控件</w:t></w:r></w:p></w:sdtContent></w:sdt>")
    )
    assert read_one(save(document)).text == "见附件\n\n控件"


def test_an_empty_document_has_no_text(save: Save, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        read_one(save(docx.Document()))


def test_a_text_file_under_the_name_docx_is_refused(write: Write, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match=r"plain text"):
        read_one(write("a.docx", "其实是文本"))
