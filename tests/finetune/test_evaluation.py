"""Evaluation sets, exact search and scores, by hand-counted examples with an embedder whose vectors are given."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings

from chains.lexical_embeddings import LexicalEmbeddings
from finetune.data.rows import RetrievalRow
from finetune.evaluation import (
    EvaluationConfig,
    EvaluationError,
    Passage,
    RetrievalSet,
    SetConfig,
    embed_set,
    evaluate_embeddings,
    evaluate_fused,
    from_questions,
    from_rows,
    nearest,
    read_set,
)
from loaders.errors import ConfigError


class Given(Embeddings):
    """Vectors by text."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.vectors[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.vectors[text]


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def small_set() -> RetrievalSet:
    passages = tuple(Passage(name, name) for name in "abc")
    return RetrievalSet("small", ("q1", "q2"), (("b",), ("a", "c")), passages)


def row(query: str, pos: tuple[str, ...], neg: tuple[str, ...] = ()) -> RetrievalRow:
    return RetrievalRow(query=query, pos=pos, neg=neg)


# --- sets


def test_questions_are_matched_to_their_passages_and_those_without_one_are_left_out(tmp_path: Path) -> None:
    questions = write_lines(
        tmp_path / "q.jsonl",
        [
            {"question": "一", "context_id": 7},
            {"question": "二", "pos_ids": ["p2", "gone"]},
            {"question": "三", "context_id": "gone"},
        ],
    )
    passages = write_lines(
        tmp_path / "p.jsonl", [{"id": 7, "title": "甲", "text": "文"}, {"id": "p2", "title": "", "text": "字"}]
    )
    found = from_questions("dev", questions, [passages])
    assert found.questions == ("一", "二")
    assert found.gold == (("7",), ("p2",))
    assert found.passages == (Passage("7", "文", "甲"), Passage("p2", "字"))
    assert [passage.embedded for passage in found.passages] == ["甲\n文", "字"]


def test_passages_with_the_same_text_are_one_under_either_id(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [{"question": "一", "pos_ids": ["b", "a"]}])
    passages = write_lines(tmp_path / "p.jsonl", [{"id": "a", "text": "同"}, {"id": "b", "text": "同"}])
    found = from_questions("dev", questions, [passages])
    assert found.gold == (("a",),)
    assert len(found.passages) == 1


def test_rows_that_ask_the_same_are_one_question_over_all_passages() -> None:
    found = from_rows("dev", [row("q", ("x",), ("y",)), row("q", ("z",)), row("r", ("y",))])
    assert found.questions == ("q", "r")
    assert [passage.text for passage in found.passages] == ["x", "y", "z"]
    assert found.gold == (("p0", "p2"), ("p1",))


def test_a_set_without_any_gold_passage_names_the_keys_to_check(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [{"question": "一", "context_id": "x"}])
    passages = write_lines(tmp_path / "p.jsonl", [{"id": "y", "text": "字"}])
    with pytest.raises(EvaluationError, match="context_id"):
        from_questions("dev", questions, [passages])


