"""Rankings put together: pure functions over (chunk id, score) lists, best first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from chains.embeddings import Vectors

Ranking = list[tuple[int, float]]

# Reciprocal rank fusion's constant, Cormack, Clarke & Buettcher 2009.
_RRF = 60


def fuse_ranks(rankings: Sequence[Iterable[tuple[int, float]]], weights: Sequence[float]) -> Ranking:
    """Rankings fused by weighted reciprocal rank, best first, ties by id.

    Score of an id: sum over rankings of weight / (60 + rank), ranks from 1 (Cormack, Clarke & Buettcher, SIGIR 2009).
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, (chunk, _) in enumerate(ranking, 1):
            scores[chunk] = scores.get(chunk, 0.0) + weight / (_RRF + rank)
    return in_order(scores)


def fuse_scores(
    rankings: Sequence[Sequence[tuple[int, float]]], weights: Sequence[float], *, cut: int | None = None
) -> Ranking:
    """Rankings fused by weighted score, each ranking's scores divided by its best one; best first, ties by id.

    Keeps what ranks throw away: by how much the first hit leads. A ranking without a positive score adds nothing.

    Args:
        rankings: best first.
        weights: one for each ranking.
        cut: rankings this long were cut there: what is missing from one may be nearly as good as its last, and counts
            as that. From a shorter one it is missing because it does not match at all, and counts 0.
    """
    scored = itemgetter(1)
    telling = [(r, weight) for r, weight in zip(rankings, weights, strict=True) if r and max(map(scored, r)) > 0]
    scores = dict.fromkeys([chunk for ranking, _ in telling for chunk, _ in ranking], 0.0)
    for ranking, weight in telling:
        best = max(map(scored, ranking))
        last = max(ranking[-1][1], 0.0) if cut is not None and len(ranking) >= cut else 0.0
        shares, missing = {chunk: weight * score / best for chunk, score in ranking}, weight * last / best
        scores = {chunk: score + shares.get(chunk, missing) for chunk, score in scores.items()}
    return in_order(scores)


def above_last(ranking: Ranking) -> Ranking:
    """A ranking with its scores counted from its last one, so that only what stands out of it weighs.

    Cosines of trained embedders lie close together (those of BGE between .6 and 1), and how close differs.
    """
    return [(chunk, score - ranking[-1][1]) for chunk, score in ranking] if len(ranking) > 1 else ranking


def with_support(ranking: Ranking, documents: Mapping[int, int], decay: float) -> Ranking:
    """Scores raised by those of the other chunks of the same document: `decay` of the best one, its square of the next.

    A document that several chunks speak for is more likely to be the one meant; the sum stays bounded however long
    the document is. Chunks without a document (removed meanwhile) are dropped. Best first, ties by id.
    """
    by_document: dict[int, list[float]] = {}
    for chunk, score in ranking:
        if chunk in documents:
            by_document.setdefault(documents[chunk], []).append(score)
    raised = {}
    for chunk, score in ranking:
        if chunk in documents:
            raised[chunk] = score
            others = by_document[documents[chunk]]
            if len(others) > 1:  # mostly a document has one hit
                others = others.copy()
                others.remove(score)
                others.sort(reverse=True)
                raised[chunk] += sum(other * decay**place for place, other in enumerate(others, 1))
    return in_order(raised)


def diversify(ranking: Ranking, vectors: Mapping[int, Vectors], relevance_weight: float, k: int) -> Ranking:
    """The k chunks chosen one by one to be good and unlike those chosen before, in the order of choice.

    Maximal marginal relevance (Carbonell & Goldstein 1998): weight x score / best score - (1 - weight) x the highest
    cosine to a chosen one. A chunk without a vector is like no other.
    """
    best = max((score for _, score in ranking), default=0.0)
    left, chosen = list(ranking), Ranking()
    likeness = dict.fromkeys((chunk for chunk, _ in ranking), 0.0)
    while left and len(chosen) < k:
        gains = [
            relevance_weight * (score / best if best > 0 else 0.0) - (1 - relevance_weight) * likeness[chunk]
            for chunk, score in left
        ]
        newest = left.pop(gains.index(max(gains)))
        chosen.append(newest)
        if newest[0] in vectors:
            for chunk, _ in left:
                if chunk in vectors:
                    cosine = float(vectors[chunk] @ vectors[newest[0]])
                    likeness[chunk] = max(likeness[chunk], cosine)
    return chosen


def in_order(scores: Mapping[int, float]) -> Ranking:
    """Best first, ties by id."""
    return sorted(sorted(scores.items()), key=itemgetter(1), reverse=True)  # stable: equal ones stay by id
