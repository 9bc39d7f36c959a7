"""Components and the retrieval QA chain."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chains.bge.embeddings import BGEEmbeddings as BGEEmbeddings
    from chains.bge.reranker import BgeReranker as BgeReranker
    from chains.chatglm3.chat_model import ChatGLM3 as ChatGLM3
    from chains.config import RagConfig as RagConfig
    from chains.config import load_config as load_config
    from chains.knowledge_base import KnowledgeBase as KnowledgeBase
    from chains.lexical_embeddings import LexicalEmbeddings as LexicalEmbeddings
    from chains.retrieval_qa import RetrievalQA as RetrievalQA
    from chains.retrieval_qa import build_retrieval_qa as build_retrieval_qa
    from chains.vectorstores import FaissVectorStore as FaissVectorStore

# Looked up on first use: `import chains` costs nothing, and config errors come before any heavy import.
_HOMES = {
    "BGEEmbeddings": "chains.bge.embeddings",
    "BgeReranker": "chains.bge.reranker",
    "ChatGLM3": "chains.chatglm3.chat_model",
    "FaissVectorStore": "chains.vectorstores",
    "KnowledgeBase": "chains.knowledge_base",
    "LexicalEmbeddings": "chains.lexical_embeddings",
    "RagConfig": "chains.config",
    "RetrievalQA": "chains.retrieval_qa",
    "build_retrieval_qa": "chains.retrieval_qa",
    "load_config": "chains.config",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chains' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
