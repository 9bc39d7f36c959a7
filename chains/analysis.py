"""How text is compared: folding (case, width, traditional forms) and the terms Chinese is searched by."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

# Han, with extensions A-B and compatibility forms; kana and hangul are searched by bigrams the same way.
_CJK = "㐀-䶿一-鿿豈-﫿\U00020000-\U0002a6df぀-ヿ가-힣"
_CHARACTER = re.compile(f"[{_CJK}]")
_LONG = 50  # characters, from which on numpy is faster than `str.translate`: twice at 130
_RUNS = re.compile(rf"(?P<cjk>[{_CJK}]+)|(?P<word>[^\W_{_CJK}]+)")


def fold(text: str) -> str:
    """`text` as it is compared: lower case, half width, simplified forms. Same length, so offsets carry over."""
    if len(text) < _LONG:
        return text.translate(_fold_table())
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return _folded_codes()[codes].tobytes().decode("utf-32-le", "surrogatepass")


def fold_all(texts: Sequence[str]) -> list[str]:
    """Each text folded; in one piece, since folding is as long on its way to numpy and back as with the text."""
    folded, ends = fold("".join(texts)), list(accumulate(map(len, texts)))
    return [folded[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def terms(text: str) -> list[str]:
    """Search terms of `text` in order: Han bigrams (a lone character by itself) and whole Latin or digit words."""
    return [term for is_word, run in _runs(text) for term in ([run] if is_word else _pairs(run))]


def index_terms(text: str) -> list[str]:
    """What the full-text index holds of `text`: its search terms, and of longer Han runs also each character.

    Pairs find what is worded alike, single characters also what is worded a little differently (离职, 辞职).
    `benchmarks/retrieval_quality.py` tells how pairs alone, dictionary words and mixtures of them did.
    """
    found: list[str] = []
    for is_word, run in _runs(text):
        found.extend([run] if is_word else _pairs(run))
        found.extend(run if not is_word and len(run) > 1 else "")
    return found


def _runs(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a Latin or digit word, not Han; the folded run) for each run of either, in order."""
    return ((run.lastgroup == "word", run.group()) for run in _RUNS.finditer(fold(text)))


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


@functools.lru_cache(maxsize=1 << 16)
def is_cjk(character: str) -> bool:
    """Whether a single character is Han, kana or hangul."""
    return _CHARACTER.match(character) is not None


@functools.cache
def _folded_codes() -> npt.NDArray[np.uint32]:
    """`_fold_table` as an array over all code points, (1114112,)."""
    codes = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    table = _fold_table()
    codes[list(table)] = [ord(folded) for folded in table.values()]
    return codes


@functools.cache
def _fold_table() -> dict[int, str]:
    """Every single character that folds to another single one: NFKC, lower case, then OpenCC's t2s."""
    from opencc import OpenCC

    convert = OpenCC("t2s").convert
    han = [chr(code) for block in (range(0x3400, 0x9FFF + 1), range(0xF900, 0xFAFF + 1)) for code in block]
    # one call for all: characters on lines of their own, so that no phrase rule can join two of them
    simplified = dict(zip(han, convert("\n".join(han)).split("\n"), strict=True))
    table: dict[int, str] = {}
    for code in range(0x80, 0x10000):
        character = chr(code)
        if unicodedata.category(character) in {"Cs", "Co", "Cn"}:
            continue
        folded = unicodedata.normalize("NFKC", character).lower()
        folded = simplified.get(folded, folded)
        if folded != character and len(folded) == 1:
            table[code] = folded
    table.update({code: chr(code).lower() for code in range(0x41, 0x5B)})
    return table
