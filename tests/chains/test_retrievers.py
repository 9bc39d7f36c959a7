"""Retrievers: LangChain's own suite, fusion against hand counts, filters, what a found document carries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from opencc import OpenCC
from pydantic import ValidationError

from chains import build_retrieval_qa, load_config
from chains.answerers import cite
from chains.evaluation import read_questions
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.knowledge_base import KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings
from chains.retrieval_qa import build_vectorstore
from chains.retrievers import (
    ChunkRetriever,
    DenseRetriever,
    HybridRetriever,
    LexicalRetriever,
    StoreRetriever,
)
from chains.vectorstores import FaissVectorStore

TEXTS = [
    "年假一共有十天。",
    "报销须在三十天内办理。",
    "离心机的最高转速是一万二千转。",
    "访客车辆停在地下二层停车场。",
    "工牌遗失后到行政部补办。",
]
KINDS: list[type[ChunkRetriever]] = [DenseRetriever, LexicalRetriever, HybridRetriever]


def make(kind: type[ChunkRetriever], store: FaissVectorStore, **options: Any) -> Any:
    fulltext = {} if kind is DenseRetriever else {"fulltext": FullTextIndex(store.knowledge_base)}
    return kind(store=store, **fulltext, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Generator[FaissVectorStore, None, None]:
    with KnowledgeBase(tmp_path_factory.mktemp("retrievers") / "kb", create=True) as knowledge_base:
        store = FaissVectorStore(LexicalEmbeddings(), knowledge_base)
        metadatas = [{"source": f"{n}.txt", "title": f"文{n}", "n": n, "even": n % 2 == 0} for n in range(len(TEXTS))]
        store.add_texts(TEXTS, metadatas, ids=[f"id{n}" for n in range(len(TEXTS))])
        yield store


@pytest.fixture
def fresh(tmp_path: Path) -> Generator[FaissVectorStore, None, None]:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield FaissVectorStore(LexicalEmbeddings(), knowledge_base)


def ids(documents: list[Document]) -> list[str | None]:
    return [document.id for document in documents]


class _Suite(RetrieversIntegrationTests):
    """LangChain's suite speaks of `k`; ours is `top_k`, so the suite's retriever takes both words."""

    kind: type[ChunkRetriever]

    @pytest.fixture(autouse=True)
    def _open(self, store: FaissVectorStore) -> None:
        type(self).store = store  # type: ignore[attr-defined]

    @property
    def retriever_constructor(self) -> Callable[..., BaseRetriever]:  # type: ignore[override]
        def construct(k: int = 3, **options: Any) -> BaseRetriever:
            retriever: BaseRetriever = make(self.kind, self.store, top_k=k, **options)  # type: ignore[attr-defined]
            return retriever

        return construct

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return "十天内最高的停车部"  # shares a term with every text

    @pytest.mark.xfail(reason="our retrievers have top_k, set when made or chosen at run time, no k of invoke")
    def test_invoke_with_k_kwarg(self, retriever: BaseRetriever) -> None:
        super().test_invoke_with_k_kwarg(retriever)


class TestDenseRetrieverStandard(_Suite):
    kind = DenseRetriever


class TestLexicalRetrieverStandard(_Suite):
    kind = LexicalRetriever


class TestHybridRetrieverStandard(_Suite):
    kind = HybridRetriever


del _Suite  # pytest would collect it by itself


# -- every retriever -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_a_document_is_found_by_its_own_words(store: FaissVectorStore, kind: type[ChunkRetriever], number: int) -> None:
    assert ids(make(kind, store).invoke(TEXTS[number]))[0] == f"id{number}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_found_document_carries_its_metadata_its_place_and_its_relevance(
    store: FaissVectorStore, kind: type[ChunkRetriever]
) -> None:
    document = make(kind, store, top_k=1).invoke(TEXTS[2])[0]
    assert document.page_content == TEXTS[2]
    assert document.id == "id2"
    metadata = document.metadata
    assert {key: metadata[key] for key in ("source", "title", "n", "even")} == {
        "source": "2.txt", "title": "文2", "n": 2, "even": True,
    }  # fmt: skip
    assert (metadata["start"], metadata["end"]) == (0, len(TEXTS[2]))
    assert store.knowledge_base.document_text(metadata["document_id"]) == TEXTS[2]
    assert 0.9 < metadata["score"] < 1  # the question is the passage itself


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_called_score_in_the_document_gives_way_to_the_relevance(
    fresh: FaissVectorStore, kind: type[ChunkRetriever]
) -> None:
    fresh.add_texts(["年假十天"], [{"score": 99, "start": "x", "end": None, "document_id": "mine"}])
    metadata = make(kind, fresh).invoke("年假十天")[0].metadata
    assert 0 < metadata["score"] < 1
    assert (metadata["start"], metadata["end"]) == (0, 4)
    assert isinstance(metadata["document_id"], int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("condition", "allowed"),
    [
        ({"even": True}, {"id0", "id2", "id4"}),
        ({"n": [1, 3]}, {"id1", "id3"}),
        ({"source": "2.txt"}, {"id2"}),
        ({"n": 99}, set()),
        ({}, {"id0", "id1", "id2", "id3", "id4"}),
    ],
)
def test_filter_allows_only_what_matches(
    store: FaissVectorStore, kind: type[ChunkRetriever], condition: dict[str, Any], allowed: set[str]
) -> None:
    found = set(ids(make(kind, store, top_k=5, filter=condition).invoke("十天内最高的停车部，离心机报销年假工牌访客")))
    assert found <= allowed
    if kind is not LexicalRetriever:
        assert found == allowed  # the dense leg ranks every allowed chunk


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_knowledge_base_finds_nothing(fresh: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    assert make(kind, fresh).invoke("年假") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_knowledge_base_smaller_than_top_k_gives_all_once(
    fresh: FaissVectorStore, kind: type[ChunkRetriever]
) -> None:
    fresh.add_texts(["年假十天", "年假五天"], ids=["a", "b"])
    found = ids(make(kind, fresh, top_k=50).invoke("年假"))
    assert sorted(map(str, found)) == ["a", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_document_is_not_found_any_more(fresh: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    fresh.add_texts(["年假十天", "年假五天"], ids=["a", "b"])
    retriever = make(kind, fresh)
    assert len(retriever.invoke("年假")) == 2
    fresh.delete(["a"])
    assert ids(retriever.invoke("年假")) == ["b"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query", ["。！？", "😀", " ", "\x00", "the of and"])
def test_a_question_without_terms_raises_nothing(
    store: FaissVectorStore, kind: type[ChunkRetriever], query: str
) -> None:
    assert len(make(kind, store, top_k=2).invoke(query)) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_equal_documents_rank_in_a_stable_order(fresh: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    fresh.add_texts(["年假十天"] * 6, ids=list("fedcba"))
    retriever = make(kind, fresh, top_k=4)
    assert [ids(retriever.invoke("年假")) for _ in range(3)] == [list("fedc")] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_is_at_least_one(store: FaissVectorStore, kind: type[ChunkRetriever], top_k: int) -> None:
    with pytest.raises(ValidationError, match="top_k"):
        make(kind, store, top_k=top_k)


@pytest.mark.parametrize("kind", KINDS)
async def test_async_finds_the_same(store: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    retriever = make(kind, store)
    assert await retriever.ainvoke("年假") == retriever.invoke("年假")


# -- one leg each --------------------------------------------------------------------------------------------------


class AxisEmbeddings(Embeddings):
    """The digits 0-7 of a text are its coordinates' axes."""

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(8)
        for character in text:
            vector[int(character) if character in "0123456" else 7] += 1
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def axes(tmp_path: Path) -> Generator[FaissVectorStore, None, None]:
    with KnowledgeBase(tmp_path / "axes", create=True) as knowledge_base:
        store = FaissVectorStore(AxisEmbeddings(), knowledge_base)
        store.add_texts(["0", "0 1", "1", "2"], ids=["a", "b", "c", "d"])
        yield store


