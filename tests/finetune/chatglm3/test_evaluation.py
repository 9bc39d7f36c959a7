"""Answers scored by hand-counted examples, through the chain that serves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from chains.prompts import REFUSAL
from finetune.chatglm3.evaluation import (
    Answered,
    GenerationSetReport,
    answer_rows,
    check_askable,
    compare_counted,
    counted_mean,
    means,
    sampled_rows,
    score_answers,
)
from finetune.data.rows import GenerationRow

NO = REFUSAL["zh"]
ROWS = [
    GenerationRow("谁审批？", ("部门经理审批。", "财务付款。"), "部门经理审批。[1]"),
    GenerationRow("谁付款？", ("部门经理审批。", "财务付款。"), "财务付款。[2]"),
    GenerationRow("多少钱？", ("部门经理审批。",), NO, refuse=True),
    GenerationRow("几点？", ("财务付款。",), NO, refuse=True),
]


def test_scores_by_hand() -> None:
    answers = [
        Answered("部门经理审批。[1]", False),
        Answered("财务付款。[1][2]", False),
        Answered(NO, True),
        Answered("财务付款。[1]", False),
    ]
    found = means(score_answers(ROWS, answers))
    assert found == {
        "exact_match": 0.75,  # 1, 1, a right refusal, a wrong answer
        "char_f1": 0.75,
        "rouge_l": 0.75,
        "citation_precision": 0.5,  # 1 of 1, 1 of 2, 0 of 1
        "citation_recall": 1.0,
        "refusal_precision": 1.0,  # the one refused was to be refused
        "refusal_recall": 0.5,  # of two
    }


def test_a_wrong_refusal_scores_nothing() -> None:
    scores = score_answers(ROWS[:1], [Answered(NO, True)])
    assert scores.by_metric["char_f1"] == (0.0,)
    assert scores.by_metric["refusal_precision"] == (0.0,)
    assert math.isnan(scores.by_metric["refusal_recall"][0])


def test_rows_that_do_not_count_leave_the_mean_alone() -> None:
    assert counted_mean([1.0, math.nan, 0.0]) == 0.5
    assert counted_mean([math.nan]) == 1.0  # nothing refused is no wrong refusal


def test_a_gain_has_an_interval_over_the_rows_that_count() -> None:
    before, after = [0.0, math.nan, 0.0, 0.0] * 10, [1.0, math.nan, 1.0, 1.0] * 10
    comparison = compare_counted(before, after, seed=0)
    assert (comparison.before, comparison.after) == (0.0, 1.0)
    assert comparison.difference == (1.0, 1.0, 1.0)
    half = compare_counted([0.0] * 40, [1.0, 0.0] * 20, seed=0).difference
    # a share of 40 draws at one half: 0.5 +- 1.96 x 0.5 / sqrt(40) = 0.5 +- 0.155
    assert half.low == pytest.approx(0.345, abs=0.03)
    assert half.high == pytest.approx(0.655, abs=0.03)
    with pytest.raises(ValueError, match="1 rows before, 2 after"):
        compare_counted([1.0], [1.0, 0.0], seed=0)


def test_a_set_is_reported_with_the_rows_that_count() -> None:
    before = score_answers(ROWS, [Answered(NO, True)] * 4)
    after = score_answers(ROWS, [Answered(row.answer, row.refuse) for row in ROWS])
    comparison = GenerationSetReport(before, after).comparison("refusal_precision", seed=0)
    assert (comparison.before, comparison.after) == (0.5, 1.0)


def test_rows_are_asked_through_the_chain() -> None:
    """A model that says what it is told to: prompts, citations and refusals are the chain's."""
    asked: list[str] = []

    class Model(GenericFakeChatModel):
        def _generate(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
            asked.append(messages[-1].text)
            return super()._generate(messages, *args, **kwargs)

    model = Model(messages=iter([AIMessage("部门经理审批。[1]"), AIMessage(NO)]))
    answers = answer_rows(model, [ROWS[0], ROWS[2]], language="zh", concurrency=1)
    assert answers == [Answered("部门经理审批。[1]", False), Answered(NO, True)]
    assert "[2]\n财务付款。" in asked[0]
    assert asked[0].endswith("问题：谁审批？")


def test_an_answer_without_a_text_is_no_refusal() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage(" "), AIMessage(NO)]))
    answers = answer_rows(model, [ROWS[2], ROWS[2]], language="zh", concurrency=1)
    assert answers == [Answered("", False), Answered(NO, True)]


def test_rows_that_cannot_be_asked_are_named_and_count_as_not_answered(tiny: Path) -> None:
    """The tiny model takes 512 tokens."""
    model = ChatGLM3(model=str(tiny), device="cpu", dtype="float32", temperature=0, max_new_tokens=2)
    rows = [
        replace(ROWS[0], file="dev.jsonl", line=1),
        GenerationRow("谁？", ("很长的参考资料。" * 300, "短。"), "短。", file="dev.jsonl", line=2),
        GenerationRow("问" * 4_001, ("短。",), NO, refuse=True, file="dev.jsonl", line=3),
        GenerationRow("谁？", ("短。", "很长的参考资料。" * 300), "短。", file="dev.jsonl", line=4),  # loses the second
    ]
    answers = answer_rows(model, rows, language="zh", concurrency=2)
    assert answers[1:3] == [Answered("", False)] * 2
    assert answers[0].result
    assert answers[3].result
    assert score_answers(rows, answers).by_metric["char_f1"][1:3] == (0.0, 0.0)
    tokenizer = ChatGLM3Tokenizer.from_directory(tiny)
    (finding,) = check_askable("dev", rows, tokenizer, context=512, language="zh")
    assert (finding.name, finding.severity) == ("unanswered", "warning")
    assert "2 of the 4 rows of dev" in finding.en
    assert finding.en.endswith("shorten dev.jsonl:2, dev.jsonl:3")
    assert check_askable("dev", [rows[0], rows[3]], tokenizer, context=512, language="zh") == []


def test_a_sample_keeps_the_order() -> None:
    assert sampled_rows(ROWS, 10, seed=0) is ROWS
    sample = sampled_rows(ROWS, 2, seed=1)
    assert len(sample) == 2
    assert [ROWS.index(row) for row in sample] == sorted(ROWS.index(row) for row in sample)
