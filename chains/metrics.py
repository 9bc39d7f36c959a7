"""How good a ranking or an answer is: plain functions over ids and strings, one question at a time.

A figure for a question set is the mean over its questions; `bootstrap_interval` says how far to trust it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from chains.analysis import fold, is_cjk

# Signs that the CMRC 2018 evaluation script removes although Unicode calls them symbols, not punctuation.
_DROPPED_SYMBOLS = frozenset("^~`+=")
# Values drawn at a time while resampling: 32 MB of indices.
_DRAWS_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """A mean and the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


class RefusalScores(NamedTuple):
    """Of the refused questions, the share without an answer; of those without an answer, the share refused."""

    precision: float
    recall: float


# --- rankings ---------------------------------------------------------------------------------------------------


def recall_at_k(ranked: Sequence[str], gold: Sequence[str], k: int) -> float:
    """1.0 if any gold id is among the first `k` ranked ones, else 0.0.

    The "top-k retrieval accuracy" of Karpukhin et al. 2020 (DPR): one passage that answers is enough. With a single
    gold id it is recall. An id ranked twice (two chunks of a document) takes only its first place.
    """
    return float(any(identifier in set(gold) for identifier in _first_places(ranked)[:k]))


def mrr_at_k(ranked: Sequence[str], gold: Sequence[str], k: int) -> float:
    """1 / rank of the first gold id, 0.0 when none is among the first `k` (Voorhees 1999, TREC-8)."""
    wanted = set(gold)
    for rank, identifier in enumerate(_first_places(ranked)[:k], start=1):
        if identifier in wanted:
            return 1.0 / rank
    return 0.0


def ndcg_at_k(ranked: Sequence[str], gold: Sequence[str], k: int) -> float:
    """Discounted gain of the gold ids among the first `k`, over the best possible (Järvelin & Kekäläinen 2002).

    Gains are 0 or 1 and the discount is 1 / log2(rank + 1). 0.0 without gold ids.
    """
    wanted = set(gold)
    discounts = [1.0 / math.log2(rank + 1) for rank in range(1, k + 1)]
    gain = sum(
        discount for identifier, discount in zip(_first_places(ranked), discounts, strict=False) if identifier in wanted
    )
    ideal = sum(discounts[: len(wanted)])
    return gain / ideal if ideal else 0.0


def _first_places(ranked: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(ranked))


# --- answers ----------------------------------------------------------------------------------------------------


def normalise_answer(text: str) -> str:
    """`text` folded, without punctuation and white space, as the CMRC 2018 evaluation script compares answers.

    That script lists its punctuation; here it is every character Unicode calls punctuation, so that no sign is missed.
    """
    return "".join(character for character in fold(text) if not _is_dropped(character))


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """1.0 if the normalised answer equals a normalised gold answer, else 0.0."""
    return _best(lambda wanted, given: float(wanted == given), answer, gold)


def contains_gold(answer: str, gold: Sequence[str]) -> float:
    """1.0 if the normalised answer contains a normalised gold answer, else 0.0."""
    return _best(lambda wanted, given: float(wanted in given), answer, gold)


def char_f1(answer: str, gold: Sequence[str]) -> float:
    """Best F1 of the longest common run over the gold answers, as in the CMRC 2018 evaluation script (Cui et al. 2019).

    Counted in characters for Chinese and in words for Latin letters and digits ("4分钟" is three units); the common run
    is contiguous, which is how that script does it.
    """
    return _best(lambda wanted, given: _f1_over_units(_units(wanted), _units(given)), answer, gold, normalised=False)


def rouge_l(answer: str, gold: Sequence[str]) -> float:
    """Best F1 of the longest common subsequence of characters over the gold answers (ROUGE-L, Lin 2004, beta 1)."""
    return _best(lambda wanted, given: _f1(_common_subsequence(wanted, given), len(wanted), len(given)), answer, gold)


def _best(score: Callable[[str, str], float], answer: str, gold: Sequence[str], *, normalised: bool = True) -> float:
    """The highest `score(gold answer, answer)`; a gold answer of punctuation alone can match nothing: 0.0."""
    given = normalise_answer(answer)
    wanted = [(text, normalise_answer(text)) for text in gold]
    if normalised:
        return max((score(text, given) for _, text in wanted if text), default=0.0)
    return max((score(raw, answer) for raw, text in wanted if text), default=0.0)


def _is_dropped(character: str) -> bool:
    """Punctuation (P), separators (Z) and control characters (C)."""
    return unicodedata.category(character)[0] in "PZC" or character in _DROPPED_SYMBOLS


def _units(text: str) -> list[str]:
    """Han characters one by one, other letters and digits in words (the script's `mixed_segmentation`)."""
    units: list[str] = []
    in_word = False
    for character in fold(text):
        dropped, han = _is_dropped(character), is_cjk(character)
        if in_word and not dropped and not han:
            units[-1] += character
        elif not dropped:
            units.append(character)
        in_word = not dropped and not han
    return units


def _f1_over_units(wanted: list[str], given: list[str]) -> float:
    return _f1(_common_run(wanted, given), len(wanted), len(given))


def _f1(common: int, wanted: int, given: int) -> float:
    """2PR / (P + R) with P = common / given and R = common / wanted."""
    return 2.0 * common / (wanted + given) if common else 0.0


def _common_run(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest contiguous run both share, in O(len(left) x len(right))."""
    longest = 0
    row = [0] * (len(right) + 1)
    for item in left:
        row = [0] + [row[j] + 1 if item == other else 0 for j, other in enumerate(right)]
        longest = max(longest, *row)
    return longest


def _common_subsequence(left: str, right: str) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): a bit per character of `left`."""
    places: dict[str, int] = {}
    for index, character in enumerate(left):
        places[character] = places.get(character, 0) | 1 << index
    everything = (1 << len(left)) - 1
    unmatched = everything
    for character in right:
        matches = unmatched & places.get(character, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & everything
    return len(left) - unmatched.bit_count()


# --- question sets ----------------------------------------------------------------------------------------------


def refusal_scores(refused: Sequence[bool], answerable: Sequence[bool]) -> RefusalScores:
    """Precision and recall of refusing, over questions of which it is known whether the documents answer them.

    Refusing nothing has precision 1.0, and where everything is answerable recall is 1.0: no mistake of that kind.

    Raises:
        ValueError: the two differ in length.
    """
    pairs = list(zip(refused, answerable, strict=True))
    right = sum(said_no and not known for said_no, known in pairs)
    said = sum(said_no for said_no, _ in pairs)
    unanswerable = sum(not known for _, known in pairs)
    return RefusalScores(right / said if said else 1.0, right / unanswerable if unanswerable else 1.0)


def bootstrap_interval(values: Sequence[float], *, seed: int, rounds: int = 10_000, level: float = 0.95) -> Interval:
    """Mean of `values` (one per question) with its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    The same seed gives the same interval. Without values all three are NaN.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    random = np.random.default_rng(seed)
    means = np.empty(rounds)
    step = max(1, _DRAWS_AT_ONCE // sample.size)
    for start in range(0, rounds, step):
        drawn = random.integers(0, sample.size, size=(min(step, rounds - start), sample.size))
        means[start : start + step] = sample[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, seed: int, rounds: int = 10_000, level: float = 0.95
) -> Interval:
    """Mean gain `after - before` per question with its bootstrap interval: the same questions drawn for both.

    Raises:
        ValueError: the two differ in length, so they are not the same questions.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    return bootstrap_interval(gains, seed=seed, rounds=rounds, level=level)
