"""What a knowledge base's database must hold by itself: whole rows, values of their kind, texts at their offsets."""

from __future__ import annotations

from chains import schema
from chains.knowledge_base import KnowledgeBase, decoding


def integrity_problems(kb: KnowledgeBase) -> list[str]:
    """What SQLite's own check finds, and rows that belong to nothing; empty when all is well."""
    found = [str(row[0]) for row in kb._rows("PRAGMA integrity_check(20)") if row[0] != "ok"]
    for child, column, parent in (
        ("documents", "source_id", "sources"),
        ("documents", "content_id", "contents"),
        ("chunks", "content_id", "contents"),
    ):
        count = kb._number(f"SELECT COUNT(*) FROM {child} WHERE {column} NOT IN (SELECT id FROM {parent})")
        if count:
            found.append(f"{count} {child} without their {parent}")
    empty = kb._number("SELECT COUNT(*) FROM sources WHERE active = 1 AND id NOT IN (SELECT source_id FROM documents)")
    if empty:
        found.append(f"{empty} sources without a document")
    unused = kb._number("SELECT COUNT(*) FROM contents WHERE id NOT IN (SELECT content_id FROM documents)")
    if unused:
        found.append(f"{unused} contents without a document")
    found += _wrong_values(kb)
    chunk = f"key & {(1 << schema.GENERATION_SHIFT) - 1}"
    loose = kb._number(f"SELECT COUNT(*) FROM vectors WHERE {chunk} NOT IN (SELECT id FROM chunks)")
    if loose:
        found.append(f"{loose} vectors without a chunk")
    return found


def _wrong_values(kb: KnowledgeBase) -> list[str]:
    """Rows whose values are not of the kind that is written."""
    length = f"SELECT 2 * dimensions FROM generations WHERE id = key >> {schema.GENERATION_SHIFT}"
    checks = {
        "vectors of another length": f"vectors WHERE length(vector) IS NOT ({length})",
        "documents with metadata that is not JSON": "documents WHERE NOT json_valid(metadata)",
        "chunks with metadata that is not JSON": "chunks WHERE NOT json_valid(metadata)",
        "chunks with offsets that are not numbers": (
            "chunks WHERE typeof(start) <> 'integer' OR typeof(end) <> 'integer' OR typeof(text) <> 'text'"
        ),
    }
    counts = {what: kb._number(f"SELECT COUNT(*) FROM {where}") for what, where in checks.items()}
    return [f"{count} {what}" for what, count in counts.items() if count]


def wrong_offsets(kb: KnowledgeBase) -> list[int]:
    """Ids of chunks that are not their content's text at their offsets."""
    wrong: list[int] = []
    for (content,) in kb._rows("SELECT id FROM contents ORDER BY id"):
        rows = kb._rows(
            "SELECT t.text, c.id, c.start, c.end, c.text FROM contents t JOIN chunks c ON c.content_id = t.id"
            " WHERE t.id = ?",
            content,
        )
        with decoding(kb.path):
            wrong += [chunk for text, chunk, start, end, part in rows if text[start:end] != part]
    return wrong
