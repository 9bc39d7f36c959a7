"""Normalising characters and joining the lines that a page layout broke."""

from __future__ import annotations

import time
import unicodedata

import pytest

from loaders.text import continues, join_broken_lines, join_lines, normalise


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("ＡＢＣｘｙｚ０１２", "ABCxyz012"),
        ("５０％＋３＝５３", "50%+3=53"),
        ("３．１４", "3.14"),
        ("［１］｛２｝", "[1]{2}"),
        ("ｶﾞｷﾞﾊﾟ", "ガギパ"),
        ("e\u0301", "é"),
        ("ﬁle ﬂow oﬀice", "file flow office"),
    ],
)
def test_full_and_half_width_forms_become_the_plain_character(raw: str, plain: str) -> None:
    assert normalise(raw) == plain


@pytest.mark.parametrize(
    "kept", ["，。！？；：（）“”‘’", "《》〈〉「」【】、…—～", "①②㎡℃Ⅲ", "👩\ufe0f", "\tx", "々〇"]
)
def test_chinese_punctuation_and_symbols_stay_as_they_are(kept: str) -> None:
    assert normalise(f"a{kept}b") == f"a{kept}b"


# (radical, ideograph): code charts of Kangxi Radicals and CJK Radicals Supplement
@pytest.mark.parametrize(
    ("radical", "ideograph"),
    [
        ("⽤", "用"),
        ("⼈", "人"),
        ("⾦", "金"),
        ("⼾", "户"),
        ("⻓", "长"),
        ("⻔", "门"),
        ("⻋", "车"),
        ("⻢", "马"),
        ("⻅", "见"),
        ("⻚", "页"),
        ("⻛", "风"),
        ("⻬", "齐"),
        ("⻰", "龙"),
        ("⺠", "民"),
        ("⺟", "母"),
        ("⻘", "青"),
    ],
)
def test_radicals_become_the_ideographs_they_look_like(radical: str, ideograph: str) -> None:
    assert normalise(radical) == ideograph
    assert unicodedata.name(radical).split()[0:2] in (["KANGXI", "RADICAL"], ["CJK", "RADICAL"])


def test_compatibility_ideographs_become_the_unified_ones() -> None:
    assert normalise("\uf900\ufa0c\uf9e4\U0002f800") == "豈兀理丽"  # U+F900 -> U+8C48, per the code chart


def test_vertical_punctuation_becomes_horizontal_chinese_punctuation() -> None:
    assert normalise("︵一︶︐二︒") == "（一），二。"


def test_no_control_or_format_character_of_all_unicode_is_left_but_the_tab() -> None:
    left = [
        code
        for code in range(0x110000)
        if unicodedata.category(chr(code)) in {"Cc", "Cf", "Cs"} or code & 0xFFFE == 0xFFFE
        if normalise(f"a{chr(code)}b") not in {"ab", "a b", "a\nb"}
    ]
    assert left == [ord("\t")]


@pytest.mark.parametrize("space", ["\u3000", "\xa0", "\u2003", "\u202f", "\u2009"])
def test_every_kind_of_space_becomes_a_space(space: str) -> None:
    assert normalise(f"甲{space}乙") == "甲 乙"


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_every_kind_of_line_end_becomes_a_newline(end: str) -> None:
    assert normalise(f"甲{end}乙") == "甲\n乙"


@pytest.mark.parametrize(
    "hidden", ["\u200b", "\u200d", "\u2060", "\ufeff", "\ufffe", "\uffff", "\x00", "\x07", "\x1b", "\u202e", "\xad"]
)
def test_characters_nobody_sees_are_removed(hidden: str) -> None:
    assert normalise(f"知{hidden}识") == "知识"


def test_lone_surrogates_are_removed_so_that_the_text_can_be_stored() -> None:
    assert normalise("知\ud800识\udcff").encode() == "知识".encode()


def test_symbol_font_bullets_become_bullets() -> None:
    assert normalise("\uf06c 第一点\n\uf0b7 第二点") == "• 第一点\n• 第二点"


