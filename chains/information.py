"""How much a character or term tells: bits, from a shipped table of how common it is in Chinese text.

A term that stands in one of 2^b passages of about 256 characters carries b bits. The table (`data/information.tsv`,
made by `benchmarks/information_table.py`) lists what is common in encyclopedia, web, medical and legal passages; rarer
terms are estimated from their parts and bounded by `MAX_BITS`. Passages hardly contain question words, so those have a
list of their own: they say what is wanted, not where it stands.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from chains.analysis import fold, is_cjk

MAX_BITS = 13.0  # the table's sample cannot tell rarer terms apart
UNLISTED_BIGRAM_BITS = 9.75  # the table lists every pair more common than this
QUESTION_BITS = 0.1  # near zero, and not zero: a question of nothing else still has a direction
_BEYOND = 0x10000  # one place for all code points from here on: too rare to be listed
OTHER, HAN, WORD, SPACE = range(4)  # classes of characters

# folded; a phrase counts as a whole wherever it stands
_QUESTION_WORDS = """
什么 为什么 是什么 有什么 什么样 什么时候 什么时间 什么地方
哪 哪些 哪个 哪几个 哪位 哪种 哪里 哪儿 哪一 哪年 哪一年 哪天 哪家 哪国
如何 怎么 怎么样 怎么办 怎么做 怎样 多少 多大 多久 多长 多高 多远 多长时间
几个 几年 几种 几次 几位 几天 几岁 几名 几月 几号
谁 何时 何地 何处 何人 何种 何年 何事 何物 为何 有何 吗 呢 嘛 咋 咋办 咋样 啥 为啥
是否 是不是 有没有 能不能 可不可以 会不会 要不要 好不好 请问 请教 求助 想问 告诉我
"""
# Chinese passages hardly contain these either, and in English ones they are everywhere
_ENGLISH_WORDS = """
what which who whom whose when where why how
a an the of in on at to by for from with and or is are was were be do does did can it its this that
"""
QUESTION_WORDS = frozenset(_QUESTION_WORDS.split()) | frozenset(_ENGLISH_WORDS.split())
# ordinary words that hold one of those, or lend it their end: 很多|大学 does not ask 多大
_ORDINARY_WORDS = ("哪吒", "许多", "很多", "众多", "诸多", "最多", "更多", "任何")
# in the pieces of a question word only these mark a question: 没有 of 有没有 is an ordinary term
_MARKING = frozenset("什么哪谁怎吗呢咋啥")


@dataclass(frozen=True)
class _Table:
    """Bits of what is common. `characters` is indexed by code point, `pairs` is sorted and `pair_bits` goes with it."""

    characters: NDArray[np.float32]
    pairs: NDArray[np.uint64]
    pair_bits: NDArray[np.float32]
    words: dict[str, float]
    digest: str


@functools.lru_cache(maxsize=1 << 16)
def information(term: str) -> float:
    """Bits of a folded term: a character, a longer Han run, a Latin word or a number; 0 for an empty term."""
    if not term:
        return 0.0
    if term in _question_terms():
        return QUESTION_BITS
    if not is_cjk(term[0]):
        return table().words.get(term, MAX_BITS)
    codes = code_points(term)
    if len(term) == 1:
        return float(character_bits(codes)[0])
    # a chain of pairs that overlap in one character each
    chained = pair_bits(codes[:-1], codes[1:]).sum() - character_bits(codes[1:-1]).sum()
    return float(min(max(chained, QUESTION_BITS), MAX_BITS))


def char_bits(text: str) -> NDArray[np.float32]:
    """Bits per character of `text`, shape (len(text),), folded first; a sum over a run is about the run's information.

    A Han character counts what it adds to its neighbours (the mean of left and right); a word's bits are shared by its
    letters; question words are near zero, punctuation and spaces zero.
    """
    folded = fold(text)
    codes = code_points(folded)
    bits = np.zeros(len(codes), dtype=np.float32)
    classes = character_classes(codes)
    bounds = [0, *(np.flatnonzero(np.diff(classes)) + 1).tolist(), len(codes)]
    for start, end in pairwise(bounds):
        if start < end and classes[start] == HAN:
            bits[start:end] = _run_bits(codes[start:end])
        elif start < end and classes[start] == WORD:
            bits[start:end] = information(folded[start:end]) / (end - start)
    return np.where(question_mask(folded), np.minimum(bits, np.float32(QUESTION_BITS)), bits)


def question_mask(folded: str) -> NDArray[np.bool_]:
    """Which characters of folded text belong to a question word (or an English function word), shape (len(folded),)."""
    mask = np.zeros(len(folded), dtype=np.bool_)
    for found in _question_pattern().finditer(folded):
        if found.lastgroup == "asking":
            mask[found.start() : found.end()] = True
    return mask


def code_points(text: str) -> NDArray[np.uint32]:
    """The code points of `text`, shape (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32, copy=False)


