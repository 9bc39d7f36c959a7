"""What a step is made of: sampling that repeats itself, masks counted by hand."""

from __future__ import annotations

import numpy as np

from finetune.bge.batches import (
    Sample,
    batch_rows,
    false_negatives,
    sample_row,
    steps_per_epoch,
    token_batch,
)
from finetune.data.rows import RetrievalRow


def row(query: str, pos: list[str], neg: list[str], **more: object) -> RetrievalRow:
    return RetrievalRow(query=query, pos=tuple(pos), neg=tuple(neg), **more)  # type: ignore[arg-type]


def sampled(one: RetrievalRow, *, group_size: int = 3, number: int = 0, epoch: int = 0, **more: object) -> Sample:
    settings: dict[str, object] = {"instruction": "", "distillation": False, "seed": 1, **more}
    return sample_row(one, number=number, group_size=group_size, epoch=epoch, **settings)  # type: ignore[arg-type]


def test_the_last_batch_is_smaller_and_shared_evenly() -> None:
    order = list(range(11))
    assert steps_per_epoch(11, batch_size=4, processes=2) == 3
    assert [list(batch_rows(order, step, batch_size=4, processes=2)) for step in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert steps_per_epoch(9, batch_size=4, processes=2) == 2  # the ninth row cannot be shared by two


def test_a_sample_is_the_same_whenever_it_is_drawn_and_another_in_the_next_epoch() -> None:
    one = row("q", ["p1", "p2", "p3"], [f"n{number}" for number in range(50)])
    assert sampled(one) == sampled(one)
    assert len({sampled(one, epoch=epoch).passages for epoch in range(5)}) > 1
    assert sampled(one, number=1).passages != sampled(one, number=2).passages


def test_the_positive_stands_first_and_negatives_are_not_repeated_while_there_are_enough() -> None:
    one = row("q", ["p1", "p2"], ["n1", "n2", "n3"])
    for epoch in range(20):
        first, *rest = sampled(one, group_size=4, epoch=epoch).passages
        assert first in one.pos
        assert sorted(rest) == ["n1", "n2", "n3"]


def test_too_few_negatives_are_repeated_evenly() -> None:
    # as FlagEmbedding: five out of two copies of three, so that none comes more than twice
    passages = sampled(row("q", ["p"], ["n1", "n2", "n3"]), group_size=6).passages
    assert all(1 <= passages.count(text) <= 2 for text in ("n1", "n2", "n3"))


def test_the_instruction_stands_before_queries_only_and_a_rows_prompt_replaces_it() -> None:
    plain = sampled(row("q", ["p"], ["n"]), instruction="找：")
    assert (plain.query, plain.passages[0]) == ("找：q", "p")
    assert sampled(row("q", ["p"], ["n"], prompt="问："), instruction="找：").query == "问：q"
    assert sampled(row("q", ["p"], ["n"], prompt=""), instruction="找：").query == "q"


def test_scores_follow_their_passages() -> None:
    scores = {"p1": 9.0, "p2": 8.0, "n1": 1.0, "n2": 2.0, "n3": 3.0}
    one = row("q", ["p1", "p2"], ["n1", "n2", "n3"], pos_scores=(9.0, 8.0), neg_scores=(1.0, 2.0, 3.0))
    for epoch in range(10):
        sample = sampled(one, epoch=epoch, distillation=True)
        assert sample.teacher == tuple(scores[text] for text in sample.passages)
    assert sampled(one).teacher is None


def masked(rows: list[RetrievalRow], **switches: bool) -> list[list[int]]:
    """The masked places of each query."""
    mask = false_negatives([sampled(one, group_size=2) for one in rows], **switches)
    return [np.flatnonzero(line).tolist() for line in mask]


def test_the_text_of_a_positive_is_no_negative_elsewhere() -> None:
    rows = [row("a", ["same"], ["x"]), row("b", ["same"], ["y"]), row("c", ["z"], ["same"])]
    # places: a has 0 same, 1 x; b has 2 same, 3 y; c has 4 z, 5 same
    assert masked(rows) == [[2, 5], [0, 5], []]
    assert masked(rows, texts=False) == [[], [], []]


def test_the_positives_that_were_not_drawn_count_as_well() -> None:
    rows = [row("a", ["p", "p"], ["x"]), row("b", ["q"], ["p"])]
    assert masked(rows) == [[3], []]
    many = [row("a", ["p1", "p2"], ["x"]), row("b", ["p1"], ["p2"])]
    assert masked(many)[0] == [2, 3]


def test_a_query_that_stands_in_two_rows_has_the_positives_of_both() -> None:
    rows = [row("a", ["p"], ["x"]), row("a", ["q"], ["y"])]
    assert masked(rows) == [[2], [0]]


def test_other_passages_of_the_positives_document_are_no_negatives() -> None:
    rows = [
        row("a", ["p"], ["x"], pos_docs=("d1",), neg_docs=("d2",)),
        row("b", ["q"], ["y"], pos_docs=("d1",), neg_docs=("d1",)),
        row("c", ["r"], ["z"], pos_docs=("d2",), neg_docs=("d3",)),
    ]
    # d1 is at 0, 2, 3 and d2 at 1, 4; the second row names its own y a negative although it is of d1
    assert masked(rows) == [[2, 3], [0], [1]]
    assert masked(rows, documents=False) == [[], [], []]


def test_a_negative_with_the_text_of_the_rows_own_positive_is_masked() -> None:
    assert masked([row("a", ["p"], ["p"])]) == [[1]]


def test_rows_without_documents_are_not_one_document() -> None:
    assert masked([row("a", ["p"], ["x"]), row("b", ["q"], ["y"])]) == [[], []]


def test_each_distinct_text_is_encoded_once() -> None:
    batch = token_batch([[1, 5, 2], [1, 6, 2]], [[1, 7, 2], [1, 5, 2], [1, 7, 2], [1, 8, 2]])
    assert batch.texts == [[1, 5, 2], [1, 6, 2], [1, 7, 2], [1, 8, 2]]
    assert (batch.queries, batch.passages) == ([0, 1], [2, 0, 2, 3])
    assert batch.tokens == 12