def test_blank_lines_are_squeezed_and_trailing_spaces_stripped() -> None:
    assert normalise("\n\n甲  \n \t \n\n\n乙\u3000\n丙\n\n") == "甲\n\n乙\n丙"


def test_indentation_inside_the_text_stays() -> None:
    assert normalise("- 甲\n    - 乙") == "- 甲\n    - 乙"


def test_normalising_nothing_gives_nothing() -> None:
    assert normalise("") == normalise(" \n\u3000\n\ufeff") == ""


def test_normalising_twice_changes_nothing_more() -> None:
    every = "".join(chr(code) + ("\n" if code % 50 == 0 else "") for code in range(0x10000))
    once = normalise(every)
    assert normalise(once) == once


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "a ", "\u3000x", "ｶﾞ", "\u0301"])
def test_time_is_linear_in_the_length(unit: str) -> None:
    """A quadratic step would take minutes for a million repetitions."""
    started = time.perf_counter()
    normalise(unit * 1_000_000 + "x")
    assert time.perf_counter() - started < 5


FULL = "这一行文字写满了整整一行的宽度所以它的后面"


def test_a_break_inside_a_chinese_sentence_is_taken_out() -> None:
    assert join_broken_lines(f"{FULL}\n还有一行。") == f"{FULL}还有一行。"


def test_latin_words_are_joined_with_a_space() -> None:
    assert join_broken_lines("the quick brown fox jumps\nover the lazy dog and on\nand") == (
        "the quick brown fox jumps over the lazy dog and on and"
    )


def test_a_hyphenated_word_is_made_whole() -> None:
    assert join_broken_lines("models need lin\u00ad\nearization") == "models need linearization"


def test_chinese_before_digits_is_joined_without_a_space() -> None:
    assert join_broken_lines(f"{FULL}\n22份文件，从财政等各个方面都有阐述和说明。") == (
        f"{FULL}22份文件，从财政等各个方面都有阐述和说明。"
    )


@pytest.mark.parametrize(
    "following",
    [
        "第三条 本法自公布之日起施行。",
        "（一）申请书；",
        "2. 第二点",
        "3.1 方法",
        "2 结果",
        "• 要点",
        "- 要点",
        "图1 结构",
        "表 2 数据",
        "关键词：检索",
        "一、总则",
        "Table 1",
        "第二章 总则",
    ],
)
def test_a_line_that_begins_an_item_or_heading_stays_apart(following: str) -> None:
    assert join_broken_lines(f"{FULL}\n{following}") == f"{FULL}\n{following}"


@pytest.mark.parametrize("end", ["。", "！", "？", "：", "。”", "……", "."])
def test_a_finished_sentence_keeps_its_line_end(end: str) -> None:
    text = f"{FULL}{end}\n{FULL}。"
    assert join_broken_lines(text) == text


def test_a_short_line_such_as_a_heading_stays_apart() -> None:
    assert join_broken_lines(f"引言\n{FULL}\n结束。") == f"引言\n{FULL}结束。"


def test_blank_lines_separate_paragraphs() -> None:
    assert join_broken_lines(f"{FULL}\n\n{FULL}") == f"{FULL}\n\n{FULL}"


def test_joining_nothing_gives_nothing() -> None:
    assert join_broken_lines("") == ""


@pytest.mark.parametrize(
    ("line", "following", "joined"),
    [
        ("甲", "乙", "甲乙"),
        ("ab", "cd", "ab cd"),
        ("甲", "cd", "甲cd"),
        ("ab", "乙", "ab乙"),
        ("co\u00ad", "de", "code"),
    ],
)
def test_join_lines_puts_a_space_between_latin_words_only(line: str, following: str, joined: str) -> None:
    assert join_lines(line, following) == joined


def test_a_page_number_does_not_continue_into_text() -> None:
    assert not continues("12", "接着的正文")
    assert not continues("", "正文")
    assert not continues("正文", "")