def character_classes(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """For each code point `HAN` (also kana, hangul), `WORD` (letters, digits of other scripts), `SPACE` or `OTHER`."""
    return _classes()[np.minimum(codes, _BEYOND)]


def character_bits(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Bits of single characters given by code point, any shape."""
    return table().characters[np.minimum(codes, _BEYOND)]


def pair_bits(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Bits of neighbouring characters given by code point, one shape for both.

    A pair off the list is rarer than those on it; how much, its characters say as if they met by chance.
    """
    known = table()
    keys = (first.astype(np.uint64) << np.uint64(32)) | second
    places = np.minimum(np.searchsorted(known.pairs, keys), len(known.pairs) - 1)
    chance = np.clip(character_bits(first) + character_bits(second), UNLISTED_BIGRAM_BITS, MAX_BITS)
    bits: NDArray[np.float32] = np.where(known.pairs[places] == keys, known.pair_bits[places], chance)
    return bits


@functools.cache
def table() -> _Table:
    """The shipped table; read on first use."""
    raw = resources.files("chains").joinpath("data", "information.tsv").read_bytes()
    characters = np.full(_BEYOND + 1, MAX_BITS, dtype=np.float32)
    pairs: dict[int, float] = {}
    words: dict[str, float] = {}
    for line in raw.decode("utf-8").splitlines()[1:]:
        kind, level, listed = line.split("\t")
        bits = float(level)
        if kind == "word":
            words.update(dict.fromkeys(listed.split(" "), bits))
        elif kind == "character":
            characters[[ord(character) for character in listed]] = bits
        else:
            pairs.update({(ord(a) << 32) | ord(b): bits for a, b in zip(listed[::2], listed[1::2], strict=True)})
    keys = np.array(sorted(pairs), dtype=np.uint64)
    values = np.array([pairs[int(key)] for key in keys], dtype=np.float32)
    return _Table(characters, keys, values, words, hashlib.sha256(raw).hexdigest()[:16])


@functools.cache
def _classes() -> NDArray[np.uint8]:
    """Class of every character of the basic plane, and of all beyond it: rare Han and emoji, each telling by itself."""
    return np.array([*(_class(chr(code)) for code in range(_BEYOND)), HAN], dtype=np.uint8)


def _class(character: str) -> int:
    if is_cjk(character):
        return HAN
    if character.isalnum():
        return WORD
    return SPACE if character.isspace() else OTHER


def _run_bits(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Per character of a run of Han: the mean of what it adds to its left and to its right neighbour."""
    alone = character_bits(codes)
    if len(codes) == 1:
        return alone
    pairs = pair_bits(codes[:-1], codes[1:])
    given_left = np.concatenate([alone[:1], np.clip(pairs - alone[:-1], 0, alone[1:])])
    given_right = np.concatenate([np.clip(pairs - alone[1:], 0, alone[:-1]), alone[-1:]])
    mean: NDArray[np.float32] = (given_left + given_right) / 2
    return mean


@functools.cache
def _question_pattern() -> re.Pattern[str]:
    """Question words, the longest first, in group `asking`; ordinary words match outside it and are stepped over."""
    chinese = "|".join(sorted(_QUESTION_WORDS.split(), key=lambda word: (-len(word), word)))
    english = "|".join(_ENGLISH_WORDS.split())
    return re.compile(f"{'|'.join(_ORDINARY_WORDS)}|(?P<asking>{chinese}|(?<![a-z0-9])(?:{english})(?![a-z0-9]))")


@functools.cache
def _question_terms() -> frozenset[str]:
    """Question words, and the pairs and characters in them that stand nowhere else."""
    words = _QUESTION_WORDS.split()
    pieces = {word[i : i + size] for word in words for size in (1, 2) for i in range(len(word) - size + 1)}
    return QUESTION_WORDS | {piece for piece in pieces if _MARKING & set(piece)}
