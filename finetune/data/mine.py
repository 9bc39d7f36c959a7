"""Hard negatives: passages that an embedder ranks high for a query and that, as far as can be seen, do not answer it.

The guard by score is "positive-aware" mining: Moreira et al., "NV-Retriever" (2024), TopK-PercPos and TopK-MarginPos.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from langchain_core.embeddings import Embeddings
from pydantic import Field, model_validator

from chains.caches import beside
from chains.config import BgeRerankerConfig, EmbeddingsConfig, LexicalEmbeddingsConfig
from chains.embeddings import Vectors, fingerprint
from chains.retrieval_qa import build_embeddings
from finetune.data.candidates import Candidate, CandidateIndex
from finetune.data.duplicates import document_id, is_near, text_key
from finetune.data.jsonl import json_line
from finetune.data.outputs import refuse_existing
from finetune.data.questions import Passage, read_passages
from finetune.data.rows import RetrievalRow, read_retrieval_rows, write_rows
from loaders.config import Config
from loaders.errors import RagProjError

_TOLD_PER_ROW = 20  # refused candidates: a weak embedder ranks a hundred above the passage that answers
_SHOWN_CHARS = 100  # of a refused passage

Progress = Callable[[int, str], None]


class Reranker(Protocol):
    """What judges passages one by one, as `BgeReranker` does; a higher score answers better, on any scale."""

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """A score of each (query, passage), (n,)."""


class MiningConfig(Config):
    """Which passages become negatives."""

    embeddings: EmbeddingsConfig = Field(
        default_factory=LexicalEmbeddingsConfig, description="what ranks the passages; best the model to be trained"
    )
    first_rank: int = Field(default=2, ge=1, description="the best-ranked passage that may become a negative, from 1")
    last_rank: int = Field(default=100, ge=1, le=2000, description="the worst-ranked one; farther is easier")
    negatives: int = Field(default=8, ge=1, le=1000, description="of a row, those it has already included")
    keep: bool = Field(default=True, description="keep the negatives a row has already, mined ones behind them")
    choose: Literal["random", "hardest"] = Field(
        default="random", description="from the rank window, or the best-ranked of it"
    )
    relative_margin: float = Field(
        default=0.05, ge=0, lt=1, description="refuse scores above (1 - this) of the positive's; 0: only above it"
    )
    absolute_margin: float = Field(
        default=0.0, ge=0, le=2, description="refuse scores above the positive's minus this, as cosine"
    )
    reranker: BgeRerankerConfig | None = Field(default=None, description="a cross-encoder that checks too")
    reranker_margin: float = Field(
        default=0.0,
        ge=0,
        description="refuse where the reranker's score is not below the positive's minus this, logits",
    )
    keep_scores: bool = Field(
        default=False, description="write the reranker's logits into the rows, as the teacher of distillation"
    )
    exact_up_to: int = Field(
        default=100_000, ge=0, description="passages searched exactly; more of them through inverted lists"
    )
    seed: int = Field(default=0, description="of the choice from the window")

    @model_validator(mode="after")
    def _window_is_one(self) -> MiningConfig:
        if self.last_rank < self.first_rank:
            raise ValueError(f"last_rank {self.last_rank} is below first_rank {self.first_rank}")
        if self.keep_scores and self.reranker is None:
            raise ValueError("keep_scores needs a reranker / keep_scores 需要 reranker")
        return self


@dataclass(frozen=True)
class Rejection:
    """A passage of the window that did not become a negative, and why."""

    row: RetrievalRow
    candidate: Candidate
    positive_score: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the list of the rejected."""
        return {
            "file": self.row.file,
            "line": self.row.line,
            "query": self.row.query,
            "passage": self.candidate.passage.text[:_SHOWN_CHARS],
            "document": self.candidate.passage.document,
            "rank": self.candidate.rank,
            "score": round(self.candidate.score, 4),
            "positive_score": round(self.positive_score, 4),
            "reason": self.reason,
        }


