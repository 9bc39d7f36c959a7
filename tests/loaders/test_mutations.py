"""Damaged files of every kind: the caller gets documents or a LoadError, soon, and goes on."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from loaders.documents import LoaderConfig
from loaders.errors import LoadError
from loaders.sandbox import ParserPool

SAMPLES = [
    "19_helloworld-bad.pdf",
    "26_word_example.pdf",
    "60_multicolumn.pdf",
    "28_word_example.docx",
    "29_ppt_example.pptx",
    "30_excel_with_image.xlsx",
    "40_langchain-ChatGLM_closed.csv",
    "62_gb18030_no_charset.html",
    "61__ude_1.txt",
    "72_加班费的仲裁时效应当如何认定.md",
]
MUTATIONS = 20  # of each sample: 200 in all


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes overwritten, cut out, doubled, or the end missing."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        place = chance.randrange(len(damaged))
        kind = chance.randrange(5)
        if kind == 0:
            damaged[place] = chance.randrange(256)
        elif kind == 1:
            del damaged[place : place + chance.randrange(1, 200)]
        elif kind == 2:
            damaged[place:place] = damaged[place : place + chance.randrange(1, 200)]
        elif kind == 3:
            damaged[place : place + 8] = chance.randbytes(8)
        else:
            del damaged[max(place, len(damaged) // 2) :]
        if not damaged:
            return b"\0"
    return bytes(damaged)


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_files_end_in_documents_or_a_clear_error(name: str, shared_data: Path, tmp_path: Path) -> None:
    data = (shared_data / "docs" / "dev" / name).read_bytes()
    chance = random.Random(name)
    pool = ParserPool(idle=1)
    path = tmp_path / f"damaged{Path(name).suffix}"
    for number in range(MUTATIONS):
        path.write_bytes(mutated(data, chance))
        started = time.monotonic()
        try:
            documents = list(pool.parse(path, LoaderConfig(timeout_s=20, ocr="off")))
        except LoadError as error:
            assert str(path) in error.zh, number
            assert "\n" not in str(error), number
        else:
            assert all(document.text for document in documents), number
        assert time.monotonic() - started < 30, number
    pool.close()
