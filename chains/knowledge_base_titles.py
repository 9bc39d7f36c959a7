"""Titles of contents that several sources share: where the source that gave it goes, its title goes with it.

A content is stored, embedded and indexed once, under the title it was first read with, mostly a file's name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from chains.embeddings import embed_documents
from chains.knowledge_base import KnowledgeBase, batches, decoding, marks
from chains.vectorstores import FaissVectorStore
from loaders.splitters import text_with_context


def retitle(store: FaissVectorStore, leaving: Collection[int]) -> None:
    """Let contents outlive the sources that named them, under the title of one that stays; their chunks are embedded.

    Args:
        store: with the embedder that made the vectors; asked only where there is such a content.
        leaving: ids of the sources that are about to be removed or replaced.

    Raises:
        FingerprintError: there is such a content, and the store's embedder is another one.
    """
    kb = store.knowledge_base
    for content, title in _orphaned(kb, leaving):
        rows = kb._rows("SELECT text, metadata FROM chunks WHERE content_id = ? ORDER BY id", content)
        with decoding(kb.path):
            texts = [text_with_context(text, {"title": title, **json.loads(place)}) for text, place in rows]
        generation = store.ensure_generation()
        kb.writer().retitle(content, title, generation.id, embed_documents(store.embeddings, texts))


def _orphaned(kb: KnowledgeBase, leaving: Collection[int]) -> Iterator[tuple[int, str]]:
    """(id, title of the first source that stays) of the contents whose own title no source has that stays."""
    for part in batches(sorted(leaving)):
        rows = kb._rows(
            "SELECT d.content_id, d.source_id, d.title, t.title FROM documents d"
            " JOIN contents t ON t.id = d.content_id JOIN sources s ON s.id = d.source_id"
            f" WHERE d.source_id NOT IN ({marks(part)}) AND d.content_id IN"
            f" (SELECT content_id FROM documents WHERE source_id IN ({marks(part)}))"
            " ORDER BY d.content_id, s.active DESC, d.id",
            *part,
            *part,
        )
        own: dict[int, str] = {}
        others: dict[int, list[str]] = {}
        for content, source, title, first in rows:
            if source not in leaving:
                own[content] = first
                others.setdefault(content, []).append(title)
        yield from ((content, titles[0]) for content, titles in others.items() if own[content] not in titles)
