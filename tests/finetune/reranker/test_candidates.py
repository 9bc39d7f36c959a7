"""Lists of candidates and the order a reranker puts them in, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from finetune.evaluation import SetConfig
from finetune.reranker.candidates import ScoresError, evaluate_found, evaluate_reranker, read_candidates

LIMITS = {"max_questions": 100, "max_passages": 100, "seed": 0}


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def by_length(pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
    return np.asarray([len(passage) for _, passage in pairs], np.float32)


def test_the_candidates_of_rows_are_their_own_passages_put_in_order_by_score(tmp_path: Path) -> None:
    rows = write_lines(
        tmp_path / "rows.jsonl",
        [
            {"query": "甲", "pos": ["三个字"], "neg": ["一", "五个字的句"]},
            {"query": "乙", "pos": ["四个字的"], "neg": ["二二"]},
        ],
    )
    found, sampled = read_candidates("dev", SetConfig(rows=[rows]), 20, **LIMITS)
    assert not sampled
    assert [len(ids) for ids in found.candidates] == [3, 2]
    scores = evaluate_reranker(by_length, found)  # first: 5, 3, 1 characters, gold second; then 4, 2, gold first
    assert scores.by_metric["mrr@10"] == (0.5, 1.0)


def test_a_reranker_that_tells_nothing_apart_reaches_what_chance_does(tmp_path: Path) -> None:
    rows = write_lines(
        tmp_path / "rows.jsonl",
        [{"query": f"问{n}", "pos": [f"对{n}"], "neg": [f"错{n}", f"误{n}", f"非{n}"]} for n in range(400)],
    )
    found, _ = read_candidates("dev", SetConfig(rows=[rows]), 20, **{**LIMITS, "max_questions": 400})
    scores = evaluate_reranker(lambda pairs: np.zeros(len(pairs), np.float32), found)
    # one of four: 0.25 +- 3 standard deviations of sqrt(0.25 x 0.75 / 400) = 0.022
    assert scores.mean("recall@1") == pytest.approx(0.25, abs=0.065)
    assert scores == evaluate_found(found)
    again, _ = read_candidates("dev", SetConfig(rows=[rows]), 20, **{**LIMITS, "max_questions": 400})
    assert again == found


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"query": "甲", "pos": ["对"], "neg": ["错", "误"]}])
    found, _ = read_candidates("dev", SetConfig(rows=[rows]), 20, **LIMITS)
    for value in (np.nan, np.inf):
        with pytest.raises(ScoresError, match=r"2 of the reranker's 3 scores.*'甲'.*lower learning_rate"):
            evaluate_reranker(lambda pairs, value=value: np.array([1.0, value, value], np.float32), found)


def test_the_candidates_of_questions_are_what_bm25_finds_and_a_passage_it_misses_is_not_added(tmp_path: Path) -> None:
    questions = write_lines(
        tmp_path / "q.jsonl",
        [{"question": "苹果多少钱", "context_id": "a"}, {"question": "苹果树在哪里", "context_id": "b"}],
    )
    passages = write_lines(
        tmp_path / "p.jsonl",
        [{"id": "a", "text": "苹果每斤五元"}, {"id": "b", "text": "毫不相干"}, {"id": "c", "text": "苹果很甜很好吃"}],
    )
    found, _ = read_candidates("dev", SetConfig(questions=questions, passages=[passages]), 20, **LIMITS)
    # BM25 puts the shorter passage first, and equal scores keep that
    assert [ids[0] for ids in found.candidates] == ["a", "a"]
    assert evaluate_reranker(lambda pairs: np.ones(len(pairs), np.float32), found) == evaluate_found(found)
    assert evaluate_found(found).by_metric["mrr@10"] == (1.0, 0.0)
    assert [set(ids) for ids in found.candidates] == [{"a", "c"}, {"a", "c"}]
    # the longer one first: gold "a" is second, gold "b" cannot be found
    assert evaluate_reranker(by_length, found).by_metric["mrr@10"] == (0.5, 0.0)
