"""What the chain asks of an embedder beyond LangChain's `Embeddings`: an identity, a token count, arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from langchain_core.embeddings import Embeddings

from loaders.errors import RagProjError


class EmbedderError(RagProjError):
    """The embedder did not return one vector for each text."""


Vectors = npt.NDArray[np.float32]

# Embedded once per store to recognise an embedder that has no fingerprint of its own; its words carry no meaning.
PROBE = "知识库的向量由哪个模型生成？ Which model made these vectors?"


@runtime_checkable
class Fingerprinted(Protocol):
    """An embedder that can name itself exactly."""

    @property
    def fingerprint(self) -> str:
        """A string that changes whenever its vectors would."""


@runtime_checkable
class TokenLimited(Protocol):
    """An embedder that knows how much it can see."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text that reach the vector."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""


@runtime_checkable
class Cutting(Protocol):
    """An embedder that cuts texts that are too long for it, and counts them."""

    @property
    def cut_texts(self) -> int:
        """How many of the texts embedded so far were cut."""


@runtime_checkable
class ArrayEmbeddings(Protocol):
    """An embedder that returns an array, sparing the detour over lists of Python floats."""

    def embed_documents_array(self, texts: Sequence[str]) -> Vectors:
        """Vectors of the texts, (n, dimensions) float32."""


def fingerprint(embeddings: Embeddings) -> str:
    """The embedder's own fingerprint, or its class and model name (then `PROBE` decides whether vectors agree)."""
    if isinstance(embeddings, Fingerprinted):
        return embeddings.fingerprint
    kind = type(embeddings)
    model = getattr(embeddings, "model_name", None) or getattr(embeddings, "model", None)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}:{model}" if isinstance(model, str) else name


def embed_documents(embeddings: Embeddings, texts: Sequence[str]) -> Vectors:
    """Unit vectors of passages, (n, dimensions) float32; cosine is then the inner product."""
    if not texts:
        return np.zeros((0, 0), np.float32)
    if isinstance(embeddings, ArrayEmbeddings):
        vectors = cast("ArrayEmbeddings", embeddings).embed_documents_array(texts)
    else:
        vectors = np.asarray(embeddings.embed_documents(list(texts)), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        name = type(embeddings).__name__
        raise EmbedderError(
            f"嵌入模型 {name} 对 {len(texts)} 段文本返回了形状 {vectors.shape} 的向量（或含无效数值），请检查嵌入服务",
            f"the embedder {name} returned vectors of shape {vectors.shape}, or not numbers, for {len(texts)} texts;"
            " check the embedding service",
        )
    return unit_length(vectors)


def embed_query(embeddings: Embeddings, query: str) -> Vectors:
    """Unit vector of a query, (dimensions,) float32."""
    vector: Vectors = unit_length(np.asarray([embeddings.embed_query(query)], dtype=np.float32))[0]
    return vector


def unit_length(vectors: Vectors) -> Vectors:
    """The rows divided by their lengths; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms == 0, 1, norms), dtype=np.float32)


def token_counter(embeddings: Embeddings) -> Callable[[str], int]:
    """What counts a text's tokens as the embedder does; for one that does not say, an estimate.

    The estimate: WordPiece vocabularies have one token per Han character and about four letters in a Latin one.
    """
    return embeddings.count_tokens if isinstance(embeddings, TokenLimited) else _estimated_tokens


def _estimated_tokens(text: str) -> int:
    wide = sum(character > "\u2e7f" for character in text)
    return wide + (len(text) - wide + 3) // 4


def cut_texts(embeddings: Embeddings) -> int:
    """How many of the texts embedded so far were cut; 0 for an embedder that does not say."""
    return embeddings.cut_texts if isinstance(embeddings, Cutting) else 0


def max_tokens(embeddings: Embeddings) -> int | None:
    """Most tokens the embedder sees, or None where it does not say."""
    return embeddings.max_tokens if isinstance(embeddings, TokenLimited) else None
