"""Make chains/data/information.tsv, the background frequencies behind `chains.information`.

    python -m benchmarks.information_table ../shared/data chains/data/information.tsv

Counted are the share of windows of 256 characters that contain a term, per genre, then averaged over the genres, so
that no genre decides alone what is common. Only passages are read, no question; of CMRC2018 only the passages behind
cmrc2018_train_substitute, so the passages of cmrc2018_devtest stay unseen.
Sources: CMRC2018 (CC BY-SA 4.0), DuReader 2.0 demo (Apache-2.0), a medical FAQ (MIT), Chinese statutes (no copyright).
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from chains.analysis import fold, is_cjk, terms

WINDOW = 256
STEP = 4  # levels per bit: a quarter of a bit is finer than the counts are certain
# genre -> its say in the average: encyclopedia and web speak for Chinese at large, the other two for their field
GENRES = {"encyclopedia": 0.4, "web": 0.3, "medicine": 0.15, "law": 0.15}
MAX_BITS = {"character": 13.0, "bigram": 9.5, "word": 12.0}  # rarer terms are left to the back-off


def main(source: Path, target: Path) -> None:
    """Count the genres below `source` and write the table to `target`."""
    share: dict[str, float] = defaultdict(float)
    for genre, weight in GENRES.items():
        windows, counts = _count(_texts(source, genre))
        print(f"{genre}: {windows} windows, {len(counts)} terms")
        for term, count in counts.items():
            share[term] += weight * count / windows
    levels: dict[tuple[str, int], list[str]] = defaultdict(list)
    for term in sorted(share):
        if max(term) > "\uffff":  # one place for all of them in `chains.information`
            continue
        bits = -math.log2(share[term])
        if bits <= MAX_BITS[_kind(term)]:
            levels[_kind(term), round(bits * STEP)].append(term)
    rows = ["# kind, bits, terms: one string of characters or pairs, words apart. See benchmarks/information_table.py"]
    for (kind, level), found in sorted(levels.items()):
        rows.append(f"{kind}\t{level / STEP:g}\t{(' ' if kind == 'word' else '').join(found)}")
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print({kind: sum(len(v) for k, v in levels.items() if k[0] == kind) for kind in MAX_BITS}, target.stat().st_size)


def _kind(term: str) -> str:
    if not is_cjk(term[0]):
        return "word"
    return "character" if len(term) == 1 else "bigram"


def _count(texts: Iterator[str]) -> tuple[int, Counter[str]]:
    """Number of windows, and for every term the number of windows that contain it."""
    windows, counts = 0, Counter[str]()
    for text in texts:
        for start in range(0, len(text), WINDOW):
            piece = fold(text[start : start + WINDOW])
            found = set(terms(piece)) | {character for character in piece if is_cjk(character)}
            counts.update(found)
            windows += 1
    return windows, counts


def _texts(source: Path, genre: str) -> Iterator[str]:
    if genre == "encyclopedia":
        used = {row["context_id"] for row in _rows(source / "cmrc2018_train_substitute.jsonl")}
        passages = [p for part in ("trial", "dev") for p in _rows(source / f"cmrc2018_{part}_passages.jsonl")]
        yield from (_joined(passage) for passage in passages if passage["id"] in used)
    else:
        stem = {"web": "dureader2_demo_train", "medicine": "medfaq_train", "law": "statutes_core"}[genre]
        yield from (_joined(passage) for passage in _rows(source / f"{stem}_passages.jsonl"))


def _joined(passage: dict[str, str]) -> str:
    return passage["title"] + "\n" + passage["text"]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(): texts contain U+2028
        yield from map(json.loads, lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
