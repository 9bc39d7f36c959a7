"""FaissVectorStore: LangChain's own suite, and what it promises beyond it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from chains.knowledge_base import FingerprintError, KnowledgeBase, KnowledgeBaseError
from chains.vectorstores import FaissVectorStore, identify, made_by


class TestFaissVectorStoreStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Generator[VectorStore, None, None]:
        with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
            yield FaissVectorStore(self.get_embeddings(), knowledge_base)


class AxisEmbeddings(Embeddings):
    """A text made of the digits 0-7 points along their axes; anything else counts as 7."""

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(8)
        for character in text:
            vector[int(character) if character in "0123456" else 7] += 1
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def store(tmp_path: Path) -> Generator[FaissVectorStore, None, None]:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield FaissVectorStore(AxisEmbeddings(), knowledge_base)


def texts(documents: list[Document]) -> list[str]:
    return [document.page_content for document in documents]


def test_documents_survive_a_restart(tmp_path: Path) -> None:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        FaissVectorStore(AxisEmbeddings(), knowledge_base).add_texts(["0", "1"], [{"n": 0}, {"n": 1}], ids=["a", "b"])
    with KnowledgeBase(tmp_path / "kb") as knowledge_base:
        found = FaissVectorStore(AxisEmbeddings(), knowledge_base).similarity_search("1", k=1)
    assert found == [Document(id="b", page_content="1", metadata={"n": 1})]


def test_scores_are_cosines_in_descending_order(store: FaissVectorStore) -> None:
    store.add_texts(["0", "01", "2"])
    found = store.similarity_search_with_score("0", k=3)
    assert texts([document for document, _ in found]) == ["0", "01", "2"]
    # cos(e0, e0) = 1, cos(e0, (e0 + e1) / sqrt 2) = 0.7071, cos(e0, e2) = 0; vectors are kept in half precision
    assert [score for _, score in found] == pytest.approx([1, 2**-0.5, 0], abs=1e-3)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"lang": "zh"}, {"0", "1"}),
        ({"lang": ["zh", "en"]}, {"0", "1", "2"}),
        ({"tags": "law"}, {"1"}),
        ({"lang": "zh", "tags": "law"}, {"1"}),
        ({"missing": "x"}, set()),
        (lambda metadata: metadata["n"] > 1, {"2", "3"}),
    ],
)
def test_filter_keeps_only_matching_metadata(store: FaissVectorStore, condition: object, expected: set[str]) -> None:
    store.add_texts(
        ["0", "1", "2", "3"],
        [
            {"n": 0, "lang": "zh"},
            {"n": 1, "lang": "zh", "tags": ["law", "new"]},
            {"n": 2, "lang": "en"},
            {"n": 3, "lang": "fr"},
        ],
    )
    assert set(texts(store.similarity_search("0", k=4, filter=condition))) == expected


def test_filter_key_with_odd_characters_is_data_not_sql(store: FaissVectorStore) -> None:
    key = "a'b.c [0] $"
    store.add_texts(["0", "1"], [{key: 1}, {key: 2}])
    assert texts(store.similarity_search("0", k=4, filter={key: 2})) == ["1"]


def test_mmr_prefers_something_different_over_a_near_copy(store: FaissVectorStore) -> None:
    store.add_texts(["0001", "0001", "02"], ids=["a", "b", "c"])
    assert texts(store.similarity_search("0", k=2)) == ["0001", "0001"]
    assert texts(store.max_marginal_relevance_search("0", k=2, lambda_mult=0.3)) == ["0001", "02"]
    assert store.max_marginal_relevance_search("0", k=2, filter={"none": 1}) == []


def test_retriever_takes_langchain_search_options(store: FaissVectorStore) -> None:
    store.add_texts(["0", "01", "2"])
    retriever = store.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.5})
    assert texts(retriever.invoke("0")) == ["0", "01"]
    assert texts(store.as_retriever(search_kwargs={"k": 1}).invoke("2")) == ["2"]


def test_an_id_given_again_replaces_the_document(store: FaissVectorStore) -> None:
    store.add_texts(["0"], ids=["a"])
    store.add_texts(["1"], ids=["a"])
    assert texts(store.similarity_search("0", k=5)) == ["1"]
    assert store.knowledge_base.chunk_count() == 1


def test_an_id_given_twice_in_one_call_keeps_the_last(store: FaissVectorStore) -> None:
    assert store.add_texts(["0", "1"], ids=["a", "a"]) == ["a", "a"]
    assert texts(store.get_by_ids(["a"])) == ["1"]


def test_deleting_everything_leaves_an_empty_store(store: FaissVectorStore) -> None:
    store.add_texts(["0", "1"])
    assert store.delete() is True
    assert store.similarity_search("0") == []
    assert store.knowledge_base.sources() == []


def test_from_texts_needs_and_uses_a_directory(tmp_path: Path) -> None:
    made = FaissVectorStore.from_texts(["0"], AxisEmbeddings(), path=tmp_path / "kb")
    assert texts(made.similarity_search("0")) == ["0"]
    with pytest.raises(Exception, match="path=DIRECTORY"):
        FaissVectorStore.from_texts(["0"], AxisEmbeddings())


def test_counts_that_do_not_match_are_named(store: FaissVectorStore) -> None:
    with pytest.raises(ValueError, match="2 texts, 1 metadatas"):
        store.add_texts(["0", "1"], [{}])


@pytest.mark.parametrize("other", [DeterministicFakeEmbedding(size=8), DeterministicFakeEmbedding(size=16)])
def test_a_query_with_another_embedder_is_refused_by_name(tmp_path: Path, other: Embeddings) -> None:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        FaissVectorStore(AxisEmbeddings(), knowledge_base).add_texts(["0"])
        with pytest.raises(FingerprintError, match=r"AxisEmbeddings.*DeterministicFakeEmbedding"):
            FaissVectorStore(other, knowledge_base).similarity_search("0")


def test_same_class_with_other_weights_is_refused_by_its_probe(tmp_path: Path) -> None:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        FaissVectorStore(DeterministicFakeEmbedding(size=8), knowledge_base).add_texts(["0"])
        with pytest.raises(FingerprintError, match="16 维"):
            FaissVectorStore(DeterministicFakeEmbedding(size=16), knowledge_base).add_texts(["1"])
        assert knowledge_base.chunk_count() == 1


def test_a_second_store_sees_what_the_first_one_wrote(store: FaissVectorStore) -> None:
    with KnowledgeBase(store.knowledge_base.path) as other:
        reader = FaissVectorStore(AxisEmbeddings(), other)
        assert reader.similarity_search("0") == []
        store.add_texts(["0", "1"], ids=["a", "b"])
        assert len(reader.similarity_search("0")) == 2
        store.delete(["a"])
        assert texts(reader.similarity_search("0")) == ["1"]


@pytest.mark.parametrize("file", ["faiss-1.index", "faiss-1.state"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "noise", "zeros", "empty"])
def test_a_damaged_cache_is_rebuilt_from_the_database(store: FaissVectorStore, damage: str, file: str) -> None:
    store.add_texts(["0", "1", "2"])
    store.save_cache()
    cache = store.knowledge_base.path / file
    original = cache.read_bytes()
    if damage == "missing":
        cache.unlink()
    else:
        noise = bytes(byte ^ 0x5A for byte in original)
        damaged = {
            "truncated": original[:-7],
            "noise": original[:90] + noise[90:],
            "zeros": bytes(len(original)),
            "empty": b"",
        }
        cache.write_bytes(damaged[damage])
    with KnowledgeBase(store.knowledge_base.path) as again:
        reopened = FaissVectorStore(AxisEmbeddings(), again)
        assert texts(reopened.similarity_search("1", k=1)) == ["1"]
        reopened.save_cache()
    assert len(cache.read_bytes()) == len(original)


def test_a_cache_of_another_history_is_not_trusted(tmp_path: Path) -> None:
    """A restored backup counts the same chunk ids again for other texts."""
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        first = FaissVectorStore(AxisEmbeddings(), knowledge_base)
        first.add_texts(["0"])
        first.save_cache()
    caches = {file: file.read_bytes() for file in (tmp_path / "kb").glob("faiss-*")}
    assert len(caches) == 2
    for file in (tmp_path / "kb").glob("kb.sqlite*"):
        file.unlink()
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        FaissVectorStore(AxisEmbeddings(), knowledge_base).add_texts(["1"])
        for file, content in caches.items():
            file.write_bytes(content)
        found = FaissVectorStore(AxisEmbeddings(), knowledge_base).similarity_search_with_score("1", k=1)
    assert found[0][1] == pytest.approx(1.0, abs=1e-3)


# -- generations -----------------------------------------------------------------------------------------------------


class MirroredEmbeddings(AxisEmbeddings):
    """The same texts in the opposite directions."""

    def embed_query(self, text: str) -> list[float]:
        return [-value for value in super().embed_query(text)]


def switched(store: FaissVectorStore) -> FaissVectorStore:
    """A store over the same folder, by another embedder that answers from now on."""
    knowledge_base = store.knowledge_base
    other = FaissVectorStore(MirroredEmbeddings(), knowledge_base, embedder={"_type": "mirrored"})
    generation = knowledge_base.writer().add_generation(*identify(other.embeddings), other.embedder)
    ids = knowledge_base.without_vector(generation.id)
    rows = [other.embed_query(text) for _, text in knowledge_base.index_texts(ids)]
    knowledge_base.writer().add_vectors(generation.id, ids, np.array(rows))
    knowledge_base.writer().switch_generation(generation.id)
    return other


def test_a_generation_knows_the_config_its_embedder_was_made_from(store: FaissVectorStore) -> None:
    store.add_texts(["0"])
    other = switched(store)
    assert [made.embedder for made in store.knowledge_base.generations()] == [None, {"_type": "mirrored"}]
    assert made_by(store.knowledge_base.generations()[0], store.embeddings)
    assert not made_by(store.knowledge_base.generations()[0], other.embeddings)


def test_after_a_switch_the_new_embedder_answers_and_the_old_one_is_refused_by_name(store: FaissVectorStore) -> None:
    store.add_texts(["0", "1"])
    other = switched(store)
    assert other.similarity_search_with_score("1", k=1)[0][1] == pytest.approx(1, abs=1e-3)
    with pytest.raises(FingerprintError, match=r"MirroredEmbeddings.*AxisEmbeddings"):
        FaissVectorStore(AxisEmbeddings(), store.knowledge_base).similarity_search("1")


def test_a_store_that_was_open_over_a_switch_answers_from_the_kept_vectors_and_writes_nothing(
    store: FaissVectorStore,
) -> None:
    store.add_texts(["0", "1"])
    assert texts(store.similarity_search("1", k=1)) == ["1"]
    switched(store)
    assert texts(store.similarity_search("1", k=1)) == ["1"]
    with pytest.raises(FingerprintError, match=r"MirroredEmbeddings.*AxisEmbeddings"):
        store.add_texts(["2"])
    assert store.knowledge_base.chunk_count() == 2
    assert texts(store.similarity_search("1", k=1)) == ["1"]


def test_a_write_whose_embedder_was_changed_meanwhile_is_refused_whole(store: FaissVectorStore) -> None:
    store.add_texts(["0"], ids=["a"])
    embedder = store.embeddings
    assert isinstance(embedder, AxisEmbeddings)

    def embed_documents(passages: list[str]) -> list[list[float]]:
        del embedder.embed_documents  # type: ignore[method-assign]
        switched(store)
        return embedder.embed_documents(passages)

    embedder.embed_documents = embed_documents  # type: ignore[method-assign]
    with pytest.raises(KnowledgeBaseError, match="changed over to another embedder"):
        store.add_texts(["1", "2"], ids=["a", "b"])
    assert texts(store.get_by_ids(["a", "b"])) == ["0"]
    assert len(store.knowledge_base.without_vector(2)) == 0


# -- equal texts -----------------------------------------------------------------------------------------------------


def test_equal_texts_under_ids_of_their_own_are_documents_of_their_own(store: FaissVectorStore) -> None:
    store.add_texts(["0", "0"], [{"source": "x"}, {"source": "y"}], ids=["a", "b"])
    assert texts(store.similarity_search("0", k=5)) == ["0", "0"]
    assert store.delete(["a"]) is True
    assert [document.metadata["source"] for document in store.similarity_search("0", k=5)] == ["y"]


def test_deleting_what_files_brought_in_works_by_id_too(store: FaissVectorStore) -> None:
    store.add_texts(["0"])
    (key,) = [chunk.key for chunk in store.knowledge_base.chunks([1]).values()]
    assert store.delete([key, "unknown"]) is True
    assert store.similarity_search("0") == []