def test_dense_scores_are_cosines(axes: FaissVectorStore) -> None:
    # "0 1" has a space on axis 7: cos = 1/sqrt(3) = .577; the others are orthogonal
    ranking = DenseRetriever(store=axes).rank("0", 4)
    assert [score for _, score in ranking] == pytest.approx([1, 3**-0.5, 0, 0], abs=1e-3)
    assert ids(DenseRetriever(store=axes).invoke("0"))[:2] == ["a", "b"]


def test_lexical_finds_only_what_shares_a_term(axes: FaissVectorStore) -> None:
    found = ids(make(LexicalRetriever, axes).invoke("0"))
    assert found == ["a", "b"]  # both hold it once; the shorter one ranks first under BM25
    assert make(LexicalRetriever, axes).invoke("9") == []


def test_lexical_filter_reaches_beyond_the_first_hits(fresh: FaissVectorStore) -> None:
    """The one allowed document is the last of two hundred."""
    texts = [f"年假 {'年假 ' * 3}" for _ in range(200)] + ["年假与许多别的内容放在一起因而排在最后"]
    fresh.add_texts(texts, [{"keep": n == 200} for n in range(201)], ids=[str(n) for n in range(201)])
    assert ids(make(LexicalRetriever, fresh, top_k=1, filter={"keep": True}).invoke("年假")) == ["200"]


