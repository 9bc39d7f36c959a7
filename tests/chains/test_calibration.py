"""Relevance: the same scale whatever the embedder; what is refused and what is not, by the default threshold."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel

from chains import build_retrieval_qa, calibration, load_config
from chains.calibration import Background, excess, logistic, mention_relevance, nearness_relevance
from chains.config import RagConfig
from chains.knowledge_base import KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings
from chains.retrieval_qa import build_vectorstore
from chains.vectorstores import FaissVectorStore

THRESHOLD = RagConfig().min_relevance


def passage(text: str, **metadata: Any) -> Document:
    return Document(page_content=text, metadata=metadata)


# -- what is mentioned -------------------------------------------------------------------------------------------------


def test_the_logistic_function_equals_the_hand_count() -> None:
    # 1 / (1 + exp(-(1 - 2 * .5 + 3 * 1))) = 1 / (1 + e^-3) = .952574
    assert logistic({"constant": 1.0, "a": -2.0, "b": 3.0}, {"a": 0.5, "b": 1.0}) == pytest.approx(0.952574, abs=1e-6)


@pytest.mark.parametrize(
    ("question", "document"),
    [
        ("年假几天", passage("年假几天")),
        ("年假有几天", passage("一共十天。", title="年假")),
        ("年假", passage("一共十天。", headings=["制度", "年假"])),
        ("ＸＲ－７的轉速", passage("xr-7 的转速是一万二千转")),
        ("What is the warranty of XR-7?", passage("The warranty of the XR-7 is three years.")),
    ],
)
def test_a_passage_that_mentions_all_is_relevant(question: str, document: Document) -> None:
    assert mention_relevance(question, document) > 0.8


@pytest.mark.parametrize(
    ("question", "document"),
    [
        ("年假几天", passage("停车场")),
        ("", passage("年假")),
        ("什么", passage("什么都有")),
        ("年假", passage("")),
    ],
)
def test_a_passage_that_mentions_nothing_is_not(question: str, document: Document) -> None:
    assert mention_relevance(question, document) == 0.0


def test_more_mentioned_is_more_relevant() -> None:
    texts = ["停车场的工资", "年假的工资", "年假折算的工资", "年假折算成加班的工资", "年假折算成加班工资"]
    scores = [mention_relevance("年假怎样折算成加班工资？", passage(text)) for text in texts]
    assert scores == sorted(scores)
    assert scores[0] < THRESHOLD < scores[-1]


# -- how near ----------------------------------------------------------------------------------------------------------


def test_excess_equals_the_hand_count() -> None:
    """Background .1 and .3: mean .2, deviation .1. Cosine .6: four of them; the best of e^2 = 7.4 by chance: two."""
    background = np.array([0.1, 0.3], np.float32)
    expected = [4 - math.sqrt(2 * math.log(7)), -math.sqrt(2 * math.log(7))]
    assert excess([0.6, 0.2], background, round(math.e**2)) == pytest.approx(expected, abs=1e-5)


def test_a_background_without_spread_makes_no_infinite_relevance() -> None:
    same = np.full(100, 0.7, np.float32)
    usual, nearest = nearness_relevance([0.7, 1.0], same, 100)
    assert 0 < usual < THRESHOLD
    assert math.isfinite(nearest)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.6, 0.3), (-0.2, 0.5), (0.85, 0.1)])
def test_nearness_does_not_depend_on_the_embedders_scale(shift: float, scale: float) -> None:
    """BGE's cosines lie between .6 and 1, others' around 0: the same after shifting and stretching."""
    background = np.random.default_rng(0).normal(0, 0.2, 500).astype(np.float32)
    plain = nearness_relevance([0.9], background, 1000)
    assert nearness_relevance([shift + scale * 0.9], shift + scale * background, 1000) == pytest.approx(plain, abs=1e-3)


def test_the_nearest_of_many_random_vectors_is_not_relevant() -> None:
    """In a larger knowledge base something is near by chance."""
    random = np.random.default_rng(1)
    for chunks in (100, 1_000, 20_000):
        cosines = random.normal(0.3, 0.05, chunks).astype(np.float32)
        sample = cosines[:256]
        assert max(nearness_relevance(np.sort(cosines)[-3:].tolist(), sample, chunks)) < 0.3
        assert nearness_relevance([0.3 + 0.05 * 9], sample, chunks)[0] > 0.8


# -- a semantic embedder -----------------------------------------------------------------------------------------------

CONCEPTS = {
    0: ("年假", "休假", "带薪假", "放假"), 1: ("报销", "费用", "差旅费"), 2: ("离职", "辞职", "不干了"),
    3: ("停车", "车辆", "泊车"), 4: ("工资", "薪水", "报酬"), 5: ("电脑", "计算机", "笔记本"),
}  # fmt: skip


class ConceptEmbeddings(Embeddings):
    """Knows a few synonyms: a text is the concepts it names over a common direction, as real models have one."""

    def __init__(self, common: float = 2.0) -> None:
        self.common = common

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(64)
        vector[0] = self.common
        for number, words in CONCEPTS.items():
            vector[1 + number] = 3.0 * any(word in text for word in words)
        noise = np.random.default_rng(sum(map(ord, text))).normal(size=32)
        vector[32:] = noise / np.linalg.norm(noise)
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


RULES = [
    "员工工作满一年可休年假十天。", "报销须在三十天内办理。", "辞职须提前三十日书面通知。", "车辆一律停在地下二层。",
    "薪水每月十五日发放。", "计算机由信息部统一采购。", "会议室须提前预订。", "食堂十一点半开门。",
]  # fmt: skip
FILLER = [f"第{n}号仓库存放{'铁木石玉瓷布纸油盐酱'[n % 10]}制品{n * 7}件。" for n in range(120)]


@pytest.fixture(scope="module", params=[(2.0, 0), (2.0, 120), (6.0, 120)], ids=["small", "large", "narrow"])
def semantic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Any, None, None]:
    """A chain over a small and a larger knowledge base, the embedder's cosines spread wide or narrow."""
    common, filler = request.param
    config = load_config(None, [f"kb={tmp_path_factory.mktemp('semantic') / 'kb'}"])
    embeddings = ConceptEmbeddings(common)
    store = build_vectorstore(config, embeddings, create=True)
    store.add_texts([*RULES, *FILLER[:filler]])
    yield build_retrieval_qa(config, vectorstore=store, llm=FakeListChatModel(responses=["好的[1]"] * 50))
    store.knowledge_base.close()


