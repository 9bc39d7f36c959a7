"""Which rows, passages and token ids make up a step.

All of it is a function of seed, epoch and row alone, so that a resumed run draws what an unbroken one draws.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.data.rows import RetrievalRow
from finetune.order import seeded

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sample:
    """A row as it stands in one batch."""

    row: RetrievalRow
    query: str
    """with its instruction, as the encoder sees it"""
    passages: tuple[str, ...]
    """`group_size` of them, the positive first"""
    documents: tuple[str | None, ...]
    """the document each passage is from, where the row says so"""
    teacher: tuple[float, ...] | None
    """scores of the passages by a reranker"""


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of the texts of a batch, each distinct text once, and where queries and passages stand among them."""

    texts: list[list[int]]
    queries: list[int]
    """index into `texts`, one a sample"""
    passages: list[int]
    """index into `texts`, `group_size` a sample"""

    @property
    def tokens(self) -> int:
        """Token ids that are encoded, without padding."""
        return sum(map(len, self.texts))


def steps_per_epoch(rows: int, *, batch_size: int, processes: int) -> int:
    """Batches of an epoch. The last may be smaller; rows that do not fill all processes evenly sit the epoch out."""
    return rows // batch_size + int(rows % batch_size >= processes)


def batch_rows(order: Sequence[int], step: int, *, batch_size: int, processes: int) -> Sequence[int]:
    """The row numbers of a step within its epoch: a multiple of `processes`, the same on all of them."""
    rows = order[step * batch_size : (step + 1) * batch_size]
    return rows[: len(rows) - len(rows) % processes]


def sample_row(
    row: RetrievalRow, *, number: int, group_size: int, instruction: str, distillation: bool, seed: int, epoch: int
) -> Sample:
    """One positive and `group_size` - 1 negatives of a row, drawn as FlagEmbedding draws them.

    A row with fewer negatives repeats them as evenly as possible. A `prompt` of the row's own takes the place of the
    instruction.
    """
    draw = random.Random(seeded(seed, epoch, number))  # noqa: S311 a sample, no secret
    positive = draw.randrange(len(row.pos))
    wanted = group_size - 1
    copies = -(-wanted // len(row.neg)) if wanted else 1
    negatives = draw.sample(list(range(len(row.neg))) * copies, wanted)
    scored = distillation and row.pos_scores is not None and row.neg_scores is not None
    return Sample(
        row=row,
        query=(instruction if row.prompt is None else row.prompt) + row.query,
        passages=(row.pos[positive], *(row.neg[index] for index in negatives)),
        documents=(_document(row.pos_docs, positive), *(_document(row.neg_docs, index) for index in negatives)),
        teacher=(row.pos_scores[positive], *(row.neg_scores[index] for index in negatives))
        if scored and row.pos_scores is not None and row.neg_scores is not None
        else None,
    )


def _document(documents: tuple[str, ...] | None, index: int) -> str | None:
    return documents[index] if documents else None


def false_negatives(samples: Sequence[Sample], *, texts: bool = True, documents: bool = True) -> Mask:
    """Which passages must not count as negatives of which query, (samples, samples x group_size).

    With `texts`: a passage with the text of any positive of the query, of the same query in another row included (a
    text may be a positive in one row and a sampled negative in another). With `documents`: another row's passage from a
    document that a positive of the query is from. What a row itself lists as a negative stays one, unless it is a
    positive's text. The target of each query is never masked.
    """
    group = len(samples[0].passages)
    by_text: dict[str, list[int]] = defaultdict(list)
    by_document: dict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        for offset, (text, document) in enumerate(zip(sample.passages, sample.documents, strict=True)):
            by_text[text].append(number * group + offset)
            if document is not None:
                by_document[document].append(number * group + offset)
    positives: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        positives[sample.query].update(sample.row.pos)
    mask = np.zeros((len(samples), len(samples) * group), np.bool_)
    for number, sample in enumerate(samples):
        if documents:
            for document in {*(sample.row.pos_docs or ()), sample.documents[0]} - {None}:
                mask[number, by_document[str(document)]] = True
            mask[number, number * group : (number + 1) * group] = False
        if texts:
            for text in positives[sample.query]:
                mask[number, by_text.get(text, [])] = True
        mask[number, number * group] = False
    return mask


def token_batch(queries: Sequence[list[int]], passages: Sequence[list[int]]) -> TokenBatch:
    """The distinct texts of a batch by their token ids; a passage that several rows share is encoded once."""
    places: dict[tuple[int, ...], int] = {}

    def place(ids: list[int]) -> int:
        return places.setdefault(tuple(ids), len(places))

    query_places = [place(ids) for ids in queries]
    passage_places = [place(ids) for ids in passages]
    return TokenBatch([list(ids) for ids in places], query_places, passage_places)
