"""Removed chunks leave the stored text; what stays keeps its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chains.checks import check
from chains.fulltext import FullTextIndex
from chains.knowledge_base import KnowledgeBase, SourceState
from chains.knowledge_base_blanking import BLANK, blanked
from chains.knowledge_base_writer import NewChunk, NewDocument
from chains.lexical_embeddings import LexicalEmbeddings
from chains.passages import join_neighbours
from chains.vectorstores import FaissVectorStore
from loaders.text import normalise

TEXT = "甲的电话是一二三。乙的电话是四五六。丙的电话是七八九。"
NINES = [(0, 9), (9, 18), (18, 27)]


@pytest.mark.parametrize(
    ("gone", "kept", "expected"),
    [
        ([(2, 4)], [(0, 2), (4, 6)], "ab__ef"),
        ([(1, 5)], [(0, 2), (4, 6)], "ab__ef"),  # what the neighbours overlap is theirs
        ([(0, 3), (3, 6)], [], "______"),
        ([(2, 4)], [(0, 6)], "abcdef"),
        ([(4, 99)], [(0, 4)], "abcd__"),
    ],
)
def test_only_what_no_other_chunk_holds_is_blanked(
    gone: list[tuple[int, int]], kept: list[tuple[int, int]], expected: str
) -> None:
    assert blanked("abcdef", gone, kept) == expected.replace("_", BLANK)


def test_no_text_of_a_document_has_the_blank() -> None:
    assert BLANK not in normalise(f"甲{BLANK}乙")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaissVectorStore]:
    """A document of three chunks, "0" to "2", as a file leaves it."""
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        store = FaissVectorStore(LexicalEmbeddings(), kb)
        generation, writer = store.ensure_generation(), kb.writer()
        chunks = [NewChunk(str(n), start, end, TEXT[start:end], {}) for n, (start, end) in enumerate(NINES)]
        source, _ = writer.begin_source("phones", SourceState(0, 1, 1, "s", "s"))
        writer.add_documents(source, [NewDocument("h", "", TEXT, {}, chunks)])
        ids = kb.without_vector(generation.id, source_id=source)
        vectors = np.array(store.embeddings.embed_documents([chunk.text for chunk in chunks]), np.float32)
        writer.add_vectors(generation.id, ids, vectors)
        writer.activate(source, generation.id)
        yield store


def test_a_deleted_chunk_is_neither_in_the_text_nor_in_a_passage_of_its_neighbours(store: FaissVectorStore) -> None:
    kb = store.knowledge_base
    store.delete(["1"])
    left = list(kb.chunks_by_key(["0", "2"]).values())
    text = kb.document_text(left[0].document_id)
    assert text == TEXT[:9] + BLANK * 9 + TEXT[18:]
    passages = join_neighbours(left, kb, 1000)
    assert [passage.text for passage in passages] == [TEXT[:9], TEXT[18:]]
    assert check(store, FullTextIndex(kb)).problems == []


def test_chunks_deleted_one_after_the_other_leave_nothing_but_the_last(store: FaissVectorStore) -> None:
    for key in ("0", "1"):
        store.delete([key])
    (last,) = store.knowledge_base.chunks_by_key(["2"]).values()
    assert (store.knowledge_base.document_text(last.document_id) or "").strip() == TEXT[18:]
    store.delete(["2"])
    assert store.knowledge_base.sources() == []