@pytest.mark.parametrize(
    ("question", "fact"), [("带薪假多少？", "年假"), ("不干了怎么办？", "辞职"), ("笔记本找谁要？", "计算机")]
)
def test_a_paraphrase_without_common_words_is_not_refused(semantic: Any, question: str, fact: str) -> None:
    output = semantic.invoke(question)
    best = output["source_documents"][0]
    assert fact in best.page_content
    assert mention_relevance(question, best) < THRESHOLD <= best.metadata["score"]
    assert not output["refused"]


@pytest.mark.parametrize("question", ["怎样做红烧鱼？", "北京到上海的高铁几点开？", "Who painted the Mona Lisa?"])
def test_an_unrelated_question_is_refused_with_a_semantic_embedder_too(semantic: Any, question: str) -> None:
    assert semantic.invoke(question)["refused"]


def test_what_is_worded_alike_is_as_relevant_whatever_the_embedder(semantic: Any) -> None:
    question = "报销须在几天内办理？"
    best = semantic.invoke(question)["source_documents"][0]
    assert best.metadata["score"] >= round(mention_relevance(question, best), 4) > 0.9


# -- the sample --------------------------------------------------------------------------------------------------------


class Counting(ConceptEmbeddings):
    """Tells how many texts were embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.embedded += len(texts)
        return super().embed_documents(texts)


@pytest.fixture
def counted(tmp_path: Path) -> Generator[tuple[FaissVectorStore, Counting], None, None]:
    embeddings = Counting()
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield FaissVectorStore(embeddings, knowledge_base), embeddings


def relevances(background: Background, store: FaissVectorStore, question: str = "休假") -> dict[int, float]:
    vector = store.embed_query(question)
    return background.relevances(vector, {1: vector})


def test_the_sample_is_drawn_once_and_again_when_the_knowledge_base_has_grown(
    counted: tuple[FaissVectorStore, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = counted
    store.add_texts(FILLER[:100])
    drawn: list[int] = []
    real = store.knowledge_base.chunk_ids

    def counting_ids() -> Any:
        drawn.append(1)
        return real()

    monkeypatch.setattr(store.knowledge_base, "chunk_ids", counting_ids)
    background = Background(store)
    for _ in range(5):
        relevances(background, store)
    assert len(drawn) == 1
    store.add_texts(["一条新的"])  # a little more changes nothing
    relevances(background, store)
    assert len(drawn) == 1
    store.add_texts([f"又{text}" for text in FILLER[:60]])
    relevances(background, store)
    assert len(drawn) == 2


def test_chunks_are_counted_once_and_then_by_what_changed(
    counted: tuple[FaissVectorStore, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = counted
    store.add_texts(FILLER[:100])
    background, real = Background(store), store.knowledge_base.chunk_count
    relevances(background, store)

    def refuse() -> int:
        raise AssertionError("all chunks were counted")

    monkeypatch.setattr(store.knowledge_base, "chunk_count", refuse)
    (key,) = store.add_texts(["一条新的"])
    store.add_texts(FILLER[100:103])
    relevances(background, store)
    assert background._counted == real() == 104
    store.delete([key])
    relevances(background, store)
    assert background._counted == real() == 103


def test_a_small_knowledge_base_borrows_sentences_once(counted: tuple[FaissVectorStore, Counting]) -> None:
    store, embeddings = counted
    store.add_texts(RULES)
    before = embeddings.embedded
    background = Background(store)
    for _ in range(3):
        assert relevances(background, store)[1] > THRESHOLD
    assert embeddings.embedded - before <= len(calibration._ELSEWHERE) + 1  # and the probe of the embedder


def test_an_empty_knowledge_base_and_the_lexical_embedder_have_no_nearness(
    counted: tuple[FaissVectorStore, Counting], tmp_path: Path
) -> None:
    store, _ = counted
    assert relevances(Background(store), store) == {}
    with KnowledgeBase(tmp_path / "lexical", create=True) as knowledge_base:
        lexical = FaissVectorStore(LexicalEmbeddings(), knowledge_base)
        lexical.add_texts(RULES)
        assert relevances(Background(lexical), lexical) == {}


# -- real questions ----------------------------------------------------------------------------------------------------


def test_real_questions_are_told_from_those_of_another_knowledge_base(shared_data: Path, tmp_path: Path) -> None:
    """Forty questions each of cmrc2018_trial (answerable) and dureader2_demo_dev (not) over the trial passages.

    `python -m benchmarks.fit_relevance --judge` asks more, of more sets.
    """
    from chains.evaluation import Question, evaluate, read_questions
    from chains.ingestion import Ingestor

    config = load_config(None, [f"kb={tmp_path / 'kb'}"])
    store = build_vectorstore(config, create=True)
    qa = build_retrieval_qa(config, vectorstore=store)
    fulltext = qa.retriever.default.default.fulltext  # type: ignore[attr-defined]
    Ingestor(store, fulltext).ingest([shared_data / "cmrc2018_trial_passages.jsonl"])
    answerable = [row for row in read_questions(shared_data / "cmrc2018_trial.jsonl") if row.question.strip()][:40]
    others: Sequence[Question] = read_questions(shared_data / "dureader2_demo_dev.jsonl")[:40]
    without = [Question(question=row.question, answers=[]) for row in others]
    refusal = evaluate(qa, [*answerable, *without])["refusal"]
    assert refusal["precision"] >= 0.9
    assert refusal["recall"] >= 0.7
    store.knowledge_base.close()
