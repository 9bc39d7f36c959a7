"""What the clause model sees in a question and a passage, and that it uses it."""

from __future__ import annotations

import numpy as np
import pytest

from chains.clause_scores import (
    WEIGHTS,
    answer_probabilities,
    clause_features,
    find_term,
    read_question,
)
from chains.clauses import split_clauses


def features_of(question: str, passage: str, heading: str = "", rank: int = 0) -> dict[str, list[float]]:
    columns = clause_features(read_question(question), passage, heading, split_clauses(passage), rank)
    return {name: column.tolist() for name, column in columns.items()}


def likeliest(question: str, passage: str, heading: str = "") -> str:
    clauses = split_clauses(passage)
    best = clauses[int(np.argmax(answer_probabilities(question, [passage], [heading], [clauses])[0]))]
    return passage[best.start : best.end]


# --- questions


def test_question_words_carry_no_terms() -> None:
    asked = read_question("红楼梦是什么时候写成的？")
    assert {"红楼", "楼梦", "写成"} <= asked.pairs.keys()
    assert not any("什" in term or "候" in term for term in [*asked.pairs, *asked.characters])


def test_english_question_words_carry_no_terms() -> None:
    assert set(read_question("What is the capital of France?").pairs) == {"capital", "france"}


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("他在哪一年出生？", "date"),
        ("When was it built?", "date"),
        ("公司有多少员工？", "number"),
        ("How many people live there?", "number"),
        ("谁写了这本书？", "person"),
        ("总部位于哪里？", "place"),
        ("为什么要戴口罩？", "reason"),
        ("如何重置密码？", "manner"),
        ("他演过什么电影？", "title"),
        ("它的别名是什么？", "name"),
        ("什么是票王？", "definition"),
        ("有哪些副作用？", "list"),
        ("它的英文缩写是什么？", "latin"),
    ],
)
def test_the_kind_of_a_question_is_seen(question: str, kind: str) -> None:
    assert kind in read_question(question).kinds


def test_traditional_script_is_read_as_simplified() -> None:
    assert read_question("臺灣有多少縣？") == read_question("台湾有多少县？")


def test_what_surrounds_the_question_word_is_kept() -> None:
    asked = read_question("徐陵在回归后得到了谁的赏识？")
    assert (asked.left, asked.right) == ("到了", "的赏")
    assert read_question("路口镇有几个村？").unit == "个"
    assert read_question("公司有多少员工？").unit == "员"


@pytest.mark.parametrize("question", ["", "？", "什么", "😀", "的"])
def test_a_question_that_tells_nothing_is_read_without_complaint(question: str) -> None:
    assert all(bits > 0 for bits in read_question(question).pairs.values())


# --- terms in text


@pytest.mark.parametrize(
    ("term", "text", "places"),
    [
        ("甲乙", "甲乙丙甲乙", [0, 3]),
        ("天天", "天天天", [0, 1]),
        ("art", "start art-work", [6]),
        ("3", "30 3年", [3]),
        ("", "甲", []),
        ("甲", "", []),
    ],
)
def test_a_term_is_found_at_its_places(term: str, text: str, places: list[int]) -> None:
    assert find_term(term, text) == places


# --- features


def test_overlap_is_a_share_of_the_information_of_the_question() -> None:
    seen = features_of("长城有多长", "长城很长。天气很好。")
    assert seen["passage pairs"][0] <= 1.0
    assert seen["sentence pairs"][0] > 0.0 == seen["sentence pairs"][1]
    assert features_of("长城", "长城。")["sentence pairs"] == pytest.approx([1.0])


def test_what_the_heading_says_is_not_asked_of_the_clause_again() -> None:
    seen = features_of("张三的职业", "职业为医生。张三身高一米。", heading="张三")
    assert seen["clause rest pairs"][0] > 0.0
    assert features_of("张三的职业", "职业为医生。")["clause rest pairs"][0] < seen["clause rest pairs"][0]
    assert seen["clause rest pairs"][1] == 0.0


def test_neighbours_are_seen_within_the_sentence_and_beside_it() -> None:
    seen = features_of("长城", "长城雄伟，绵延万里。建于古代。")
    assert seen["previous clause"] == pytest.approx([0.0, 1.0, 0.0])
    assert seen["previous sentence"] == pytest.approx([0.0, 0.0, 1.0])
    assert seen["next sentence"] == pytest.approx([0.0, 0.0, 0.0])
    assert features_of("城墙", "城门很高，有城墙。")["next clause"] == pytest.approx([1.0, 0.0])


