"""retitle: a content keeps no title that only a source which leaves had, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.knowledge_base import FingerprintError, KnowledgeBase
from chains.knowledge_base_titles import retitle
from chains.lexical_embeddings import LexicalEmbeddings
from chains.vectorstores import FaissVectorStore


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    """甲.txt, 乙.txt and 丙.txt hold the same text, 丁.txt another one."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in {
        "1甲": "同样的正文。",
        "2乙": "同样的正文。",
        "3丙": "同样的正文。",
        "4丁": "别的正文。",
    }.items():
        (docs / f"{name}.txt").write_text(text, encoding="utf-8")
    with KnowledgeBase(tmp_path / "kb", create=True) as made:
        store = FaissVectorStore(LexicalEmbeddings(dimensions=64), made)
        assert Ingestor(store, FullTextIndex(made)).ingest([docs]).added == 4
        yield made


def ids(kb: KnowledgeBase, *names: str) -> set[int]:
    return kb.source_ids([source for source in kb.source_names() if Path(source).stem in names])


def titles(kb: KnowledgeBase) -> list[str]:
    """Of both contents, as they are indexed."""
    return sorted(text.split("\n")[0] for _, text in kb.index_texts(kb.chunk_ids()))


@pytest.mark.parametrize(
    ("leaving", "title"),
    [
        (["1甲"], "2乙"),
        (["1甲", "2乙"], "3丙"),
        (["1甲", "3丙"], "2乙"),
        (["2乙", "3丙"], "1甲"),
        (["1甲", "2乙", "3丙"], "1甲"),
        (["4丁"], "1甲"),
        ([], "1甲"),
    ],
)
def test_a_content_takes_the_title_of_the_first_that_stays(kb: KnowledgeBase, leaving: list[str], title: str) -> None:
    assert titles(kb) == ["1甲", "4丁"]
    before = kb.revision()
    retitle(FaissVectorStore(LexicalEmbeddings(dimensions=64), kb), ids(kb, *leaving))
    assert titles(kb) == [title, "4丁"]
    assert (kb.revision() == before) == (title == "1甲")


def test_so_many_leave_at_once_that_they_are_asked_for_in_parts(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chains.knowledge_base._BATCH", 1)
    retitle(FaissVectorStore(LexicalEmbeddings(dimensions=64), kb), ids(kb, "1甲", "2乙"))
    assert titles(kb) == ["3丙", "4丁"]


def test_another_embedder_is_refused_only_where_it_would_be_asked(kb: KnowledgeBase) -> None:
    other = FaissVectorStore(LexicalEmbeddings(dimensions=128), kb)
    retitle(other, ids(kb, "2乙", "3丙", "4丁"))
    with pytest.raises(FingerprintError, match="lexical-64"):
        retitle(other, ids(kb, "1甲"))
    assert titles(kb) == ["1甲", "4丁"]
