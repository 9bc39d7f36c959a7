"""What the chain asks of an embedder: unit arrays, an identity, a token count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from chains import embeddings as module
from chains.embeddings import (
    Vectors,
    embed_documents,
    embed_query,
    fingerprint,
    max_tokens,
    token_counter,
    unit_length,
)
from chains.lexical_embeddings import LexicalEmbeddings
from loaders.errors import RagProjError


class Plain(Embeddings):
    """Vectors of length 5 and 2: not unit."""

    def __init__(self, model: object = None, model_name: object = None) -> None:
        if model is not None:
            self.model = model
        if model_name is not None:
            self.model_name = model_name

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        assert isinstance(texts, list)
        return [[3.0, 4.0] for _ in texts]

    def embed_query(self, text: str) -> list[float]:
        return [0.0, 2.0]


class Own(Plain):
    """Names itself, knows its limit, returns arrays."""

    fingerprint = "own-1"
    max_tokens = 77

    def count_tokens(self, text: str) -> int:
        return 2 * len(text)

    def embed_documents_array(self, texts: Sequence[str]) -> Vectors:
        return np.full((len(texts), 4), 2, np.float32)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise AssertionError("the array is the shorter way")


def test_passages_become_unit_vectors() -> None:
    vectors = embed_documents(Plain(), ("a", "b", "c"))
    assert vectors.dtype == np.float32
    assert vectors.tolist() == pytest.approx(np.array([[0.6, 0.8]] * 3))


def test_a_query_becomes_a_unit_vector() -> None:
    vector = embed_query(Plain(), "a")
    assert vector.dtype == np.float32
    assert vector.tolist() == [0.0, 1.0]


def test_an_array_is_used_where_the_embedder_has_one() -> None:
    assert embed_documents(Own(), ["a", "b"]).tolist() == [[0.5] * 4] * 2


def test_no_texts_ask_the_embedder_nothing() -> None:
    assert embed_documents(Own(), []).shape[0] == 0
    assert embed_documents(Plain(), []).shape[0] == 0


def test_rows_are_divided_by_their_lengths_and_zero_stays_zero() -> None:
    rows = np.array([[3, 4], [0, 0], [-2, 0], [1e-15, 0]], np.float32)
    assert unit_length(rows).tolist() == pytest.approx(np.array([[0.6, 0.8], [0, 0], [-1, 0], [1, 0]]), abs=1e-6)


class Wrong(Embeddings):
    """Answers with something else than one vector a text."""

    def __init__(self, answer: list[list[float]]) -> None:
        self.answer = answer

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.answer

    def embed_query(self, text: str) -> list[float]:
        return self.answer[0]


@pytest.mark.parametrize("answer", [[[1.0, 0.0]], [[1.0, 0.0]] * 3, [[1.0, float("nan")]] * 2])
def test_an_embedder_that_answers_wrongly_is_named(answer: list[list[float]]) -> None:
    with pytest.raises(RagProjError, match="Wrong"):
        embed_documents(Wrong(answer), ["a", "b"])


# -- identity ----------------------------------------------------------------------------------------------------


def test_an_embedder_names_itself_where_it_can() -> None:
    assert fingerprint(Own()) == "own-1"
    assert fingerprint(LexicalEmbeddings()).startswith("lexical-1024-")
    assert fingerprint(LexicalEmbeddings(dimensions=64)) != fingerprint(LexicalEmbeddings(dimensions=128))


@pytest.mark.parametrize(
    ("embedder", "suffix"),
    [
        (Plain(), "Plain"),
        (Plain(model="m"), "Plain:m"),
        (Plain(model="m", model_name="n"), "Plain:n"),
        (Plain(model=object()), "Plain"),
    ],
)
def test_any_other_is_known_by_class_and_model_name(embedder: Embeddings, suffix: str) -> None:
    name = fingerprint(embedder)
    assert name == f"{Plain.__module__}.{suffix}"
    assert "object at 0x" not in name


def test_the_name_is_stable_between_objects() -> None:
    assert fingerprint(DeterministicFakeEmbedding(size=8)) == fingerprint(DeterministicFakeEmbedding(size=8))


def test_the_probe_tells_embedders_apart() -> None:
    one = embed_documents(DeterministicFakeEmbedding(size=64), [module.PROBE])[0]
    other = embed_documents(LexicalEmbeddings(dimensions=64), [module.PROBE])[0]
    assert abs(float(one @ other)) < 0.9


# -- tokens ------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_by_the_embedder_where_it_can() -> None:
    assert token_counter(Own())("abc") == 6
    assert max_tokens(Own()) == 77
    assert max_tokens(Plain()) is None


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("知识库", 3),
        ("abcd", 1),
        ("abcde", 2),
        ("知识库 abc", 4),  # three Han, and " abc" is four others
        ("，。", 2),
        ("😀😀", 2),
    ],
)
def test_without_a_count_han_characters_and_four_letters_are_a_token_each(text: str, tokens: int) -> None:
    assert token_counter(Plain())(text) == tokens


def test_the_estimate_never_says_nothing_for_something() -> None:
    assert all(token_counter(Plain())("a" * length) >= 1 for length in range(1, 9))
