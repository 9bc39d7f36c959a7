"""Bits of terms and characters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from chains.analysis import fold, terms
from chains.information import (
    HAN,
    MAX_BITS,
    OTHER,
    QUESTION_BITS,
    QUESTION_WORDS,
    SPACE,
    UNLISTED_BIGRAM_BITS,
    WORD,
    char_bits,
    character_bits,
    character_classes,
    code_points,
    information,
    pair_bits,
    question_mask,
    table,
)


@pytest.mark.parametrize(
    "common, rare", [("的", "猫"), ("是", "锣"), ("中国", "锣鼓"), ("公司", "党参"), ("10", "qwx")]
)
def test_a_common_term_tells_less_than_a_rare_one(common: str, rare: str) -> None:
    assert information(common) < information(rare)


def test_function_characters_tell_at_most_one_bit() -> None:
    # Chinese frequency lists open with 的 一 是 在 不 了; 的 and 是 stand in nearly every passage
    assert information("的") <= 1
    assert information("是") <= 1


@pytest.mark.parametrize("term", ["什么", "哪些", "如何", "多少", "谁", "吗", "为什么", "怎么样", "what", "the"])
def test_question_words_tell_next_to_nothing(term: str) -> None:
    assert information(term) == QUESTION_BITS


@pytest.mark.parametrize("term", ["为什", "什", "么", "怎"])
def test_pieces_of_question_words_tell_next_to_nothing(term: str) -> None:
    assert information(term) == QUESTION_BITS


@pytest.mark.parametrize("term", ["没有", "时间", "地方", "办", "哪吒"])
def test_ordinary_terms_inside_question_phrases_keep_their_bits(term: str) -> None:
    assert information(term) > 2


@pytest.mark.parametrize("term", ["㐂", "\U00020000", "龘龘", "龘龘龘龘", "qwxyz", "98765432109876", "α"])
def test_unseen_terms_get_many_bits_but_no_more_than_the_bound(term: str) -> None:
    assert UNLISTED_BIGRAM_BITS <= information(term) <= MAX_BITS


def test_an_empty_term_tells_nothing() -> None:
    assert information("") == 0


def test_a_longer_run_tells_at_least_as_much_as_its_pairs() -> None:
    assert information("高血压") >= max(information("高血"), information("血压"))


def test_the_table_agrees_with_a_count_of_the_law_it_was_made_from(shared_data: Path) -> None:
    # 缔约国 hardly occurs outside of law, which has .15 of the say: counted here by hand, without the table's script
    passages = (shared_data / "statutes_core_passages.jsonl").open(encoding="utf-8")
    joined = [fold(row["title"] + "\n" + row["text"]) for row in map(json.loads, passages)]
    windows = [text[i : i + 256] for text in joined for i in range(0, len(text), 256)]
    share = 0.15 * sum("缔约" in window for window in windows) / len(windows)
    assert information("缔约") <= -math.log2(share) + 0.25


def test_the_table_is_small_and_its_levels_are_quarter_bits() -> None:
    known = table()
    assert np.all(known.characters * 4 == np.rint(known.characters * 4))
    assert np.all(known.pair_bits * 4 == np.rint(known.pair_bits * 4))
    assert all(bits * 4 == round(bits * 4) for bits in known.words.values())
    source = Path(__file__).parents[2] / "chains" / "data" / "information.tsv"
    assert source.stat().st_size < 100 * 1024


def test_pairs_are_sorted_for_the_binary_search() -> None:
    assert np.all(np.diff(table().pairs.astype(object)) > 0)


def test_bits_of_arrays_equal_bits_of_single_terms() -> None:
    text = fold("高血压病人可以口服党参的")
    codes = code_points(text)
    assert character_bits(codes).tolist() == [information(character) for character in text]
    assert pair_bits(codes[:-1], codes[1:]).tolist() == [information(term) for term in terms(text)]


def test_char_bits_has_one_float32_per_character() -> None:
    text = "锣鼓经常用的节奏型称为什么？USB 3.0 😀"
    bits = char_bits(text)
    assert bits.shape == (len(text),)
    assert bits.dtype == np.float32


def test_char_bits_of_nothing_is_empty() -> None:
    assert char_bits("").shape == (0,)


def test_char_bits_sees_what_a_question_is_about() -> None:
    text = "锣鼓经是什么？"
    bits = char_bits(text)
    assert bits[:2].min() > 4
    assert bits[text.index("什") :].max() <= QUESTION_BITS


def test_char_bits_gives_nothing_to_punctuation_and_spaces() -> None:
    assert char_bits("，。！？ \n（）—").sum() == 0


def test_char_bits_shares_the_bits_of_a_word_among_its_letters() -> None:
    bits = char_bits("zyxw锣")
    assert bits[:4].tolist() == [MAX_BITS / 4] * 4


def test_char_bits_of_a_lone_character_are_its_own() -> None:
    assert char_bits("（锣）")[1] == information("锣")


def test_char_bits_never_exceed_those_of_the_character_alone() -> None:
    text = "中华人民共和国刑法第一条为了惩罚犯罪"
    assert np.all(char_bits(text) <= character_bits(code_points(text)))


def test_char_bits_folds_case_width_and_traditional_forms() -> None:
    assert char_bits("ＵＳＢ資料庫").tolist() == char_bits("usb资料库").tolist()


@pytest.mark.parametrize(
    ("text", "asking"),
    [
        ("锣鼓经是什么", "是什么"),
        ("很多大学", ""),  # not 多大
        ("北京有多大", "多大"),
        ("哪吒闹海", ""),
        ("任何人", ""),
        ("he is whatever", "is"),
        ("what是usb", "what"),
        ("thesis", ""),
    ],
)
def test_question_mask_marks_question_words_and_nothing_that_only_looks_like_them(text: str, asking: str) -> None:
    mask = question_mask(text)
    assert "".join(character for character, marked in zip(text, mask, strict=True) if marked) == asking


def test_question_words_are_folded_already() -> None:
    assert all(fold(word) == word for word in QUESTION_WORDS)


def test_character_classes_tell_scripts_spaces_and_the_rest_apart() -> None:
    classes = character_classes(code_points("中かa1é，_ \u3000\n\U00020000"))
    assert classes.tolist() == [HAN, HAN, WORD, WORD, WORD, OTHER, OTHER, SPACE, SPACE, SPACE, HAN]
