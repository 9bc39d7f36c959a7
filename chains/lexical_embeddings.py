"""Embeddings without weights: hashed character n-grams, each weighted by the information it carries.

A text is a bag of features: Han characters, pairs of neighbours, Latin words and numbers, three-letter pieces of longer
words. Each feature adds its weight, with a hashed sign, to one bucket in each of four blocks of the vector. The cosine
of two vectors then estimates the overlap of two texts. Features that share a bucket by accident add noise; four buckets
instead of one keep it from ever being large (Kane and Nelson, "Sparser Johnson-Lindenstrauss Transforms", 2014).

All sums are of integers, so neither the batch, the order of features nor the machine changes a bit of the result.
The constants were chosen on cmrc2018_train_substitute by `benchmarks/lexical_recall.py`; recall is flat around them.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from chains import information
from chains.analysis import fold
from chains.information import HAN, OTHER, SPACE, WORD

BATCH_CHARACTERS = 1 << 17  # about 40 MB of working memory at 1,024 dimensions
BATCH_TEXTS = 1 << 10  # fits the 16 bits a packed feature has for its text
BLOCKS = 4  # buckets per feature, each drawn from 16 bits of a hash of 64; with one, recall@1 is .02 lower
LETTERS_PER_TOKEN = 4
_WORDS = re.compile(bytes([WORD]) + b"+")  # in the classes of a text's characters, a byte each

# kinds of features and their weight against a pair of characters with the same information
CHARACTER, PAIR, WHOLE_WORD, PIECE = range(4)
KIND_WEIGHTS = (1.0, 1.0, 1.2, 0.8)
PIECE_LETTERS = 3
PIECE_BITS = 6.0  # none is in the table; all together they should weigh less than their word
MUTED_BITS = 1.0  # 的, 是, 在, question words: what carries no more says nothing about the passage
INFORMATION_POWER = 0.8
FREQUENCY_POWER = 0.7
MAX_FREQUENCY = 255
LEVELS_PER_BIT = 4  # all bits are multiples of a quarter
WEIGHT_SCALE = 256  # weights are rounded to integers of this size, an error below half a percent


class LexicalEmbeddings(BaseModel, Embeddings):
    """Vectors whose cosine says how much two texts share, in the terms that tell something.

    Nothing is learned or downloaded; questions and passages are embedded alike. A text without any telling term (empty,
    punctuation, only question words) gets one fixed unit vector, near no other text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # recall@1 at 192 tokens a chunk: .96 with 1,024, .94 with 512, .88 with 256 (cmrc2018_train_substitute)
    dimensions: int = Field(default=1024, ge=64, le=8192, description="length of the vectors")

    @property
    def fingerprint(self) -> str:
        """What made the vectors: changes whenever they would."""
        return f"lexical-{self.dimensions}-{_digest(self)}"

    @property
    def max_tokens(self) -> int:
        """The longest passage worth one vector.

        Longer ones are embedded whole, but the more terms share a vector the weaker each speaks: recall@1 is .96 at
        192 tokens a chunk, .95 at 256, .94 at 384 and .92 at 512 (cmrc2018_trial).
        """
        return 512

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One unit vector per text, in order; an empty list for no texts."""
        vectors: list[list[float]] = self.embed_documents_array(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The unit vector of a question, the same as of a passage with this text."""
        return self.embed_documents([text])[0]

    def embed_documents_array(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, shape (len(texts), dimensions); memory beyond the result is bounded by the longest text."""
        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        for start, end in _batches(texts):
            vectors[start:end] = _unit(_sketch(_features(texts[start:end]), end - start, self.dimensions))
        return vectors

    def count_tokens(self, text: str) -> int:
        """Size of `text`: one for a Han character or a punctuation mark, one for four letters of a word."""
        # bytes, not arrays: a splitter asks for thousands of short texts, on which numpy takes five times as long
        classes = information.character_classes(information.code_points(text)).tobytes()
        words = [len(word) for word in _WORDS.findall(classes)]
        pieces = sum(-(-letters // LETTERS_PER_TOKEN) for letters in words)
        return len(classes) - sum(words) - classes.count(SPACE) + pieces


@functools.cache
def _digest(embeddings: LexicalEmbeddings) -> str:
    """A hash over all that vectors depend on: the tables as data, this module by what it does to a probe."""
    every_character = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))
    digest = hashlib.sha256(information.table().digest.encode())
    digest.update(fold(every_character).encode())
    digest.update(" ".join(sorted(information.QUESTION_WORDS)).encode())
    digest.update(embeddings.embed_documents_array([_PROBE]).astype("<f4").tobytes())
    return digest.hexdigest()[:16]


_PROBE = "第一条 為了規範知识库的检索，检索检索，本ChatGLM3问答系统2024年起向谁开放？ Retrieval, RETRIEVALS; 3.14 😀"


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbouring texts, each of bounded count and, unless it is a single text, of bounded length."""
    start, characters = 0, 0
    for place, text in enumerate(texts):
        full = place - start == BATCH_TEXTS or characters + len(text) > BATCH_CHARACTERS
        if full and place > start:
            yield start, place
            start, characters = place, 0
        characters += len(text)
    if start < len(texts):
        yield start, len(texts)


# A feature occurrence is one integer, so that sorting them groups and counts them: text (16 bits), hash of the n-gram
# (40), level of information (6), kind (2).
_TEXT_SHIFT, _HASH_SHIFT, _LEVEL_SHIFT = np.uint64(48), np.uint64(8), np.uint64(2)
_HASH_DROPPED = np.uint64(24)


def _features(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Every feature occurrence of up to `BATCH_TEXTS` texts, packed and sorted."""
    folded = "\n".join(map(fold, texts))  # a line break belongs to no n-gram, so none spans two texts
    codes = information.code_points(folded)
    ends = np.fromiter(accumulate(len(text) + 1 for text in texts), dtype=np.int64, count=len(texts))
    owner = np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(ends, prepend=0))[: len(codes)]
    classes = information.character_classes(codes)
    classes[information.question_mask(folded)] = OTHER
    parts = (*_han_features(codes, classes == HAN), *_word_features(codes, classes == WORD))
    packed = np.concatenate(
        [
            (owner[places] << _TEXT_SHIFT)
            | ((_mixed(keys) >> _HASH_DROPPED) << _HASH_SHIFT)
            | ((bits * LEVELS_PER_BIT).astype(np.uint64) << _LEVEL_SHIFT)
            | np.uint64(kind)
            for kind, places, keys, bits in parts
        ]
    )
    packed.sort()
    return packed


_Part = tuple[int, NDArray[np.int64], NDArray[np.uint64], NDArray[np.float32]]  # kind, places, keys, bits


def _han_features(codes: NDArray[np.uint32], telling: NDArray[np.bool_]) -> Iterator[_Part]:
    """Characters, and pairs of neighbours, among the Han characters marked as `telling`."""
    alone = np.flatnonzero(telling)
    yield CHARACTER, alone, _joined(codes[alone]), information.character_bits(codes[alone])
    first = np.flatnonzero(telling[:-1] & telling[1:])
    left, right = codes[first], codes[first + 1]
    yield PAIR, first, _joined(left, right), information.pair_bits(left, right)


def _word_features(codes: NDArray[np.uint32], letters: NDArray[np.bool_]) -> Iterator[_Part]:
    """Words, and the pieces of those longer than a piece: chatglm meets chatglm3 and a plural its singular."""
    starts, ends = _word_spans(letters)
    hashes = _word_hashes(codes, starts, ends)
    yield WHOLE_WORD, starts, hashes, _word_bits(hashes)
    inside = letters[:-2] & letters[1:-1] & letters[2:]
    long = np.zeros(len(codes) + 1, dtype=np.int8)
    long[starts[ends - starts > PIECE_LETTERS]] = 1
    long[ends[ends - starts > PIECE_LETTERS]] -= 1
    first = np.flatnonzero(inside & (np.cumsum(long)[: len(inside)] > 0))
    keys = _joined(codes[first], codes[first + 1], codes[first + 2])
    yield PIECE, first, keys, np.full(len(first), PIECE_BITS, dtype=np.float32)


def _word_spans(letters: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the runs of True."""
    edges = np.diff(letters.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _word_hashes(codes: NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of every word: the sum over its letters of a hash of letter and position."""
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    lengths = ends - starts
    firsts = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
    letters = codes[np.repeat(starts, lengths) + position]
    return np.add.reduceat(_mixed(_joined(position.astype(np.uint32), letters)), firsts)


def _word_bits(hashes: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Bits of words given by their hashes."""
    known, bits = _known_words()
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: NDArray[np.float32] = np.where(known[places] == hashes, bits[places], np.float32(information.MAX_BITS))
    return found


@functools.cache
def _known_words() -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Hashes of the words of the background table, sorted, and their bits."""
    words = information.table().words
    codes = information.code_points(" ".join(words))
    hashes = _word_hashes(codes, *_word_spans(codes != ord(" ")))
    order = np.argsort(hashes)
    return hashes[order], np.array(list(words.values()), dtype=np.float32)[order]


def _sketch(packed: NDArray[np.uint64], texts: int, dimensions: int) -> NDArray[np.float64]:
    """Weighted, signed sums of sorted features per bucket, shape (texts, dimensions): integers held exactly."""
    firsts = np.flatnonzero(np.diff(packed, prepend=~packed[:1]))
    frequency = np.minimum(np.diff(firsts, append=len(packed)), MAX_FREQUENCY)
    packed = packed[firsts]
    weights = _weights()[(packed & np.uint64(0xFF)).astype(np.int64), frequency]
    rows = (packed >> _TEXT_SHIFT).astype(np.int64) * dimensions
    # 16 bits for each block: one for the sign, fifteen to choose the bucket
    draws = _mixed((packed >> _HASH_SHIFT) & np.uint64((1 << 40) - 1))
    sums = np.zeros(texts * dimensions)
    for block in range(BLOCKS):
        low, high = block * dimensions // BLOCKS, (block + 1) * dimensions // BLOCKS
        draw = ((draws >> np.uint64(16 * block)) & np.uint64(0xFFFF)).astype(np.int64)
        buckets = low + ((draw >> 1) * (high - low) >> 15)
        sums += np.bincount(rows + buckets, weights=np.where(draw & 1, weights, -weights), minlength=len(sums))
    return sums.reshape(texts, dimensions)


@functools.cache
def _weights() -> NDArray[np.float64]:
    """Integer weights, shape (256, MAX_FREQUENCY + 1): by the low byte of a packed feature, and how often it occurs."""
    low_byte = np.arange(256)
    bits = np.maximum((low_byte >> int(_LEVEL_SHIFT)) / LEVELS_PER_BIT - MUTED_BITS, 0)
    telling = np.array(KIND_WEIGHTS)[low_byte & 3] * (bits / information.MAX_BITS) ** INFORMATION_POWER
    frequency = np.arange(MAX_FREQUENCY + 1) ** FREQUENCY_POWER
    weights: NDArray[np.float64] = np.rint(WEIGHT_SCALE * np.outer(telling, frequency))
    return weights


def _unit(sums: NDArray[np.float64]) -> NDArray[np.float32]:
    """`sums`, which are changed, scaled to unit rows; a row of zeros gets equal spikes, one in each block."""
    silent = ~sums.any(axis=1)
    dimensions = sums.shape[1]
    sums[np.ix_(silent, [block * dimensions // BLOCKS for block in range(BLOCKS)])] = 1
    # einsum adds in an order that depends on the machine, which integers do not mind
    lengths = np.sqrt(np.einsum("ij,ij->i", sums, sums))
    vectors: NDArray[np.float32] = (sums / lengths[:, None]).astype(np.float32)
    return vectors


def _joined(*codes: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Up to three code points, of 21 bits each, as one integer."""
    return functools.reduce(lambda key, code: (key << np.uint64(21)) | code, codes[1:], codes[0].astype(np.uint64))


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a fixed, well-mixing bijection of 64-bit integers."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
