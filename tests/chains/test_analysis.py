"""fold and terms: how text is compared."""

from __future__ import annotations

from collections import Counter

import pytest

from chains.analysis import fold, fold_all, index_terms, is_cjk, terms

_ASSIGNED = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


def test_folding_keeps_the_place_of_every_character() -> None:
    assert len(fold(_ASSIGNED)) == len(_ASSIGNED)
    mixed = "ＡＢＣ臺灣İstanbul ﬁ ㈱ ½ 😀 𠀀 ǅ ß"
    assert len(fold(mixed)) == len(mixed)
    assert all(fold(mixed)[i] == fold(mixed[i]) for i in range(len(mixed)))


def test_long_texts_fold_like_short_ones() -> None:
    every = [chr(code) for code in range(0x110000)]  # lone surrogates too, which a damaged file may bring
    assert fold("".join(every)) == "".join(fold(character) for character in every)


def test_many_texts_fold_as_each_does() -> None:
    texts = ["", "勞動合同", "😀 HELLO\n", "", "ＣｈａｔＧＬＭ３" * 20, "ﬁ"]
    assert fold_all(texts) == [fold(text) for text in texts]
    assert fold_all([]) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("勞動合同應當以書面形式訂立", "劳动合同应当以书面形式订立"),
        ("頭髮", "头发"),
        ("發展", "发展"),
        ("裡裏", "里里"),
        ("ＣｈａｔＧＬＭ３", "chatglm3"),
        ("HELLO World", "hello world"),
        ("ÀÉÎ", "àéî"),
        ("（２０２４）％", "(2024)%"),
        ("ｱｲｳ", "アイウ"),
        ("　", " "),
    ],
)
def test_forms_that_mean_the_same_fold_alike(one: str, other: str) -> None:
    assert fold(one) == fold(other) == other


@pytest.mark.parametrize("text", ["", "第一条 为了规范管理、制定本办法。", "a1-b2_c3", "😀", "啊\n\t"])
def test_plain_simplified_text_is_left_alone(text: str) -> None:
    assert fold(text) == text


def test_characters_that_fold_to_several_stay_as_they_are() -> None:
    # NFKC of these is longer than one character; offsets matter more
    for character in "ﬁ㈱½…":
        assert fold(character) == character


def test_folding_is_by_character_not_by_phrase() -> None:
    # OpenCC's phrase rules keep 乾 in 乾隆; a fold that depends on neighbours would break matching of parts
    assert fold("乾隆")[0] == fold("乾")
    assert fold("乾燥")[0] == fold("乾")


def test_folding_twice_changes_next_to_nothing() -> None:
    once = fold(_ASSIGNED)
    changed = {a for a, b in zip(once, fold(once), strict=True) if a != b}
    assert changed <= {"苧"}  # OpenCC has 薴 -> 苧 and 苧 -> 苎


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ，。!?\n😀", []),
        ("法", ["法"]),
        ("合同", ["合同"]),
        ("劳动合同", ["劳动", "动合", "合同"]),
        ("勞動合同", ["劳动", "动合", "合同"]),
        ("甲，乙", ["甲", "乙"]),
        ("劳动。合同", ["劳动", "合同"]),
        ("ChatGLM3 模型", ["chatglm3", "模型"]),
        ("使用BGE检索", ["使用", "bge", "检索"]),
        ("第3条", ["第", "3", "条"]),
        ("snake_case x-y", ["snake", "case", "x", "y"]),
        ("３．１４", ["3", "14"]),
        ("ひらがな", ["ひら", "らが", "がな"]),
        ("한국어", ["한국", "국어"]),
        ("𠀀𠀁", ["𠀀𠀁"]),
        ("naïve café", ["naïve", "café"]),
        ("2024年12月", ["2024", "年", "12", "月"]),
    ],
)
def test_terms_are_han_bigrams_and_whole_words_in_order(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


def test_a_term_never_spans_a_break() -> None:
    assert "同应" not in terms("合同\n应当")
    assert "同应" not in terms("合同 应当")


def test_terms_repeat_as_often_as_they_occur() -> None:
    assert terms("合同合同").count("合同") == 2
    assert terms("a b a") == ["a", "b", "a"]


def test_terms_hold_no_white_space() -> None:
    """The full-text index joins them with spaces."""
    assert all(len(term.split()) == 1 for term in terms(_ASSIGNED))


def test_terms_are_linear_in_the_text() -> None:
    assert len(terms("劳" * 200_000)) == 199_999
    assert terms("a" * 200_000) == ["a" * 200_000]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("法", ["法"]),  # a lone character stands there once, not as its own pair and once more
        ("合同", ["合同", "合", "同"]),
        ("勞動合同", ["劳动", "动合", "合同", "劳", "动", "合", "同"]),
        ("ChatGLM3 模型", ["chatglm3", "模型", "模", "型"]),
        ("甲，乙方", ["甲", "乙方", "乙", "方"]),
    ],
)
def test_the_index_also_holds_each_character_of_a_run(text: str, expected: list[str]) -> None:
    assert index_terms(text) == expected


@pytest.mark.parametrize("text", ["劳动合同法第3条", "甲，乙。BGE-M3 的", "ひらがな한국어𠀀𠀁"])
def test_index_terms_are_the_search_terms_and_single_characters(text: str) -> None:
    assert Counter(terms(text)) <= Counter(index_terms(text))
    assert all(len(term) == 1 and is_cjk(term) for term in Counter(index_terms(text)) - Counter(terms(text)))
    assert Counter(term for term in index_terms(text) if len(term) == 1 and is_cjk(term)) == Counter(
        character for character in fold(text) if is_cjk(character)
    )


@pytest.mark.parametrize("character", "法㐀豈𠀀あカ한")
def test_han_kana_and_hangul_are_cjk(character: str) -> None:
    assert is_cjk(character)


@pytest.mark.parametrize("character", ["a", "1", "，", "。", " ", "😀", "é", ""])
def test_other_characters_are_not(character: str) -> None:
    assert not is_cjk(character)
