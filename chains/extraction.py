"""The answer in the documents' own words: the few sentences or clauses of the passages that most likely hold it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from chains.analysis import fold
from chains.clause_scores import Column, answer_probabilities, read_question
from chains.clauses import LONGEST_CLAUSE, Clause, split_clauses

# All fitted on cmrc2018_train_substitute, see benchmarks/fit_extraction.py.
_AT_MOST = 1.5  # quotes together are never longer than this many times `max_chars` ...
_PRICE = 0.03  # ... and `max_chars` more of them must raise the probability of holding the answer by this much
_PRICE_OF_QUOTE = 0.005  # likewise one quote more
_WHOLE_SENTENCE = 0.5  # sentences up to this share of `max_chars` are not cut

_LOOSE_ENDS = "，、；：,;: \t\n\r\u3000"


@dataclass(frozen=True)
class Quote:
    """A piece of a passage: `passages[passage][start:end]`, with the probability that it holds the answer."""

    passage: int
    start: int
    end: int
    score: float


def select_quotes(
    question: str,
    passages: Sequence[str],
    *,
    headings: Sequence[str] | None = None,
    max_chars: int = 120,
    max_quotes: int = 3,
) -> list[Quote]:
    """The pieces of `passages` that most likely answer, the most likely first; together about `max_chars` characters.

    A quote is one or more whole sentences, or whole clauses where a sentence is long; rows of a table stay whole. What
    looks certain is quoted alone; where the answer may stand in several places, quotes take up to 1.5 times `max_chars`
    (more only if the shortest piece of a table is longer). Quotes do not overlap.

    Args:
        question: in any script; an empty one gets no quotes.
        passages: best first, as retrieval ranks them.
        headings: title or heading path of each passage: what its text takes for granted.
        max_chars: characters of all quotes together, on average over questions.
        max_quotes: at most so many quotes.
    """
    if not question.strip() or max_chars < 1 or max_quotes < 1:
        return []
    at_most = int(max_chars * _AT_MOST)
    clauses = [split_clauses(passage, longest=min(LONGEST_CLAUSE, at_most)) for passage in passages]
    probabilities = answer_probabilities(question, passages, headings or [""] * len(passages), clauses)
    pieces: list[Quote] = []
    for number, (passage, cut, chances) in enumerate(zip(passages, clauses, probabilities, strict=True)):
        pieces.extend(_pieces(number, passage, cut, chances, whole=int(max_chars * _WHOLE_SENTENCE)))
    return _choose(_without_repeats(pieces, passages), max_chars, at_most, max_quotes)


def coverage(question: str, passage: str, heading: str = "") -> float:
    """The share of the question's information that a passage and its heading mention, from 0.0 to 1.0.

    Counted in bits over Han pairs and words; 0.0 for a question that tells nothing.
    """
    told = read_question(question).pairs
    total = sum(told.values())
    text = fold(f"{heading}\n{passage}")
    return sum(bits for term, bits in told.items() if term in text) / total if total else 0.0


def _pieces(number: int, passage: str, clauses: Sequence[Clause], chances: Column, *, whole: int) -> Iterator[Quote]:
    """What may be quoted, in order: short sentences whole, longer ones by clauses; without loose commas at the end."""
    scored = zip(clauses, chances, strict=True)
    for _, group in itertools.groupby(scored, key=lambda pair: pair[0].sentence):
        sentence = [Quote(number, clause.start, clause.end, float(chance)) for clause, chance in group]
        if sentence[-1].end - sentence[0].start <= whole:
            sentence = [_joined(sentence)]
        for piece in sentence:
            end = piece.start + len(passage[piece.start : piece.end].rstrip(_LOOSE_ENDS))
            if end > piece.start:
                yield replace(piece, end=end)


def _without_repeats(pieces: Sequence[Quote], passages: Sequence[str]) -> list[Quote]:
    """Pieces, where one that stood before (chunks overlap) has given its probability to the first."""
    scores: dict[str, float] = {}
    texts = [passages[piece.passage][piece.start : piece.end] for piece in pieces]
    for text, piece in zip(texts, pieces, strict=True):
        scores[text] = scores.get(text, 0.0) + piece.score
    return [replace(piece, score=scores.pop(text, 0.0)) for text, piece in zip(texts, pieces, strict=True)]


def _choose(pieces: Sequence[Quote], max_chars: int, at_most: int, max_quotes: int) -> list[Quote]:
    """The runs of neighbouring pieces that are worth most, one after the other while they are worth their length."""
    price = _PRICE / max_chars
    chosen: list[Quote] = []
    free = list(pieces)
    room = at_most
    while free and len(chosen) < max_quotes:
        runs = [
            run
            for run in _runs(free, room)
            if chosen == [] or run.score - price * (run.end - run.start) > _PRICE_OF_QUOTE
        ]
        if not runs:
            break
        best = max(runs, key=lambda run: (run.score - price * (run.end - run.start), -run.passage, -run.start))
        chosen.append(best)
        room -= best.end - best.start
        free = [
            piece
            for piece in free
            if piece.passage != best.passage or piece.end <= best.start or piece.start >= best.end
        ]
    return chosen


def _runs(pieces: Sequence[Quote], room: int) -> Iterator[Quote]:
    for first in range(len(pieces)):
        score = 0.0
        for piece in pieces[first:]:
            score += piece.score
            if piece.passage != pieces[first].passage or piece.end - pieces[first].start > room:
                break
            yield Quote(piece.passage, pieces[first].start, piece.end, score)


def _joined(pieces: Sequence[Quote]) -> Quote:
    """One quote from the first piece to the last, with the probability of all."""
    return replace(pieces[0], end=pieces[-1].end, score=sum(piece.score for piece in pieces))
