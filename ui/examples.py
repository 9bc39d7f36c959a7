"""Questions shown on an empty page: those the manual answers, where the knowledge base holds the manual."""

from __future__ import annotations

from pathlib import Path

from chains.knowledge_base import KnowledgeBase

MANUAL_QUESTIONS = (
    "怎样把一个文件夹加入知识库？",
    "支持哪些文件格式？",
    "加密的 PDF 怎么办？",
    "怎样换用自己的大模型服务？",
)
_MANUAL = "getting_started.md"


def example_questions(knowledge_base: KnowledgeBase) -> list[str]:
    """The manual's questions, none for a knowledge base without the manual."""
    holds_manual = any(Path(name).name == _MANUAL for name in knowledge_base.source_names())
    return list(MANUAL_QUESTIONS) if holds_manual else []