# -- fusion --------------------------------------------------------------------------------------------------------


def test_hybrid_rrf_equals_fusing_both_legs_by_hand(store: FaissVectorStore) -> None:
    query = "停车场在哪里，报销要几天内办理"
    dense, lexical = make(DenseRetriever, store).rank(query, 50), make(LexicalRetriever, store).rank(query, 50)
    hybrid = make(HybridRetriever, store, fusion="rrf", dense_weight=0.3, support=0.0)
    scores: dict[int, float] = {}
    for leg, weight in ((lexical, 0.7), (dense, 0.3)):
        for place, (chunk, _) in enumerate(leg):
            scores[chunk] = scores.get(chunk, 0) + weight / (61 + place)
    assert dict(hybrid.rank(query, 5)) == pytest.approx(scores)


@pytest.mark.parametrize("fusion", ["rrf", "weighted"])
def test_hybrid_with_all_weight_on_one_leg_ranks_as_that_leg(store: FaissVectorStore, fusion: str) -> None:
    query = "停车场在哪里，报销要几天内办理"
    for kind, weight in ((DenseRetriever, 1.0), (LexicalRetriever, 0.0)):
        hybrid = make(HybridRetriever, store, fusion=fusion, dense_weight=weight, support=0.0, rescore=0)
        leg = [chunk for chunk, score in make(kind, store).rank(query, 5) if score > 0]
        assert [chunk for chunk, _ in hybrid.rank(query, 5)][: len(leg)] == leg


def test_hybrid_gives_more_than_fetch_where_more_is_asked(store: FaissVectorStore) -> None:
    assert len(make(HybridRetriever, store, fetch=1, top_k=5).invoke("年假报销")) == 5


# -- others --------------------------------------------------------------------------------------------------------


def test_a_store_retriever_asks_any_store_for_top_k() -> None:
    other = InMemoryVectorStore(AxisEmbeddings())
    other.add_texts(["0", "1", "2"], ids=["a", "b", "c"])
    assert ids(StoreRetriever(vectorstore=other, top_k=1).invoke("1")) == ["b"]
    assert len(StoreRetriever(vectorstore=other).invoke("1")) == 3


# -- what is asked of the hits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_vector_saves_embedding_the_question(store: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    retriever = make(kind, store)
    vector = store.embed_query(TEXTS[1])
    assert retriever.rank(TEXTS[1], 5, vector=vector) == retriever.rank(TEXTS[1], 5)


def test_a_second_look_lets_the_named_document_lead(fresh: FaissVectorStore) -> None:
    """Both chunks say the same; only the second one's document is the one the question names."""
    fresh.add_texts(["一共有十天。", "一共有十天。 "], [{"title": "报销"}, {"title": "年假"}], ids=["a", "b"])
    assert ids(make(HybridRetriever, fresh).invoke("年假一共有几天？"))[0] == "b"


def test_a_second_look_reaches_as_far_as_it_is_told(store: FaissVectorStore) -> None:
    query = "停车场在哪里，报销要几天内办理"
    plain = dict(make(HybridRetriever, store, rescore=0).rank(query, 5))
    once = dict(make(HybridRetriever, store, rescore=1).rank(query, 5))
    changed = [chunk for chunk in plain if plain[chunk] != once[chunk]]
    assert changed == [max(plain, key=lambda chunk: plain[chunk])]


