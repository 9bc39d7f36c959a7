"""Rows as prompt and labels: what is learned, what is left out when a row is too long."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chains.answerers import answer_messages, condense_messages
from chains.chatglm3.formats import ChatGLM3Format
from chains.chatglm3.prompt import IGNORED, ChatGLM3Tokenizer, Turn, training_ids, turns_of
from finetune.chatglm3.data import (
    answer_example,
    cited_numbers,
    history_messages,
    passages_of,
    read_examples,
    renumbered,
    without_reference,
)
from finetune.data.rows import GenerationRow, RowsError

ROW = GenerationRow(
    "星河的代号是什么？",
    ("青石的代号是东风。", "星河的代号是南山。", "白鹭的代号是西湖。"),
    "星河的代号是南山。[2]",
    file="rows.jsonl",
    line=7,
)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.from_directory(tiny)


def test_the_prompt_that_is_trained_is_the_one_that_is_served(tiny: Path, tokenizer: ChatGLM3Tokenizer) -> None:
    example = answer_example(ROW, tokenizer, max_tokens=500, language="zh")
    assert example is not None
    served = ChatGLM3Format(tiny).prompt(answer_messages(ROW.question, passages_of(ROW.references), "zh"), ())
    assert list(example.ids[: len(served)]) == served
    assert set(example.labels[: len(served)]) == {IGNORED}


def test_the_answer_is_learned_and_the_token_that_ends_it(tokenizer: ChatGLM3Tokenizer) -> None:
    example = answer_example(ROW, tokenizer, max_tokens=500, language="zh")
    assert example is not None
    learned = [label for label in example.labels if label != IGNORED]
    assert learned[-1] == 2  # </s>
    assert tokenizer.tokenizer.decode(learned[:-1]).split() == ["星河的代号是南山。[2]"]
    assert example.learned == len(learned)


def test_an_example_takes_four_bytes_a_token_and_its_labels_are_those_of_the_original_training(
    tokenizer: ChatGLM3Tokenizer,
) -> None:
    example = answer_example(ROW, tokenizer, max_tokens=500, language="zh")
    assert example is not None
    turns = [*turns_of(answer_messages(ROW.question, passages_of(ROW.references), "zh")), Turn("assistant", ROW.answer)]
    assert (list(example.ids), list(example.labels)) == training_ids(tokenizer, turns, answers="last")
    held = sum(sys.getsizeof(value) for value in (example.ids, example.start))
    assert held < 4 * len(example.ids) + 120  # the heads of two objects


def test_a_row_that_does_not_fit_loses_the_lowest_reference_that_is_not_cited(tokenizer: ChatGLM3Tokenizer) -> None:
    whole = answer_example(ROW, tokenizer, max_tokens=500, language="zh")
    assert whole is not None
    shorter = answer_example(ROW, tokenizer, max_tokens=len(whole.ids) - 1, language="zh")
    assert shorter is not None
    assert shorter.row.references == ROW.references[:2]
    assert shorter.row.answer == ROW.answer
    assert (shorter.dropped, shorter.dropped_cited) == (1, 0)


def test_marks_move_up_when_a_reference_before_them_goes(tokenizer: ChatGLM3Tokenizer) -> None:
    whole = answer_example(ROW, tokenizer, max_tokens=500, language="zh")
    assert whole is not None
    room = len(whole.ids) - 4  # two references of three tokens have to go
    shorter = answer_example(ROW, tokenizer, max_tokens=room, language="zh")
    assert shorter is not None
    assert shorter.row.references == ("星河的代号是南山。",)
    assert shorter.row.answer == "星河的代号是南山。[1]"


def test_the_answer_stays_when_no_reference_fits(tokenizer: ChatGLM3Tokenizer) -> None:
    bare = answer_example(
        replace(ROW, references=(), answer="星河的代号是南山。"), tokenizer, max_tokens=500, language="zh"
    )
    assert bare is not None
    example = answer_example(ROW, tokenizer, max_tokens=len(bare.ids), language="zh")
    assert example is not None
    assert example.row.references == ()
    assert example.row.answer == "星河的代号是南山。"
    assert example.dropped_cited == 1
    assert example.ids == bare.ids


def test_a_row_without_a_label_left_is_an_error_with_its_line(tokenizer: ChatGLM3Tokenizer) -> None:
    with pytest.raises(RowsError, match=r"rows\.jsonl:7.*16") as error:
        read_examples([ROW, ROW], tokenizer, max_tokens=16, language="zh")
    assert error.value.total == 2


def test_a_follow_up_trains_the_rewriting_and_the_answer_to_what_was_rewritten(tokenizer: ChatGLM3Tokenizer) -> None:
    row = replace(
        ROW, question="它的代号是什么？", history=(("星河是什么？", "是名字。"),), standalone="星河的代号是什么？"
    )
    answer, rewriting = read_examples([row], tokenizer, max_tokens=2000, language="zh")
    assert answer.ids == read_examples([ROW], tokenizer, max_tokens=2000, language="zh")[0].ids
    learned = [label for label in rewriting.labels if label != IGNORED]
    assert tokenizer.tokenizer.decode(learned[:-1]).split() == ["星河的代号是什么？"]
    asked = condense_messages(row.question, history_messages(row), "zh")
    assert "星河是什么？" in asked[1].text
    assert len(rewriting.ids) > rewriting.learned


def test_marks_are_read_and_renumbered() -> None:
    assert cited_numbers("甲。[1][3] 乙 [2, 5]。") == {1, 2, 3, 5}
    assert renumbered("甲。[1][3] 乙 [2]。", {3: 1, 1: 2}) == "甲。[2][1] 乙。"
    assert without_reference(ROW, 0).answer == "星河的代号是南山。[1]"
    assert without_reference(ROW, 1).answer == "星河的代号是南山。"
