"""How well an embedder retrieves: questions with known passages, ranked exactly, one score per question.

The embedder is the LangChain `Embeddings` that will serve, so what is measured here is what is met in use.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from pydantic import Field, model_validator

from chains.embeddings import PROBE, Vectors, embed_documents, embed_query, unit_length
from chains.evaluation import read_questions
from chains.metrics import mrr_at_k, ndcg_at_k, recall_at_k
from finetune.data.rows import RetrievalRow, read_retrieval_rows
from finetune.training_config import JudgingConfig
from loaders.config import Config
from loaders.errors import RagProjError
from loaders.splitters import embedding_text

Metric = Literal["recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10"]
METRICS: tuple[Metric, ...] = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")

# Passages are looked at to the tenth place: no metric asks for more.
_DEPTH = 10
# Similarities held at once, 64 MB.
_SCORES_AT_ONCE = 16_000_000


class EvaluationError(RagProjError):
    """An evaluation set that cannot be measured on."""


class SetConfig(Config):
    """Where an evaluation set comes from: questions with their passages, or retrieval rows."""

    questions: Path | None = Field(default=None, description="JSONL: question, and context_id or pos_ids")
    passages: list[Path] = Field(default_factory=list, description="JSONL: id, title, text; the pool of the questions")
    rows: list[Path] = Field(
        default_factory=list, description="JSONL: query, pos, neg; all their passages are the pool"
    )

    @model_validator(mode="after")
    def _one_form(self) -> SetConfig:
        if bool(self.rows) == bool(self.questions) or bool(self.questions) != bool(self.passages):
            raise ValueError("give either rows, or questions and passages / 应给出 rows，或 questions 和 passages")
        return self


class EvaluationConfig(JudgingConfig):
    """What a model is judged on, before, during and after its training."""

    choosing: ClassVar[frozenset[str]] = JudgingConfig.choosing | {"interval_passages", "interval_questions"}

    metric: Metric = Field(default="ndcg@10", description="what the best checkpoint and the gate go by")
    dev: SetConfig | None = Field(default=None, description="the set that a run must gain on; disjoint from training")
    extra: dict[str, SetConfig] = Field(
        default_factory=dict, description="further sets by name, on which forgetting shows"
    )
    max_passages: int = Field(default=10_000, ge=10, description="passages of a pool before and after; gold ones stay")
    max_questions: int = Field(default=2_000, ge=1, description="questions of a set before and after")
    interval_passages: int = Field(default=2_000, ge=10, description="passages of the dev pool while training")
    interval_questions: int = Field(default=500, ge=1, description="questions of the dev set while training")
    fused: bool = Field(default=True, description="measure dev together with lexical search, too, as it is served")


@dataclass(frozen=True)
class Passage:
    """A text that can be found."""

    id: str
    text: str
    title: str = ""

    @property
    def document(self) -> Document:
        """The passage as a knowledge base holds it."""
        return Document(page_content=self.text, metadata={"id": self.id, "title": self.title, "source": self.id})

    @property
    def embedded(self) -> str:
        """What is embedded for it, the same as for a chunk of a knowledge base."""
        return embedding_text(self.document) if self.title else self.text


@dataclass(frozen=True)
class RetrievalSet:
    """Questions, the passages to rank for each, and which of them answer."""

    name: str
    questions: tuple[str, ...]
    gold: tuple[tuple[str, ...], ...]
    """ids of the answering passages, for each question"""
    passages: tuple[Passage, ...]

    def part(self, numbers: Sequence[int]) -> RetrievalSet:
        """Some of the questions, over the same passages."""
        return replace(
            self,
            questions=tuple(self.questions[number] for number in numbers),
            gold=tuple(self.gold[number] for number in numbers),
        )

    def sampled(self, *, max_questions: int, max_passages: int, seed: int) -> RetrievalSet:
        """At most that many questions, and their gold passages with others drawn to fill up the pool.

        Gold passages are never left out, even where they alone are more than `max_passages`. Order is kept. A smaller
        pool is easier to search: compare scores only within the same sample.
        """
        if len(self.questions) <= max_questions and len(self.passages) <= max_passages:
            return self
        draw = random.Random(seed)  # noqa: S311 a sample, no secret
        numbers = sorted(draw.sample(range(len(self.questions)), min(max_questions, len(self.questions))))
        wanted = {identifier for number in numbers for identifier in self.gold[number]}
        others = [passage.id for passage in self.passages if passage.id not in wanted]
        wanted.update(draw.sample(others, min(len(others), max(0, max_passages - len(wanted)))))
        passages = tuple(passage for passage in self.passages if passage.id in wanted)
        return replace(self.part(numbers), passages=passages)


def read_set(name: str, config: SetConfig) -> RetrievalSet:
    """The evaluation set a config section names.

    Raises:
        EvaluationError: no question has a passage that is in the pool.
        QuestionsError, RowsError: a file cannot be read; every bad row is listed.
    """
    if config.rows:
        return from_rows(name, read_retrieval_rows(config.rows))
    assert config.questions is not None
    return from_questions(name, config.questions, config.passages)


def from_questions(name: str, questions: Path, passages: Sequence[Path]) -> RetrievalSet:
    """A set of labelled questions over a pool of passages; questions without a passage in the pool are left out.

    Passages with the same text and title become one, since no embedder can tell them apart.

    Raises:
        EvaluationError: no question is left, or a passage file has a row that is no passage.
    """
    pool, names = _unique(passage for path in passages for passage in _read_passages(path))
    asked = [
        (
            question.question,
            tuple(dict.fromkeys(names[identifier] for identifier in question.gold if identifier in names)),
        )
        for question in read_questions(questions)
    ]
    return _checked(name, [(text, gold) for text, gold in asked if gold and text.strip()], pool)


def from_rows(name: str, rows: Sequence[RetrievalRow]) -> RetrievalSet:
    """A set of training-style rows: every positive and negative of any row is a passage, the row's positives are gold.

    Rows that ask the same question are one question with all their positives.
    """
    texts = dict.fromkeys(text for row in rows for text in (*row.pos, *row.neg))
    ids = {text: f"p{number}" for number, text in enumerate(texts)}
    gold: dict[str, dict[str, None]] = {}
    for row in rows:
        gold.setdefault(row.query, {}).update((ids[text], None) for text in row.pos)
    pool = [Passage(identifier, text) for text, identifier in ids.items()]
    return _checked(name, [(query, tuple(found)) for query, found in gold.items()], pool)


def _checked(name: str, asked: Sequence[tuple[str, tuple[str, ...]]], pool: Sequence[Passage]) -> RetrievalSet:
    if not asked:
        raise EvaluationError(
            f"评测集 {name} 中没有一个问题的答案片段在片段文件里；请检查 context_id / pos_ids 与片段的 id 是否一致",
            f"no question of evaluation set {name} has a passage in the pool; check that context_id or pos_ids name"
            " ids of the passage files",
        )
    return RetrievalSet(name, tuple(text for text, _ in asked), tuple(gold for _, gold in asked), tuple(pool))


def _read_passages(path: Path) -> Iterable[Passage]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _passage(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"无法读取片段文件 {path}：{error}", f"cannot read passages {path}: {error}") from error


def _passage(path: Path, number: int, line: str) -> Passage:
    try:
        row = json.loads(line)
        identifier, text, title = str(row["id"]), row["text"], row.get("title") or ""
    except (ValueError, TypeError, KeyError, AttributeError):
        identifier, text, title = "", None, ""
    if not identifier or not isinstance(text, str) or not text.strip() or not isinstance(title, str):
        raise EvaluationError(
            f'{path}:{number}：片段应为 {{"id", "title", "text"}} 且 text 不为空',
            f'{path}:{number}: a passage is {{"id", "title", "text"}} with a text that is not empty',
        )
    return Passage(identifier, text, title)


def _unique(passages: Iterable[Passage]) -> tuple[list[Passage], dict[str, str]]:
    """(passages that differ, every id -> id of the one kept)."""
    kept: dict[tuple[str, str], Passage] = {}
    names: dict[str, str] = {}
    for passage in passages:
        first = kept.setdefault((passage.title, passage.text), passage)
        names.setdefault(passage.id, first.id)
    return list(kept.values()), names


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What an embedder reached on a set: for each metric one value per question, in the order of the questions."""

    by_metric: Mapping[str, tuple[float, ...]]
    passages: int
    """size of the pool that was searched"""

    @property
    def questions(self) -> int:
        """How many questions were asked."""
        return len(next(iter(self.by_metric.values())))

    def part(self, numbers: Sequence[int]) -> Scores:
        """Those of some of the questions."""
        values = {name: tuple(found[number] for number in numbers) for name, found in self.by_metric.items()}
        return Scores(values, self.passages)

    def mean(self, metric: str) -> float:
        """Mean over the questions."""
        return float(np.mean(self.by_metric[metric]))

    def means(self) -> dict[str, float]:
        """Mean of each metric, four decimals."""
        return {metric: round(self.mean(metric), 4) for metric in self.by_metric}