def test_the_dense_leg_weighs_less_where_its_vectors_count_words(
    store: FaissVectorStore, axes: FaissVectorStore
) -> None:
    query = "停车场在哪里，报销要几天内办理"
    assert make(HybridRetriever, store).rank(query, 5) == make(HybridRetriever, store, dense_weight=0.1).rank(query, 5)
    assert make(HybridRetriever, axes).rank("0 1", 4) == make(HybridRetriever, axes, dense_weight=0.5).rank("0 1", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_gives_no_more_chunks_than_allowed(fresh: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    texts = ["年假十天", "年假与事假", "年假的申请", "年假的折算与工资", "请年假须提前一周书面说明"]
    fresh.add_texts(texts, [{"source": "a"}] * 4 + [{"source": "b"}], ids=list("12345"))
    found = make(kind, fresh, top_k=3, per_source=2).invoke("年假")
    assert [document.metadata["source"] for document in found].count("a") == 2
    assert "5" in ids(found)
    assert len(make(kind, fresh, top_k=4, per_source=1).invoke("年假")) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_variety_brings_in_what_a_copy_would_push_out(fresh: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    fresh.add_texts(["年假十天整", "年假十天整。", "年假须书面申请"], ids=["a", "copy", "other"])
    assert set(ids(make(kind, fresh, top_k=2).invoke("年假十天"))) == {"a", "copy"}
    assert "other" in ids(make(kind, fresh, top_k=2, mmr_lambda=0.3).invoke("年假十天"))


class Backwards(BaseDocumentCompressor):
    """A reranker that turns the order round, and remembers what it was given."""

    seen: list[tuple[str, int]]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        self.seen.append((query, len(documents)))
        return list(reversed(documents))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reranker_orders_more_than_are_returned(store: FaissVectorStore, kind: type[ChunkRetriever]) -> None:
    query = "十天内最高的停车部"
    plain = ids(make(kind, store, top_k=4).invoke(query))
    reranker = Backwards(seen=[])
    assert ids(make(kind, store, top_k=2, reranker=reranker, rerank_fetch=4).invoke(query)) == plain[::-1][:2]
    assert reranker.seen == [(query, 4)]


def test_a_store_retriever_reranks_too() -> None:
    other = InMemoryVectorStore(AxisEmbeddings())
    other.add_texts(["0", "0 1", "1"], ids=["a", "b", "c"])
    found = StoreRetriever(vectorstore=other, top_k=1, reranker=Backwards(seen=[]), rerank_fetch=2).invoke("0")
    assert ids(found) == ["b"]


def test_the_chain_reranks_with_what_it_is_given(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}", "top_k=1", "retriever.rerank_fetch=2"])
    store = build_vectorstore(config, create=True)
    store.add_texts(["年假一共有十天。", "年假须提前申请。"], ids=["a", "b"])
    plain = build_retrieval_qa(config, vectorstore=store).invoke("年假有几天？")["source_documents"]
    reranked = build_retrieval_qa(config, vectorstore=store, reranker=Backwards(seen=[])).invoke("年假有几天？")
    assert len(plain) == len(reranked["source_documents"]) == 1
    assert {*ids(plain), *ids(reranked["source_documents"])} == {"a", "b"}
    store.knowledge_base.close()


@pytest.mark.parametrize("kind", ["dense", "lexical", "hybrid"])
def test_every_retriever_of_a_config_gets_its_options(tmp_path: Path, kind: str) -> None:
    options = ["filter.even=true", "per_source=1", "mmr_lambda=0.5", "neighbours=50"]
    overrides = [f"kb={tmp_path / 'kb'}", f"retriever._type={kind}", *(f"retriever.{option}" for option in options)]
    config = load_config(None, overrides)
    store = build_vectorstore(config, create=True)
    store.add_texts(TEXTS, [{"even": n % 2 == 0, "source": str(n % 4)} for n in range(5)])
    qa = build_retrieval_qa(config, vectorstore=store)
    for name in ("dense", "lexical", "hybrid"):
        found = qa.retriever.invoke("十天内最高的停车部", {"configurable": {"retriever": name}})
        assert found
        assert all(document.metadata["even"] for document in found)
        sources = [document.metadata["source"] for document in found]
        assert len(sources) == len(set(sources))
    store.knowledge_base.close()


class Shortens(BaseDocumentCompressor):
    """Makes new documents of their middles, as LangChain's extractors do: no id, and of the metadata what it likes."""

    kept: list[str]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        return [
            Document(document.page_content[2:-1], metadata={key: document.metadata[key] for key in self.kept})
            for document in documents
        ]


class Rewrites(Shortens):
    """Says it in its own words."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        shorter = super().compress_documents(documents, query, callbacks)
        return [Document("转述", metadata=document.metadata) for document in shorter]


PLACE = ["document_id", "start", "end"]


@pytest.mark.parametrize("kept", [PLACE, [*PLACE, "score", "source"]])
def test_text_that_a_compressor_shortened_is_found_at_its_place(book: FaissVectorStore, kept: list[str]) -> None:
    query = "丙方应当在几日内付款？"
    (plain,) = make(HybridRetriever, book, top_k=1).invoke(query)
    (short,) = make(HybridRetriever, book, top_k=1, rerank_fetch=1, reranker=Shortens(kept=kept)).invoke(query)
    text = book.knowledge_base.document_text(plain.metadata["document_id"])
    assert text is not None
    assert short.page_content == plain.page_content[2:-1]
    assert text[short.metadata["start"] : short.metadata["end"]] == short.page_content
    assert (short.id, short.metadata["score"]) == (plain.id, plain.metadata["score"])
    (big,) = make(HybridRetriever, book, top_k=1, rerank_fetch=1, reranker=Shortens(kept=kept), neighbours=60).invoke(
        query
    )
    assert len(big.page_content) > len(plain.page_content), "it grows by its neighbours all the same"


def test_of_what_a_compressor_rewrote_the_whole_chunk_is_cited(book: FaissVectorStore) -> None:
    query = "丙方应当在几日内付款？"
    (plain,) = make(HybridRetriever, book, top_k=1).invoke(query)
    assert make(HybridRetriever, book, top_k=1, rerank_fetch=1, reranker=Rewrites(kept=PLACE)).invoke(query) == [plain]


def test_documents_of_a_compressors_own_break_no_answer(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}", "retriever.neighbours=50"])
    store = build_vectorstore(config, create=True)
    store.add_texts(["年假一共有十天。"])
    model = FakeListChatModel(responses=["十天。[1]"])
    qa = build_retrieval_qa(config, vectorstore=store, llm=model, reranker=Rewrites(kept=[]))
    assert qa.invoke("年假有几天？")["refused"] is True  # nothing says how relevant they are
    store.knowledge_base.close()


@pytest.mark.parametrize("kind", KINDS)
def test_one_source_that_ranks_before_all_others_leaves_them_their_places(
    fresh: FaissVectorStore, kind: type[ChunkRetriever]
) -> None:
    big = [f"年假十天 第{n}条" for n in range(150)]
    others = [f"另一份文件里说，员工每满一年可以申请的年假在第{n}款里写明，此处从略不再重复" for n in range(3)]
    sources = ["big"] * len(big) + [f"other{n}" for n in range(len(others))]
    fresh.add_texts(big + others, [{"source": source} for source in sources])
    found = make(kind, fresh, top_k=4, per_source=1).invoke("年假十天")
    assert sorted(document.metadata["source"] for document in found) == ["big", "other0", "other1", "other2"]


def test_the_same_text_elsewhere_is_told_of_within_the_filter_only(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"id": name, "title": "假", "text": "年假一共有十天。", "team": team}, ensure_ascii=False) + "\n"
            for name, team in (("a", "x"), ("b", "y"), ("c", "y"))
        ),
        encoding="utf-8",
    )
    store = build_vectorstore(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True)
    Ingestor(store, FullTextIndex(store.knowledge_base)).ingest([tmp_path / "rows.jsonl"])
    (every,) = make(HybridRetriever, store).invoke("年假")
    assert [other["id"] for other in every.metadata["also_in"]] == ["b", "c"]
    (some,) = make(HybridRetriever, store, filter={"team": "y"}).invoke("年假")
    assert (some.metadata["id"], [other["id"] for other in some.metadata["also_in"]]) == ("b", ["c"])
    (found,) = store.similarity_search("年假", filter={"team": "y"})
    assert found.metadata["team"] == "y"
    store.knowledge_base.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_with_fields_named_like_ours_can_be_cited(
    fresh: FaissVectorStore, kind: type[ChunkRetriever]
) -> None:
    fresh.add_texts(["年假一共有十天。"], [{"source": "a", "parts": 12, "also_in": 12, "score": "x"}])
    (found,) = make(kind, fresh).invoke("年假")
    assert not {"parts", "also_in"} & set(found.metadata)
    assert 0 < found.metadata["score"] <= 1
    assert cite(1, found, 0, 2)["quote"] == "年假"


# -- small to big, through a retriever (tests/chains/test_passages.py has the rules) -----------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Generator[FaissVectorStore, None, None]:
    """A file of many chunks."""
    path = tmp_path / "book.txt"
    path.write_text(
        "".join(f"第{n}条 {'甲乙丙丁戊己庚辛'[n]}方应当在{n}日内付款。\n" for n in range(8)), encoding="utf-8"
    )
    config = load_config(None, [f"kb={tmp_path / 'kb'}", "splitter.chunk_size=20"])
    store = build_vectorstore(config, create=True)
    fulltext = FullTextIndex(store.knowledge_base)
    Ingestor(store, fulltext, loader=config.loader, splitter=config.splitter).ingest([path])
    yield store
    store.knowledge_base.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_passages_are_the_documents_own_text_and_never_repeat_any(
    book: FaissVectorStore, kind: type[ChunkRetriever], budget: int
) -> None:
    found = make(kind, book, top_k=4, neighbours=budget).invoke("丙方和丁方应当在几日内付款？庚方呢？")
    text = book.knowledge_base.document_text(found[0].metadata["document_id"])
    assert text is not None
    places = sorted((document.metadata["start"], document.metadata["end"]) for document in found)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
    for document in found:
        start, end = document.metadata["start"], document.metadata["end"]
        assert document.page_content == text[start:end]
        assert document.metadata["parts"][0]["start"] == start
    if budget == 10_000:
        assert [document.page_content for document in found] == [text]


def test_a_passage_keeps_the_relevance_and_the_id_of_its_best_hit(book: FaissVectorStore) -> None:
    small = make(HybridRetriever, book, top_k=1).invoke("丙方应当在几日内付款？")[0]
    big = make(HybridRetriever, book, top_k=1, neighbours=60).invoke("丙方应当在几日内付款？")[0]
    assert small.page_content in big.page_content
    assert len(small.page_content) < len(big.page_content) <= 60
    assert (big.id, big.metadata["score"], big.metadata["source"]) == (
        small.id,
        small.metadata["score"],
        small.metadata["source"],
    )


# -- the same question, written otherwise ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("离心机的最高转速是多少", "離心機的最高轉速是多少"),
        ("访客车辆停在哪里", "訪客車輛停在哪裡"),
        ("XR-7 的 BGE-M3", "ｘｒ－７ 的 bge-m3"),
        ("（三十）天内，报销", "(三十)天内,报销"),
    ],
)
def test_script_width_and_case_of_a_question_change_nothing(
    store: FaissVectorStore, kind: type[ChunkRetriever], one: str, other: str
) -> None:
    retriever = make(kind, store)
    found, same = retriever.invoke(one), retriever.invoke(other)
    assert ids(found) == ids(same)
    assert [d.metadata["score"] for d in found] == [d.metadata["score"] for d in same]


def test_traditional_questions_find_what_simplified_ones_do(shared_data: Path, tmp_path: Path) -> None:
    """Fifty questions of cmrc2018_trial over its 256 passages, by OpenCC; benchmarks/retrieval_quality.py asks all."""
    config = load_config(None, [f"kb={tmp_path / 'kb'}"])
    store = build_vectorstore(config, create=True)
    fulltext = FullTextIndex(store.knowledge_base)
    Ingestor(store, fulltext, splitter=config.splitter).ingest([shared_data / "cmrc2018_trial_passages.jsonl"])
    asked = [row for row in read_questions(shared_data / "cmrc2018_trial.jsonl") if row.question.strip()][:50]
    convert = OpenCC("s2t").convert
    retriever = make(HybridRetriever, store, top_k=1)
    hits = {"plain": 0, "traditional": 0}
    for row in asked:
        for form, question in (("plain", row.question), ("traditional", convert(row.question))):
            hits[form] += retriever.invoke(question)[0].metadata["id"] in row.gold
    assert hits["plain"] >= 46  # .965 of 50 would be 48
    assert abs(hits["plain"] - hits["traditional"]) <= 1
    store.knowledge_base.close()
