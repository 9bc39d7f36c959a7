"""Texts that are the same but for details: found among many by MinHash, told apart in pairs by shared shingles."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from finetune.data.rows import same_text
from loaders.text import normalise

_SHINGLE = 5  # characters
_SLOTS = 64  # of a signature
_BANDS = 16  # of four slots each: two texts with Jaccard .8 meet in one of them with probability .9998, with .3 in .12
_NEAR_JACCARD = 0.7  # one character changed in a hundred leaves .9, one in thirty .7
_NEAR_CONTAINMENT = 0.8  # of the shorter text's shingles in the longer one
_PROBES = 32  # shingles looked up before all are compared
_LONGEST = 20_000  # characters compared

Signature = npt.NDArray[np.uint64]


def text_key(text: str) -> int:
    """A 64-bit number that texts share which differ in white space, width or code point alone."""
    plain = same_text(normalise(text))
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big", signed=True)


def document_id(text: str) -> str:
    """`text_key` as 16 digits: an id for a document that has no other."""
    return f"{text_key(text) & (1 << 64) - 1:016x}"


def signature(text: str) -> Signature:
    """MinHash of the text's shingles, (64,): the share of equal slots estimates the Jaccard similarity of two texts.

    One permutation, its range cut into slots; an empty slot takes the value of the next full one (Shrivastava and Li,
    "Densifying One Permutation Hashing via Rotation", 2014).
    """
    hashes = np.sort(_shingle_hashes(same_text(text)[:_LONGEST]))
    starts = np.searchsorted(hashes, _SLOT_STARTS)
    ends = np.append(starts[1:], len(hashes))
    full = starts < ends
    values = np.zeros(_SLOTS, np.uint64)
    values[full] = hashes[starts[full]]
    full_slots = np.flatnonzero(full)
    place = np.searchsorted(full_slots, np.arange(_SLOTS))
    donors = full_slots[place % len(full_slots)]
    distance = (donors - np.arange(_SLOTS)) % _SLOTS
    borrowed: Signature = values[donors] + distance.astype(np.uint64)
    return borrowed


def is_near(first: str, second: str) -> bool:
    """Whether one text is contained in the other, but for a fifth of its shingles at most.

    A few shingles of the shorter one are looked up first, so that unlike texts, nearly all pairs, cost microseconds.
    """
    shorter, longer = sorted((same_text(first)[:_LONGEST], same_text(second)[:_LONGEST]), key=len)
    if len(shorter) <= _SHINGLE:
        return shorter in longer
    last = len(shorter) - _SHINGLE
    places = range(0, last + 1, max(1, last // _PROBES))
    found = sum(shorter[place : place + _SHINGLE] in longer for place in places)
    if found < len(places) * _NEAR_CONTAINMENT / 2:
        return False
    shingles = _shingles(shorter)
    return len(shingles & _shingles(longer)) >= _NEAR_CONTAINMENT * len(shingles)


class NearTexts:
    """Texts by signature: which of those added before is near to a text."""

    def __init__(self) -> None:
        self._signatures: dict[int, Signature] = {}
        self._bands: dict[bytes, list[int]] = defaultdict(list)

    def add(self, key: int, text: str) -> list[int]:
        """Keys of the texts near to it that were added before; the text itself is added under its key."""
        mark = signature(text)
        near = self._near(mark)
        if key not in self._signatures:
            self._signatures[key] = mark
            for band in _bands(mark):
                self._bands[band].append(key)
        return near

    def find(self, text: str) -> list[int]:
        """Keys of the texts near to it."""
        return self._near(signature(text))

    def _near(self, mark: Signature) -> list[int]:
        candidates = dict.fromkeys(key for band in _bands(mark) for key in self._bands.get(band, ()))
        least = _NEAR_JACCARD * _SLOTS
        return [key for key in candidates if np.count_nonzero(self._signatures[key] == mark) >= least]


def _bands(mark: Signature) -> list[bytes]:
    rows = mark.reshape(_BANDS, -1)
    return [bytes([number]) + rows[number].tobytes() for number in range(_BANDS)]


def _shingles(text: str) -> set[str]:
    return {text[place : place + _SHINGLE] for place in range(max(1, len(text) - _SHINGLE + 1))}


def _shingle_hashes(text: str) -> npt.NDArray[np.uint64]:
    """One well-mixed number for each shingle, in order of place."""
    codes = np.frombuffer(text.ljust(_SHINGLE).encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(codes) - _SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(_SHINGLE):
        hashes = hashes * _FACTOR + codes[offset : offset + count]
    hashes ^= hashes >> np.uint64(31)  # the finaliser of splitmix64
    hashes *= np.uint64(0x7FB5D329728EA185)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x81DADEF4BC2DD44D)
    hashes ^= hashes >> np.uint64(33)
    return hashes


_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SLOT_STARTS = (np.arange(_SLOTS, dtype=np.uint64) << np.uint64(58)).astype(np.uint64)