@runtime_checkable
class ArrayQueries(Protocol):
    """An embedder that embeds many queries at once."""

    def embed_queries_array(self, texts: Sequence[str]) -> Vectors:
        """Vectors of the queries, (n, dimensions) float32."""


@dataclass(frozen=True)
class Embedded:
    """A set's texts as vectors: `queries` (questions, dimensions), `passages` (passages, dimensions), unit length."""

    queries: Vectors
    passages: Vectors

    def prefix(self, length: int) -> Embedded:
        """The first numbers of each vector, of unit length again."""
        return Embedded(unit_length(self.queries[:, :length]), unit_length(self.passages[:, :length]))


def embed_set(embeddings: Embeddings, questions: RetrievalSet) -> Embedded:
    """The vectors of a set; queries carry the embedder's instruction, passages do not.

    Raises:
        EmbedderError: the embedder returned something else than one finite vector for each text.
    """
    passages = embed_documents(embeddings, [passage.embedded for passage in questions.passages])
    if isinstance(embeddings, ArrayQueries):
        queries = unit_length(cast("ArrayQueries", embeddings).embed_queries_array(questions.questions))
    else:
        queries = np.stack([embed_query(embeddings, question) for question in questions.questions])
    return Embedded(queries, passages)


def evaluate_embeddings(embeddings: Embeddings, questions: RetrievalSet) -> Scores:
    """Scores of an embedder on a set, by exact search over the whole pool."""
    return score_vectors(embed_set(embeddings, questions), questions)