def mine(
    rows: Sequence[Path],
    out: Path,
    config: MiningConfig | None = None,
    *,
    passages: Sequence[Path] = (),
    embeddings: Embeddings | None = None,
    reranker: Reranker | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, stage: None,
) -> dict[str, Any]:
    """The report; the rows with their negatives are in `out`, beside it `*.rejected.jsonl` and `*.report.json`.

    Args:
        rows: files of retrieval rows; all their passages are candidates.
        out: file of the new rows.
        config: which passages become negatives.
        passages: files of further candidates, JSONL of `{"id", "title", "text"}`.
        embeddings: in place of the configured one.
        reranker: in place of the configured one.
        overwrite: replace files that are there.
        progress: told what is done of the stage it names.

    Raises:
        UsageError: a file of the results is there already, and `overwrite` is not set.
        RagProjError: a file cannot be read or written, or rows are bad.
    """
    config = config or MiningConfig()
    rejected_file, report_file = out.with_suffix(".rejected.jsonl"), out.with_suffix(".report.json")
    refuse_existing([out, rejected_file, report_file], overwrite=overwrite)
    read = read_retrieval_rows(rows)
    embeddings = embeddings or build_embeddings(config.embeddings)
    miner = Miner(
        read,
        list(read_passages(passages).values()),
        embeddings,
        config,
        reranker=reranker or _configured_reranker(config),
        progress=progress,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with beside(out) as new_rows, beside(rejected_file) as new_rejected, beside(report_file) as new_report:
            with new_rejected.open("w", encoding="utf-8", newline="\n") as file:
                write_rows(new_rows, miner.mined(lambda rejection: file.write(json_line(rejection.as_dict()))))
            report = {"embedder": fingerprint(embeddings), **miner.report()}
            new_report.write_text(json_line(report), encoding="utf-8")
    except OSError as error:
        raise RagProjError(
            f"无法写入 {out}：{error.strerror or error}", f"cannot write {out}: {error.strerror or error}"
        ) from error
    return report


class Miner:
    """Finds negatives for rows among all their passages and further ones."""

    def __init__(
        self,
        rows: Sequence[RetrievalRow],
        passages: Sequence[Passage],
        embeddings: Embeddings,
        config: MiningConfig,
        *,
        reranker: Reranker | None = None,
        progress: Progress = lambda done, stage: None,
    ) -> None:
        self._rows = rows
        self._config = config
        self._reranker = reranker
        self._progress = progress
        pool: dict[int, Passage] = {}
        for passage in [*passages, *_passages_of(rows)]:
            pool.setdefault(text_key(passage.text), passage)
        self._positions = {key: position for position, key in enumerate(pool)}
        self._pool = list(pool.values())
        self._index = CandidateIndex(self._pool, embeddings, exact_up_to=config.exact_up_to, progress=progress)
        self._answers: dict[int, set[int]] = defaultdict(set)  # positives of all rows that ask the same, by position
        for row in rows:
            self._answers[text_key(row.query)].update(self._positions[text_key(text)] for text in row.pos)
        self._reasons: Counter[str] = Counter()
        self._mined = self._short = self._found = 0

    def mined(self, reject: Callable[[Rejection], object]) -> Iterator[RetrievalRow]:
        """The rows in order with their negatives; candidates that were refused are told to `reject`.

        A candidate that is not needed, since a row has negatives enough, is not looked at. Of a row twenty refused ones
        are told; all are counted.
        """

        told: Counter[int] = Counter()

        def refused(rejection: Rejection) -> None:
            self._reasons[rejection.reason] += 1
            told[number] += 1
            if told[number] <= _TOLD_PER_ROW:
                reject(rejection)

        found = self._index.search([row.query for row in self._rows], self._config.last_rank)
        for number, (row, (vector, candidates)) in enumerate(zip(self._rows, found, strict=True), 1):
            answers = sorted(self._answers[text_key(row.query)])
            self._found += any(candidate.position in answers for candidate in candidates)
            kept = row.neg if self._config.keep else ()
            guard = Guard(
                self._config,
                row,
                answers=[self._pool[position] for position in answers],
                taken={self._positions[text_key(text)] for text in (*row.pos, *kept)},
                positive_score=float(self._index.scores(vector, answers).min()),
                reranker=self._reranker,
                reject=refused,
            )
            chosen = self._choose(guard, candidates, max(0, self._config.negatives - len(kept)))
            yield self._with_negatives(row, kept, chosen)
            self._progress(number, "mine")

    def report(self) -> dict[str, Any]:
        """Figures of what was mined; `positives_found` is the share of rows with a positive up to the last rank."""
        return {
            "rows": len(self._rows),
            "passages": len(self._pool),
            "mined": self._mined,
            "rows_with_fewer": self._short,
            "positives_found": round(self._found / len(self._rows), 4),
            "rejected": dict(sorted(self._reasons.items())),
            "config": self._config.model_dump(mode="json", by_alias=True),
        }

    def _choose(self, guard: Guard, candidates: Sequence[Candidate], wanted: int) -> list[Candidate]:
        """As many candidates of the rank window as are wanted and pass the guard."""
        window = [one for one in candidates[self._config.first_rank - 1 :] if one.position not in guard.taken]
        if self._config.choose == "random":
            draw = random.Random(f"{self._config.seed}:{guard.row.query}")  # noqa: S311 sampling, not secrets
            draw.shuffle(window)
        remaining = iter(window)
        chosen: list[Candidate] = []
        while len(chosen) < wanted:
            # as many at a time as are missing, so that a reranker scores little that is not needed
            passing = filter(guard.allows, remaining)
            passed = list(itertools.islice(passing, wanted - len(chosen)))
            if not passed:
                break
            chosen += guard.reranked(passed)
        self._mined += len(chosen)
        self._short += len(chosen) < wanted
        return sorted(chosen, key=lambda candidate: candidate.rank)

    def _with_negatives(self, row: RetrievalRow, kept: Sequence[str], chosen: Sequence[Candidate]) -> RetrievalRow:
        texts = [*kept, *(candidate.passage.text for candidate in chosen)]
        mined = replace(
            row,
            neg=tuple(texts),
            pos_docs=tuple(self._document(text) for text in row.pos),
            neg_docs=tuple(self._document(text) for text in texts),
            pos_scores=None,
            neg_scores=None,
        )
        if not self._config.keep_scores or self._reranker is None:
            return mined
        scores = [float(score) for score in self._reranker.logits([(row.query, text) for text in (*row.pos, *texts)])]
        return replace(mined, pos_scores=tuple(scores[: len(row.pos)]), neg_scores=tuple(scores[len(row.pos) :]))

    def _document(self, text: str) -> str:
        return self._pool[self._positions[text_key(text)]].document


@dataclass(frozen=True)
class Guard:
    """What keeps passages that may answer a row's query from becoming its negatives."""

    config: MiningConfig
    row: RetrievalRow
    answers: Sequence[Passage]
    """positives of all rows with the same query"""
    taken: set[int]
    """places in the pool of the row's own positives and of the negatives it keeps"""
    positive_score: float
    """cosine of the worst positive"""
    reranker: Reranker | None
    reject: Callable[[Rejection], object]

    def allows(self, candidate: Candidate) -> bool:
        """Whether nothing that costs no model speaks against a candidate; a refusal is reported."""
        reason = self._reason(candidate)
        if reason:
            self.reject(Rejection(self.row, candidate, self.positive_score, reason))
        return reason is None

    def reranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that a reranker, where there is one, scores below the worst positive; refusals are reported."""
        if self.reranker is None:
            return list(candidates)
        texts = [passage.text for passage in self.answers]
        texts += [candidate.passage.text for candidate in candidates]
        scores = self.reranker.logits([(self.row.query, text) for text in texts])
        limit = scores[: len(self.answers)].min() - self.config.reranker_margin
        allowed: list[Candidate] = []
        for candidate, score in zip(candidates, scores[len(self.answers) :], strict=True):
            if score < limit:
                allowed.append(candidate)
            else:
                self.reject(Rejection(self.row, candidate, self.positive_score, "reranker"))
        return allowed

    def _reason(self, candidate: Candidate) -> str | None:
        passage, config = candidate.passage, self.config
        if any(passage is answer for answer in self.answers):
            return "answers_the_same_query"
        if any(passage.document == answer.document for answer in self.answers):
            return "same_document"
        if candidate.score > self.positive_score - config.relative_margin * abs(self.positive_score):
            return "relative_margin"
        if candidate.score > self.positive_score - config.absolute_margin:
            return "absolute_margin"
        # last, since it costs most
        return "near_text" if any(is_near(passage.text, answer.text) for answer in self.answers) else None


def _passages_of(rows: Sequence[RetrievalRow]) -> Iterator[Passage]:
    """The passages of rows, those whose document is named first; a passage without one is its own document."""
    named: list[Passage] = []
    others: list[Passage] = []
    for row in rows:
        for texts, documents in ((row.pos, row.pos_docs), (row.neg, row.neg_docs)):
            for number, text in enumerate(texts):
                document = documents[number] if documents else document_id(text)
                (named if documents else others).append(Passage(document, text, document))
    return itertools.chain(named, others)


def _configured_reranker(config: MiningConfig) -> Reranker | None:
    if config.reranker is None:
        return None
    from chains.bge.reranker import BgeReranker

    return BgeReranker(**config.reranker.model_dump(exclude={"type"}))
