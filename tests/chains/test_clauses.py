"""Cutting text for quotes, by hand-made cases."""

from __future__ import annotations

import random

import pytest

from chains.clauses import LONGEST_CLAUSE, split_clauses


def pieces(text: str) -> list[str]:
    return [text[clause.start : clause.end] for clause in split_clauses(text)]


def sentences(text: str) -> list[str]:
    found: dict[int, str] = {}
    for clause in split_clauses(text):
        found[clause.sentence] = found.get(clause.sentence, "") + text[clause.start : clause.end]
    return list(found.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("他来了。她走了！谁？", ["他来了。", "她走了！", "谁？"]),
        ("他说：“好。”然后走了。", ["他说：“好。”", "然后走了。"]),
        ("第一行\n第二行\n\n第三行", ["第一行", "第二行", "第三行"]),
        ("It works. It is fast! See v1.5 now.", ["It works.", "It is fast!", "See v1.5 now."]),
        ("模式种是K. altus，很大。", ["模式种是K. altus，很大。"]),
        ("- 苹果\n- 梨\n1. 桃", ["- 苹果", "- 梨", "1. 桃"]),
        ("def f(x):\n    return x\n", ["def f(x):", "return x"]),
        ("等等……然后呢", ["等等……", "然后呢"]),
    ],
)
def test_a_sentence_ends_at_its_stop_or_its_line(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_a_sentence_is_cut_behind_its_commas() -> None:
    assert pieces("本品用于感冒，每日三次；饭后服用：温水送下。") == [
        "本品用于感冒，",
        "每日三次；",
        "饭后服用：",
        "温水送下。",
    ]


def test_a_very_short_clause_joins_the_next() -> None:
    assert pieces("例如，头痛时可以服用。") == ["例如，头痛时可以服用。"]


def test_commas_in_brackets_and_numbers_cut_nothing() -> None:
    assert pieces("巴黎（法语：Paris，旧称吕岱斯）是首都，人口2,102,650人。") == [
        "巴黎（法语：Paris，旧称吕岱斯）是首都，",
        "人口2,102,650人。",
    ]


def test_a_bracket_that_never_closes_does_not_hold_the_sentence_together() -> None:
    text = "（" + "甲" * 50 + "，" + "乙" * 10 + "。"
    assert pieces(text) == ["（" + "甲" * 50 + "，", "乙" * 10 + "。"]


def test_enumerations_are_cut_only_where_they_are_long() -> None:
    assert pieces("包括苹果、梨、桃。") == ["包括苹果、梨、桃。"]
    long = "包括" + "、".join(["很长的一种水果"] * 12) + "。"
    assert len(pieces(long)) > 1
    assert all(25 <= len(piece) <= 60 for piece in pieces(long)[:-1])


def test_a_row_of_a_table_is_one_piece_however_long() -> None:
    row = "| 张三，经理 | " + "负责采购、运输、仓储，" * 20 + " |"
    assert pieces(f"| 姓名 | 职责 |\n| --- | --- |\n{row}\n") == ["| 姓名 | 职责 |", "| --- | --- |", row]


def test_text_without_punctuation_is_cut_into_windows() -> None:
    assert [len(piece) for piece in pieces("嗯" * 200)] == [90, 90, 20]
    words = "so we went there and then " * 20
    assert all(len(piece) <= LONGEST_CLAUSE for piece in pieces(words))
    assert all(piece.endswith((" ", "then")) for piece in pieces(words))


@pytest.mark.parametrize("text", ["", " ", "\n\n\n", "\u3000"])
def test_nothing_to_cut_gives_no_clauses(text: str) -> None:
    assert split_clauses(text) == []


@pytest.mark.parametrize("text", ["好", "。", "，", "😀", "|"])
def test_one_character_is_one_clause(text: str) -> None:
    assert pieces(text) == [text]


@pytest.mark.parametrize("longest", [1, 7, 90])
def test_clauses_cover_all_but_white_space_in_order_without_overlap(longest: int) -> None:
    rng = random.Random(11)
    alphabet = "天地人ab3。！，、；：（）《》“” \n.,😀"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 150)))
        end = number = 0
        for clause in split_clauses(text, longest=longest):
            assert clause.start < clause.end <= clause.start + longest
            assert text[end : clause.start].strip() == ""
            assert clause.sentence >= number
            end, number = clause.end, clause.sentence
        assert text[end:].strip() == ""
