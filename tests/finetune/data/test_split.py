"""The split by document: nothing on both sides, whatever the data look like."""

from __future__ import annotations

import random

import pytest

from finetune.data.split import DocumentSplit, split_rows

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]


def passage(draw: random.Random) -> str:
    return "".join(draw.choices(HAN, k=60))


@pytest.mark.parametrize("seed", range(8))
def test_no_document_and_no_question_is_on_both_sides(seed: int) -> None:
    draw = random.Random(seed)
    documents = [passage(draw) for _ in range(60)]
    rows = [(f"问题{draw.randrange(150)}", draw.sample(documents, draw.choice([1, 1, 1, 2]))) for _ in range(150)]
    sides = split_rows(rows, dev_share=0.2, seed=seed)
    for of_row in (lambda row: set(row[1]), lambda row: {row[0]}):
        train = set().union(*(of_row(row) for row, dev in zip(rows, sides, strict=True) if not dev))
        dev = set().union(*(of_row(row) for row, dev in zip(rows, sides, strict=True) if dev))
        assert not train & dev


def test_the_dev_side_has_the_share_of_rows_where_documents_allow_it() -> None:
    draw = random.Random(0)
    rows = [(f"问题{number}", [passage(draw)]) for number in range(500)]
    assert sum(split_rows(rows, dev_share=0.1, seed=0)) == 50


def test_near_documents_are_on_one_side() -> None:
    draw = random.Random(0)
    rows = []
    for number in range(100):
        text = passage(draw)
        rows += [
            (f"甲{number}", [text]),
            (f"乙{number}", [" \n".join(text)]),  # white space
            (f"丙{number}", [text[:30] + "改" + text[31:]]),  # one character of sixty: Jaccard .84
            (f"丁{number}", [text.replace(text[0], text[0] + "\u200b")]),
        ]
    sides = split_rows(rows, dev_share=0.3, seed=1)
    assert 0 < sum(sides) < len(rows)
    for start in range(0, len(rows), 4):
        assert len(set(sides[start : start + 4])) == 1


def test_the_seed_decides_and_the_order_of_rows_does_not() -> None:
    draw = random.Random(0)
    rows = [(f"问题{number}", [passage(draw)]) for number in range(200)]
    first = dict(zip([row[0] for row in rows], split_rows(rows, dev_share=0.2, seed=3), strict=True))
    turned = rows[::-1]
    again = dict(zip([row[0] for row in turned], split_rows(turned, dev_share=0.2, seed=3), strict=True))
    other = dict(zip([row[0] for row in rows], split_rows(rows, dev_share=0.2, seed=4), strict=True))
    assert first == again
    assert first != other


def test_a_document_of_most_rows_stays_in_train() -> None:
    draw = random.Random(0)
    big = passage(draw)
    rows = [(f"大{number}", [big]) for number in range(80)] + [(f"小{number}", [passage(draw)]) for number in range(20)]
    for seed in range(5):
        sides = split_rows(rows, dev_share=0.1, seed=seed)
        assert not any(sides[:80])
        assert sum(sides) == 10


@pytest.mark.parametrize(("rows", "share", "dev"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.0, 0), (0, 0.1, 0)])
def test_neither_side_is_empty_where_there_are_two_documents(rows: int, share: float, dev: int) -> None:
    draw = random.Random(0)
    assert sum(split_rows([(f"问{n}", [passage(draw)]) for n in range(rows)], dev_share=share, seed=0)) == dev


def test_a_document_that_answers_nothing_is_of_no_side() -> None:
    draw = random.Random(0)
    text = passage(draw)
    split = DocumentSplit()
    split.add("问", [text])
    split.choose(0.0, 0)
    assert split.is_dev(text) is False
    assert split.is_dev(f" {text}\n") is False
    assert split.is_dev(passage(draw)) is None
