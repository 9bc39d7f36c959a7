"""Lists of candidates and the order a reranker puts them in, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.evaluation import SetConfig
from finetune.reranker.candidates import evaluate_reranker, read_candidates

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


def test_equal_scores_keep_the_order_the_candidates_were_found_in(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"query": "甲", "pos": ["对"], "neg": ["错", "误"]}])
    found, _ = read_candidates("dev", SetConfig(rows=[rows]), 20, **LIMITS)
    assert evaluate_reranker(by_length, found).by_metric["recall@1"] == (1.0,)


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
    assert [set(ids) for ids in found.candidates] == [{"a", "c"}, {"a", "c"}]
    # the longer one first: gold "a" is second, gold "b" cannot be found
    assert evaluate_reranker(by_length, found).by_metric["mrr@10"] == (0.5, 0.0)