def score_vectors(vectors: Embedded, questions: RetrievalSet) -> Scores:
    """Scores of vectors already made."""
    ids = [passage.id for passage in questions.passages]
    places = nearest(vectors.queries, vectors.passages, _DEPTH)
    return score_rankings([[ids[place] for place in row] for row in places], questions)


def score_rankings(rankings: Sequence[Sequence[str]], questions: RetrievalSet) -> Scores:
    """Scores of rankings of passage ids, best first, one for each question."""
    formulas = {
        **{f"recall@{k}": (recall_at_k, k) for k in (1, 5, 10)},
        "mrr@10": (mrr_at_k, 10),
        "ndcg@10": (ndcg_at_k, 10),
    }
    pairs = list(zip(rankings, questions.gold, strict=True))
    return Scores(
        {name: tuple(formula(ranked, gold, k) for ranked, gold in pairs) for name, (formula, k) in formulas.items()},
        len(questions.passages),
    )


def nearest(queries: Vectors, passages: Vectors, k: int) -> list[npt.NDArray[np.int64]]:
    """For each query the places of its k nearest passages, best first, equal ones in the order of the passages.

    Exact: a block of queries at a time against all passages.
    """
    k = min(k, len(passages))
    step = max(1, _SCORES_AT_ONCE // max(1, len(passages)))
    found: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(queries), step):
        for row in queries[start : start + step] @ passages.T:  # (passages,)
            last = np.partition(row, -k)[-k]
            candidates = np.flatnonzero(row >= last)  # ascending, so that the stable sort keeps ties in order
            found.append(candidates[np.argsort(-row[candidates], kind="stable")[:k]])
    return found


# --- together with lexical search -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedScores:
    """A set through lexical search alone and through both legs fused."""

    lexical: Scores
    fused: Scores


class _Known(Embeddings):
    """Vectors made before, under the texts they belong to."""

    def __init__(self, vectors: Mapping[str, Vectors]) -> None:
        # a store asks for the probe by which it recognises its embedder: any vector of the right length does
        self._vectors = {**vectors, PROBE: next(iter(vectors.values()))}

    @property
    def fingerprint(self) -> str:
        return "evaluation"  # the knowledge base lives as long as these vectors do

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self._vectors[text].tolist() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        result: list[float] = self._vectors[text].tolist()
        return result


def evaluate_fused(vectors: Embedded, questions: RetrievalSet) -> FusedScores:
    """Scores of BM25 alone and of `HybridRetriever`, the project's own, over a knowledge base made for it.

    Each passage is one chunk there. The knowledge base is removed afterwards.
    """
    # FAISS sets the number of OpenMP threads of the thread that searches, to 1 for a small index, and torch shares it:
    # a training in the same thread would go on with one core
    with ThreadPoolExecutor(1) as searching:
        return searching.submit(_evaluate_fused, vectors, questions).result()


def _evaluate_fused(vectors: Embedded, questions: RetrievalSet) -> FusedScores:
    from chains.fulltext import FullTextIndex
    from chains.knowledge_base import KnowledgeBase
    from chains.retrievers import HybridRetriever, LexicalRetriever
    from chains.vectorstores import FaissVectorStore

    known = {passage.embedded: vector for passage, vector in zip(questions.passages, vectors.passages, strict=True)}
    with tempfile.TemporaryDirectory() as folder, KnowledgeBase(Path(folder) / "kb", create=True) as knowledge_base:
        store = FaissVectorStore(_Known(known), knowledge_base)
        store.add_documents(
            [passage.document for passage in questions.passages], ids=[passage.id for passage in questions.passages]
        )
        fulltext = FullTextIndex(knowledge_base)
        legs = {
            "lexical": LexicalRetriever(store=store, fulltext=fulltext),
            "fused": HybridRetriever(store=store, fulltext=fulltext),
        }
        found = {}
        for name, retriever in legs.items():
            rankings = [
                [chunk for chunk, _ in retriever.rank(question, _DEPTH, vector=vector)]
                for question, vector in zip(questions.questions, vectors.queries, strict=True)
            ]
            chunks = knowledge_base.chunks(chunk for ranking in rankings for chunk in ranking)
            ids = [[chunks[chunk].key for chunk in ranking] for ranking in rankings]
            found[name] = score_rankings(ids, questions)
    return FusedScores(found["lexical"], found["fused"])
