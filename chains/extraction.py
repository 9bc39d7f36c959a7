"""The answer in the documents' own words: the few sentences or clauses of the passages that most likely hold it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from chains.analysis import fold, is_cjk
from chains.clause_scores import Question, answer_probabilities, find_term, read_question
from chains.clauses import LONGEST_CLAUSE, Clause, split_clauses

# All fitted on cmrc2018_train_substitute, see benchmarks/fit_extraction.py.
_AT_MOST = 1.5  # quotes together are never longer than this many times `max_chars` ...
_PRICE = 0.06  # ... and `max_chars` more of them must raise the probability of holding the answer by this much
_PRICE_OF_QUOTE = 0.005  # likewise one quote more
_WHOLE_SENTENCE = 0.75  # sentences up to this share of `max_chars` are not cut

_PAIR_GAINS = 0.2  # of a statement's information, what a second sentence must add to be quoted with the first
_LARGEST_GAP = 4  # characters between neighbouring pieces: a loose comma, white space between lines
# Headings, code fences, rules and the line under a table's header tell nothing by themselves.
_HEADING = re.compile(r"#{1,6}\s")
_NOT_QUOTED = re.compile(rf"{_HEADING.pattern}|```|~~~|-{{3,}}$|\|[\s|:-]+\|$", re.MULTILINE)
_WORDS = re.compile(r"[^\W\d_]{2}")  # two letters or Han characters in a row; a bare number tells nothing
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
    quotable = [_quotable(passage, cut) for passage, cut in zip(passages, clauses, strict=True)]
    probabilities = answer_probabilities(
        question,
        passages,
        headings or [""] * len(passages),
        clauses,
        above=[_headings_within(passage, cut) for passage, cut in zip(passages, clauses, strict=True)],
        quotable=quotable,
    )
    pieces: list[Quote] = []
    for number, (passage, cut, allowed, chances) in enumerate(
        zip(passages, clauses, quotable, probabilities, strict=True)
    ):
        kept = itertools.compress(zip(cut, chances, strict=True), allowed)
        pieces.extend(_pieces(number, passage, kept, whole=int(max_chars * _WHOLE_SENTENCE)))
    return _choose(_without_repeats(pieces, passages), max_chars, at_most, max_quotes)


def find_support(statement: str, passage: str) -> Quote | None:
    """The sentence of `passage` that covers most of a statement, with the next one if both cover clearly more.

    Its score is the coverage, from 0.0 to 1.0. None where no sentence shares anything with the statement.
    """
    sentences = [
        Quote(0, group[0].start, group[-1].end, 0.0)
        for group in (list(g) for _, g in itertools.groupby(split_clauses(passage), key=lambda c: c.sentence))
        if not _NOT_QUOTED.match(passage, group[0].start)
    ]
    asked, folded = read_question(statement), fold(passage)

    def covering(quotes: Sequence[Quote]) -> Quote | None:
        scored = (replace(quote, score=_covered(asked, folded[quote.start : quote.end])) for quote in quotes)
        return max(scored, key=lambda quote: quote.score, default=None)

    best = covering(sentences)
    if best is None or best.score > 1 - _PAIR_GAINS:  # no pair can cover that much more
        return best
    longer = covering([_joined(pair) for pair in itertools.pairwise(sentences)])
    if longer is not None and longer.score >= best.score + _PAIR_GAINS:
        best = longer
    return best if best.score > 0 else None


def coverage(question: str, passage: str, heading: str = "") -> float:
    """The share of the question's information that a passage and its heading mention, from 0.0 to 1.0.

    Two thirds of it is counted over Han pairs and words, one third over single Han characters, which a rephrased
    question still shares with its passage; both in bits. 0.0 for a question that tells nothing.
    """
    return _weighted(*shares_mentioned(question, passage, heading))


def _weighted(pairs: float, characters: float) -> float:
    return (2 * pairs + characters) / 3


def shares_mentioned(question: str, passage: str, heading: str = "") -> tuple[float, float]:
    """The shares of the question's information that a passage and its heading mention: in pairs, in single characters.

    Each from 0.0 to 1.0. A question without Han has no single characters: the share of its words stands for both.
    """
    return _shares(read_question(question), fold(f"{heading}\n{passage}"))


def _shares(asked: Question, folded: str) -> tuple[float, float]:
    pairs = share_found(asked.pairs, folded)
    return pairs, share_found(asked.characters, folded) if asked.characters else pairs


def _covered(asked: Question, folded: str) -> float:
    return _weighted(*_shares(asked, folded))


def share_found(bits: Mapping[str, float], folded: str) -> float:
    """The share of the terms' bits whose terms folded text contains; 0.0 without any."""
    total = sum(bits.values())
    # `mentions`, most of whose calls end at its first condition
    found = [value for term, value in bits.items() if term in folded and mentions(folded, term)]
    return sum(found) / total if total else 0.0


