"""Near texts: what counts as the same, what does not, and that the estimate is what it estimates."""

from __future__ import annotations

import random

import numpy as np
import pytest

from finetune.data.duplicates import NearTexts, document_id, is_near, signature, text_key

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]


def text_of(seed: int, length: int = 400) -> str:
    return "".join(random.Random(seed).choices(HAN, k=length))


def with_changes(text: str, changes: int, seed: int = 0) -> str:
    letters = list(text)
    for place in random.Random(seed).sample(range(len(text)), changes):
        letters[place] = "改"
    return "".join(letters)


@pytest.mark.parametrize("other", [" 年假 １０ 天。\n", "年假10天。", "年假\u200b10\u3000天。", "年假10天。\r\n"])
def test_a_key_does_not_see_white_space_widths_and_marks_without_width(other: str) -> None:
    assert text_key(other) == text_key("年假10天。")
    assert document_id(other) == document_id("年假10天。")


def test_a_key_sees_every_other_character() -> None:
    assert text_key("年假10天。") != text_key("年假11天。")


@pytest.mark.parametrize("changes", [0, 4, 12, 40])
def test_equal_slots_estimate_the_jaccard_similarity_of_shingles(changes: int) -> None:
    def shingles(text: str) -> set[str]:
        return {text[place : place + 5] for place in range(len(text) - 4)}

    errors = []
    for seed in range(20):
        one = text_of(seed)
        other = with_changes(one, changes, seed)
        jaccard = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
        errors.append(float(np.mean(signature(one) == signature(other))) - jaccard)
    assert abs(np.mean(errors)) < 0.05  # 64 slots, 20 pairs: a standard error of at most .014


def test_unlike_texts_share_no_slot_to_speak_of() -> None:
    assert np.mean(signature(text_of(1)) == signature(text_of(2))) < 0.1


@pytest.mark.parametrize("text", ["", "短", "只有六个字", "a"])
def test_a_short_text_has_a_signature(text: str) -> None:
    assert signature(text).shape == (64,)
    assert (signature(text) == signature(text)).all()


def test_a_text_with_a_few_changes_is_near_and_one_with_many_is_not() -> None:
    text = text_of(1)
    assert is_near(text, with_changes(text, 4))
    assert not is_near(text, with_changes(text, 60))
    assert not is_near(text, text_of(2))


def test_a_part_is_near_to_the_whole_either_way() -> None:
    text = text_of(1)
    assert is_near(text[100:250], text)
    assert is_near(text, text[100:250])
    assert is_near("年假", "员工的年假有十天")
    assert not is_near("病假", "员工的年假有十天")


def test_near_texts_are_found_among_many() -> None:
    texts = NearTexts()
    for number in range(200):
        assert texts.add(number, text_of(number)) == []
    assert texts.find(with_changes(text_of(77), 5)) == [77]
    assert texts.find(" \n".join(text_of(78))) == [78]
    assert texts.find(text_of(1000)) == []
    assert texts.add(1000, with_changes(text_of(79), 3)) == [79]
    assert set(texts.find(text_of(79))) == {79, 1000}
