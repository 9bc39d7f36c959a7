"""Word's automatic numbers."""

from __future__ import annotations

from typing import Any

import lxml.etree
import pytest

from loaders.formats.numbering import Numbering, chinese_number

NS = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def numbering(*levels: tuple[str, str], styles: dict[str | None, Any] | None = None) -> Numbering:
    body = "".join(
        f'<w:lvl w:ilvl="{depth}"><w:start w:val="1"/><w:numFmt w:val="{form}"/><w:lvlText w:val="{pattern}"/></w:lvl>'
        for depth, (form, pattern) in enumerate(levels)
    )
    root = lxml.etree.fromstring(
        f'<w:numbering {NS}><w:abstractNum w:abstractNumId="7">{body}</w:abstractNum>'
        '<w:num w:numId="1"><w:abstractNumId w:val="7"/></w:num></w:numbering>'
    )
    return Numbering(root, styles or {})


def paragraph(depth: int = 0, number: str = "1") -> Any:
    return lxml.etree.fromstring(
        f'<w:p {NS}><w:pPr><w:numPr><w:ilvl w:val="{depth}"/><w:numId w:val="{number}"/></w:numPr></w:pPr></w:p>'
    )


def test_articles_are_counted_in_chinese() -> None:
    count = numbering(("chineseCountingThousand", "第%1条"))
    assert [count.label(paragraph()) for _ in range(3)] == ["第一条 ", "第二条 ", "第三条 "]


def test_deeper_levels_begin_again_after_each_higher_one() -> None:
    count = numbering(("decimal", "%1"), ("decimal", "%1.%2"))
    depths = [0, 1, 1, 0, 1]
    assert [count.label(paragraph(depth)).strip() for depth in depths] == ["1", "1.1", "1.2", "2", "2.1"]


def test_bullets_are_dashes() -> None:
    assert numbering(("bullet", "\uf06c")).label(paragraph()) == "- "


@pytest.mark.parametrize(
    ("form", "third"),
    [
        ("decimal", "3"),
        ("upperLetter", "C"),
        ("lowerLetter", "c"),
        ("upperRoman", "III"),
        ("lowerRoman", "iii"),
        ("decimalEnclosedCircleChinese", "③"),
        ("none", ""),
    ],
)
def test_other_number_formats(form: str, third: str) -> None:
    count = numbering((form, "%1"))
    labels = [count.label(paragraph()).strip() for _ in range(3)]
    assert labels[2] == third


def test_a_paragraph_without_a_number_has_no_label() -> None:
    plain = lxml.etree.fromstring(f"<w:p {NS}/>")
    assert numbering(("decimal", "%1")).label(plain) == ""
    assert Numbering(None, {}).label(paragraph()) == ""
    assert numbering(("decimal", "%1")).label(paragraph(number="0")) == ""  # 0 switches a style's number off


def test_the_number_may_come_from_the_style_or_its_base() -> None:
    styles = {
        "Base": lxml.etree.fromstring(
            f'<w:style {NS}><w:pPr><w:numPr><w:numId w:val="1"/></w:numPr></w:pPr></w:style>'
        ),
        "Article": lxml.etree.fromstring(f'<w:style {NS}><w:basedOn w:val="Base"/></w:style>'),
    }
    styled = lxml.etree.fromstring(f'<w:p {NS}><w:pPr><w:pStyle w:val="Article"/></w:pPr></w:p>')
    assert numbering(("decimal", "%1."), styles=styles).label(styled) == "1. "


def test_a_style_based_on_itself_ends() -> None:
    styles = {"Loop": lxml.etree.fromstring(f'<w:style {NS}><w:basedOn w:val="Loop"/></w:style>')}
    styled = lxml.etree.fromstring(f'<w:p {NS}><w:pPr><w:pStyle w:val="Loop"/></w:pPr></w:p>')
    assert numbering(("decimal", "%1."), styles=styles).label(styled) == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "一"),
        (10, "十"),
        (12, "十二"),
        (20, "二十"),
        (21, "二十一"),
        (100, "一百"),
        (105, "一百零五"),
        (110, "一百一十"),
        (1000, "一千"),
        (1005, "一千零五"),
        (1050, "一千零五十"),
        (0, "0"),
        (10000, "10000"),
    ],
)
def test_chinese_numbers(number: int, text: str) -> None:
    assert chinese_number(number) == text