def mentions(folded: str, term: str) -> bool:
    """Whether folded text contains a term; a word of Latin letters and digits only where it stands by itself."""
    return term in folded and (is_cjk(term[0]) or bool(find_term(term, folded)))


def _quotable(passage: str, clauses: Sequence[Clause]) -> list[bool]:
    """Which clauses may be quoted: not those of a heading, which would take all probability from what is below it."""
    refused = _sentences_like(_NOT_QUOTED, passage, clauses)
    return [clause.sentence not in refused for clause in clauses]


def _headings_within(passage: str, clauses: Sequence[Clause]) -> str:
    """The Markdown headings in a passage, which say what the text below them takes for granted."""
    lines = _sentences_like(_HEADING, passage, clauses)
    return " ".join(passage[clause.start : clause.end] for clause in clauses if clause.sentence in lines)


def _sentences_like(pattern: re.Pattern[str], passage: str, clauses: Sequence[Clause]) -> set[int]:
    """The sentences that begin as a pattern says."""
    firsts = (next(group) for _, group in itertools.groupby(clauses, key=lambda clause: clause.sentence))
    return {clause.sentence for clause in firsts if pattern.match(passage, clause.start)}


def _pieces(number: int, passage: str, scored: Iterable[tuple[Clause, float]], *, whole: int) -> Iterator[Quote]:
    """What may be quoted, in order: short sentences whole, longer ones by clauses; without loose commas at the end.

    A Markdown heading is not among the scored clauses, and so ends a run: what stands under it is another matter.
    """
    worded = _WORDS.search(passage) is not None
    for _, group in itertools.groupby(scored, key=lambda pair: pair[0].sentence):
        sentence = [Quote(number, clause.start, clause.end, float(chance)) for clause, chance in group]
        if sentence[-1].end - sentence[0].start <= whole:
            sentence = [_joined(sentence)]
        for piece in sentence:
            if worded and not _WORDS.search(passage, piece.start, piece.end):
                continue
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
    """The runs of neighbouring pieces worth most, one by one, while there is room and they pay for their length."""
    price = _PRICE / max_chars

    def worth(run: Quote) -> float:
        return run.score - price * (run.end - run.start) - _PRICE_OF_QUOTE

    chosen: list[Quote] = []
    free = list(pieces)
    while len(chosen) < max_quotes:
        taken = sum(quote.end - quote.start + _LARGEST_GAP for quote in chosen)  # joining may close gaps
        runs = list(_runs(free, at_most - taken))
        if not chosen:
            runs = runs or free  # rows of a table, all longer than `at_most`
        best = max(runs, key=worth, default=None)
        if best is None or (chosen and worth(best) <= 0):
            break
        chosen.append(best)
        free = [piece for piece in free if not _overlap(piece, best)]
    return sorted(_touching_joined(chosen), key=lambda quote: -quote.score)


def _runs(pieces: Sequence[Quote], room: int) -> Iterator[Quote]:
    """Every run of neighbours within a passage that is at most `room` characters long, in order."""
    for first, head in enumerate(pieces):
        score, reached = 0.0, head.start
        for piece in itertools.islice(pieces, first, None):
            if piece.passage != head.passage or piece.start - reached > _LARGEST_GAP or piece.end - head.start > room:
                break
            score, reached = score + piece.score, piece.end
            yield replace(head, end=piece.end, score=score)


def _overlap(one: Quote, other: Quote) -> bool:
    return one.passage == other.passage and one.start < other.end and other.start < one.end


def _touching_joined(quotes: Sequence[Quote]) -> Iterator[Quote]:
    """Quotes in order of place, those next to each other as one."""
    waiting: list[Quote] = []
    for quote in sorted(quotes, key=lambda quote: (quote.passage, quote.start)):
        if waiting and (waiting[-1].passage != quote.passage or quote.start - waiting[-1].end > _LARGEST_GAP):
            yield _joined(waiting)
            waiting = []
        waiting.append(quote)
    if waiting:
        yield _joined(waiting)


def _joined(pieces: Sequence[Quote]) -> Quote:
    """One quote from the first piece to the last, with the probability of all."""
    return replace(pieces[0], end=pieces[-1].end, score=sum(piece.score for piece in pieces))
