"""What a reranker is judged on: for each question a list of candidates to put in order."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.data.rows import read_retrieval_rows
from finetune.evaluation import RetrievalSet, Scores, SetConfig, from_rows, read_set, score_rankings
from finetune.measurement import set_digest
from loaders.errors import RagProjError

Score = Callable[[Sequence[tuple[str, str]]], npt.NDArray[np.float32]]


class ScoresError(RagProjError):
    """Scores by which nothing can be put in order."""


@dataclass(frozen=True)
class CandidateSet:
    """Questions with their gold passages, and the passages that are reranked for each."""

    questions: RetrievalSet
    candidates: tuple[tuple[str, ...], ...]
    """ids, in the order they were found in; a row's own, which nothing found, in one that says nothing"""

    @property
    def digest(self) -> str:
        """A hash of questions, passages and candidates, 16 hex digits."""
        content = f"{set_digest(self.questions)} {self.candidates!r}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def part(self, numbers: Sequence[int]) -> CandidateSet:
        """Some of the questions with their candidates."""
        return CandidateSet(self.questions.part(numbers), tuple(self.candidates[number] for number in numbers))

    def sampled(self, *, max_questions: int, max_passages: int, seed: int) -> CandidateSet:
        """At most that many questions with their candidates; the pool is not searched any more."""
        chosen = self.questions.sampled(
            max_questions=max_questions, max_passages=max(max_passages, len(self.questions.passages)), seed=seed
        )
        of = dict(zip(self.questions.questions, self.candidates, strict=True))
        return CandidateSet(chosen, tuple(of[question] for question in chosen.questions))


def read_candidates(
    name: str, config: SetConfig, count: int, *, max_questions: int, max_passages: int, seed: int
) -> tuple[CandidateSet, bool]:
    """(the candidates of a set, whether it is a sample): a row's own passages, or what BM25 finds in the pool.

    A gold passage that BM25 does not find is not put into the list: nobody could rerank it in use. A row names its
    positives first; kept so, a reranker that gives all the same score would have put every one of them right.
    """
    if config.rows:
        rows = read_retrieval_rows(config.rows)
        questions = from_rows(name, rows)
        ids = {passage.text: passage.id for passage in questions.passages}
        own: dict[str, set[str]] = {}
        for row in rows:
            own.setdefault(row.query, set()).update((*row.pos, *row.neg))
        listed = (sorted(own[question], key=partial(_lot, question)) for question in questions.questions)
        whole = CandidateSet(questions, tuple(tuple(ids[text] for text in texts) for texts in listed))
        chosen = whole.sampled(max_questions=max_questions, max_passages=max_passages, seed=seed)
        return chosen, chosen.questions is not questions
    everything = read_set(name, config)
    drawn = everything.sampled(max_questions=max_questions, max_passages=max_passages, seed=seed)
    return CandidateSet(drawn, found_by_words(drawn, count)), drawn is not everything


def _lot(question: str, text: str) -> bytes:
    """A number that looks random and depends on question and text alone."""
    return hashlib.blake2b(f"{question}\n{text}".encode(), digest_size=8).digest()


def found_by_words(questions: RetrievalSet, count: int) -> tuple[tuple[str, ...], ...]:
    """For each question the ids of the `count` best passages by BM25, over a knowledge base made for it."""
    from chains.fulltext import FullTextIndex
    from chains.knowledge_base import KnowledgeBase
    from chains.lexical_embeddings import LexicalEmbeddings
    from chains.vectorstores import FaissVectorStore

    with tempfile.TemporaryDirectory() as folder, KnowledgeBase(Path(folder) / "kb", create=True) as knowledge_base:
        store = FaissVectorStore(LexicalEmbeddings(dimensions=64), knowledge_base)
        store.add_documents(
            [passage.document for passage in questions.passages], ids=[passage.id for passage in questions.passages]
        )
        fulltext = FullTextIndex(knowledge_base)
        rankings = [[chunk for chunk, _ in fulltext.search(text, count)] for text in questions.questions]
        chunks = knowledge_base.chunks(chunk for ranking in rankings for chunk in ranking)
        return tuple(tuple(chunks[chunk].key for chunk in ranking) for ranking in rankings)


def evaluate_found(candidates: CandidateSet) -> Scores:
    """Scores of the candidates as they were found, without any reranker."""
    return score_rankings(candidates.candidates, candidates.questions)


def evaluate_reranker(score: Score, candidates: CandidateSet) -> Scores:
    """Scores of the candidates put in order by a reranker; equal scores keep the order they were found in.

    Raises:
        ScoresError: a score is no finite number.
    """
    texts = {passage.id: passage.embedded for passage in candidates.questions.passages}
    pairs = [
        (question, texts[identifier])
        for question, ids in zip(candidates.questions.questions, candidates.candidates, strict=True)
        for identifier in ids
    ]
    given = score(pairs) if pairs else np.zeros(0, np.float32)
    if broken := int((~np.isfinite(given)).sum()):
        first = pairs[int(np.argmin(np.isfinite(given)))]
        raise ScoresError(
            f"重排模型给出的 {len(given)} 个分数中有 {broken} 个不是有限的数，例如问题 {first[0][:40]!r}；"
            "训练已经发散，请调小 learning_rate，或不用 precision=fp16",
            f"{broken} of the reranker's {len(given)} scores are no finite numbers, such as for {first[0][:40]!r}: the"
            " training diverged; lower learning_rate, or do without precision=fp16",
        )
    rankings, start = [], 0
    for ids in candidates.candidates:
        own = given[start : start + len(ids)]
        rankings.append([ids[place] for place in np.argsort(-own, kind="stable")])
        start += len(ids)
    return score_rankings(rankings, candidates.questions)