def test_place_is_the_rank_of_the_passage_and_the_sentence_in_it() -> None:
    seen = features_of("长城", "一句。两句。三句。", rank=1)
    assert seen["second passage"] == [1.0, 1.0, 1.0]
    assert seen["later passage"] == [0.0, 0.0, 0.0]
    assert seen["first sentence"] == [1.0, 0.0, 0.0]
    assert seen["position"] == [0.0, 0.5, 1.0]


def test_a_clause_that_repeats_the_question_says_nothing_new() -> None:
    assert features_of("长城在哪里", "长城在哪里？长城位于中国北方。")["nothing new"] == [1.0, 0.0]


def test_cues_count_only_for_the_kind_that_is_asked() -> None:
    passage = "它建于1368年。它很高。"
    assert features_of("何时建成", passage)["date: date"] == [1.0, 0.0]
    assert "date: date" not in features_of("谁建的", passage)


def test_a_number_with_the_unit_asked_for_is_seen() -> None:
    assert features_of("辖多少村", "辖8村，2社区。")["number: unit"] == [1.0, 0.0]
    assert features_of("有几个村", "有十余个村，2条路。")["number: unit"] == [1.0, 0.0]


def test_every_feature_has_a_weight_and_every_weight_a_feature() -> None:
    questions = ["何时", "多少人", "谁", "哪里", "为什么", "如何", "什么电影", "别名是什么", "哪些", "英文"]
    names = {name for question in questions for name in features_of(question, "甲。")}
    assert names == set(WEIGHTS)


def test_no_clauses_have_no_features() -> None:
    assert features_of("长城", "") == {}


# --- probabilities


def test_probabilities_of_all_passages_sum_to_one() -> None:
    passages = ["长城位于北方，很长。", "", "天气很好。"]
    chances = answer_probabilities("长城在哪里？", passages, ["", "", ""], [split_clauses(text) for text in passages])
    assert [len(values) for values in chances] == [2, 0, 1]
    assert sum(float(values.sum()) for values in chances) == pytest.approx(1.0)


def test_what_may_not_be_quoted_leaves_its_probability_to_the_rest() -> None:
    passages = ["长城位于北方，很长。", "天气很好。"]
    clauses = [split_clauses(text) for text in passages]
    first, second = answer_probabilities("长城在哪里？", passages, ["", ""], clauses, quotable=[[False, True], [True]])
    assert first[0] == 0.0
    assert first[1] + second[0] == pytest.approx(1.0)
    nothing = answer_probabilities("长城在哪里？", passages, ["", ""], clauses, quotable=[[False, False], [False]])
    assert [values.tolist() for values in nothing] == [[0.0, 0.0], [0.0]]


def test_what_a_heading_within_says_is_said_by_every_clause_below_it() -> None:
    passages = ["# 怎样备份数据库\n先停止服务，再复制目录。", "备份数据库很重要。"]
    clauses = [split_clauses(text) for text in passages]
    quotable = [[False, True, True], [True]]

    def share_below(above: list[str]) -> float:
        found = answer_probabilities("怎样备份数据库？", passages, ["", ""], clauses, above=above, quotable=quotable)
        return float(found[0].sum())

    assert share_below(["# 怎样备份数据库", ""]) > 0.5 > 0.05 > share_below(["", ""])


def test_no_passages_have_no_probabilities() -> None:
    assert answer_probabilities("长城", [], [], []) == []


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("公司成立于什么时候？", "公司成立于1998年3月，"),
        ("公司有多少员工？", "现有员工3200余人。"),
        ("公司总部在哪里？", "总部位于浙江省杭州市，"),
        ("公司的创始人是谁？", "创始人为王建国。"),
        ("公司在哪一年停产？", "公司在2009年停产。"),
    ],
)
def test_the_clause_that_answers_is_the_likeliest(question: str, answer: str) -> None:
    passage = (
        "公司成立于1998年3月，创始人为王建国。总部位于浙江省杭州市，现有员工3200余人。"
        "由于原料短缺，公司在2009年停产。产品销往海外，质量稳定。"
    )
    assert likeliest(question, passage, "某某公司") == answer