@pytest.mark.parametrize("line", ['{"id": "a"}', '{"id": "a", "text": " "}', "[1]", "{", '{"text": "x"}'])
def test_a_bad_passage_is_named_with_file_and_line(tmp_path: Path, line: str) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [{"question": "一", "context_id": "x"}])
    passages = tmp_path / "p.jsonl"
    passages.write_text('{"id": "x", "text": "字"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"p\.jsonl:2"):
        from_questions("dev", questions, [passages])


def test_a_sample_keeps_the_gold_passages_of_its_questions_and_is_the_same_for_a_seed() -> None:
    passages = tuple(Passage(str(number), f"文{number}") for number in range(50))
    whole = RetrievalSet("dev", tuple(f"问{n}" for n in range(20)), tuple((str(n),) for n in range(20)), passages)
    sample = whole.sampled(max_questions=5, max_passages=12, seed=3)
    assert (len(sample.questions), len(sample.passages)) == (5, 12)
    ids = {passage.id for passage in sample.passages}
    assert all(set(gold) <= ids for gold in sample.gold)
    assert sample == whole.sampled(max_questions=5, max_passages=12, seed=3)
    assert sample != whole.sampled(max_questions=5, max_passages=12, seed=4)


def test_gold_passages_stay_even_where_they_alone_are_too_many() -> None:
    assert len(small_set().sampled(max_questions=10, max_passages=1, seed=0).passages) == 3


def test_a_set_that_fits_is_left_as_it_is() -> None:
    assert small_set().sampled(max_questions=2, max_passages=3, seed=0) == small_set()


@pytest.mark.parametrize(
    "section", [{}, {"questions": "q"}, {"passages": ["p"]}, {"rows": ["r"], "questions": "q", "passages": ["p"]}]
)
def test_a_set_is_given_in_exactly_one_form(section: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="rows"):
        EvaluationConfig.from_dict({"dev": section}, where="test")


# --- search and scores


def test_the_nearest_are_exact_and_ties_stand_in_the_order_of_the_passages() -> None:
    passages = np.asarray([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    places = nearest(np.asarray([[1, 0], [0, 1]], np.float32), passages, 3)
    assert [row.tolist() for row in places] == [[0, 2, 3], [1, 3, 0]]


def test_search_in_blocks_equals_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    queries = random.integers(-2, 3, (30, 4)).astype(np.float32)  # small integers: many ties, exact products
    passages = random.integers(-2, 3, (40, 4)).astype(np.float32)
    monkeypatch.setattr("finetune.evaluation._SCORES_AT_ONCE", 120)  # three queries a block
    expected = np.argsort(-(queries @ passages.T), axis=1, kind="stable")[:, :10]
    assert np.array_equal(np.stack(nearest(queries, passages, 10)), expected)


def test_scores_are_those_counted_by_hand() -> None:
    vectors = {"a": [1.0, 0], "b": [0.9, 0.1], "c": [0, 1.0], "q1": [1.0, 0], "q2": [0.5, 0.6]}
    # q1 ranks a b c, gold b: second. q2 ranks c b a (cosines .768, .764-, .640), gold a and c: first and third
    scores = evaluate_embeddings(Given(vectors), small_set())
    assert scores.by_metric["recall@1"] == (0.0, 1.0)
    assert scores.by_metric["recall@5"] == (1.0, 1.0)
    assert scores.by_metric["mrr@10"] == (0.5, 1.0)
    assert scores.by_metric["ndcg@10"][0] == pytest.approx(1 / math.log2(3))
    assert scores.by_metric["ndcg@10"][1] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))
    assert scores.mean("mrr@10") == 0.75
    assert (scores.questions, scores.passages) == (2, 3)


def test_the_lexical_embedder_finds_what_shares_words() -> None:
    found = from_rows("dev", [row("苹果多少钱一斤", ("苹果每斤五元",)), row("北京在哪里", ("北京位于华北",))])
    assert evaluate_embeddings(LexicalEmbeddings(dimensions=256), found).mean("recall@1") == 1.0


# --- fused with lexical search


def test_fused_scores_come_from_the_retriever_that_serves() -> None:
    # The question shares words with its passage only for the first; vectors know the second only.
    rows = [
        row("苹果多少钱一斤", ("苹果每斤五元",)),
        row("首都是哪里", ("北京位于华北",)),
        row("别的", ("无关的句子",)),
    ]
    questions = from_rows("dev", rows)
    vectors = {
        "苹果多少钱一斤": [0.6, 0.6, 0.52],
        "首都是哪里": [0, 1.0, 0],
        "别的": [0, 0, 1.0],
        "苹果每斤五元": [1.0, 0, 0],
        "北京位于华北": [0, 1.0, 0],
        "无关的句子": [0, 0, 1.0],
    }
    embedded = embed_set(Given(vectors), questions)
    scores = evaluate_fused(embedded, questions)
    assert scores.lexical.by_metric["recall@1"] == (1.0, 0.0, 0.0)
    assert scores.fused.by_metric["recall@1"] == (1.0, 1.0, 1.0)


def test_measuring_with_faiss_leaves_torch_its_threads() -> None:
    import torch

    questions = from_rows("dev", [row("一", ("甲",)), row("二", ("乙",))])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluate_fused(embed_set(LexicalEmbeddings(dimensions=64), questions), questions)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bm25_on_the_shared_questions_is_near_its_published_anchor(shared_data: Path) -> None:
    # data/README: BM25 over bigrams reaches R@1 .430 and R@5 .980 on dureader2_demo_dev
    config = SetConfig(
        questions=shared_data / "dureader2_demo_dev.jsonl",
        passages=sorted(shared_data.glob("dureader2_demo_*_passages.jsonl")),
    )
    questions = read_set("dureader", config)
    assert len(questions.questions) == 100
    scores = evaluate_fused(embed_set(LexicalEmbeddings(dimensions=256), questions), questions)
    assert scores.lexical.mean("recall@1") == pytest.approx(0.43, abs=0.08)
    assert scores.lexical.mean("recall@5") >= 0.95
