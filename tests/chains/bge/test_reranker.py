"""BgeReranker: parity with FlagReranker and sentence-transformers, order, scores, its place in the chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bge_models import build_reranker
from langchain_core.documents import Document

from chains.bge.directory import ModelDirectoryError
from chains.bge.reranker import BgeReranker
from chains.config import BgeRerankerConfig, RagConfig
from chains.retrieval_qa import build_reranker as configured
from chains.retrieval_qa import build_retrieval_qa
from chains.vectorstores import FaissVectorStore

# characters of the small vocabulary only: FlagReranker decodes ids and encodes again, which unknown ones do not survive
PAIRS = [
    ("怎样备份知识库？", "知识库的备份。"),
    ("怎样备份知识库？", "第一条 为了检索文档，备份向量；" * 3),
    ("rag", "bm25 and vectors"),
    ("问题", ""),
    ("问题", "文档" * 400),
]


@pytest.fixture(scope="module")
def bert_reranker(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(bert, tmp_path_factory.mktemp("rerankers") / "bert")


@pytest.fixture(scope="module")
def xlm_reranker(xlm_roberta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(xlm_roberta, tmp_path_factory.mktemp("rerankers") / "xlm-roberta")


@pytest.mark.parametrize("model", ["bert_reranker", "xlm_reranker"])
def test_scores_are_those_of_flagreranker(model: str, request: pytest.FixtureRequest) -> None:
    from FlagEmbedding import FlagReranker

    path = request.getfixturevalue(model)
    flag = FlagReranker(str(path), use_fp16=False, devices="cpu", max_length=512)
    pairs = [pair for pair in PAIRS if pair[1]]  # it leaves out the second [SEP] before an empty text
    scores = np.array(flag.compute_score([list(pair) for pair in pairs], normalize=True))
    ours = BgeReranker(model=str(path)).scores(pairs)
    assert np.allclose(ours, scores, atol=1e-4)


@pytest.mark.parametrize("model", ["bert_reranker", "xlm_reranker"])
def test_scores_are_those_of_sentence_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from sentence_transformers import CrossEncoder

    path = request.getfixturevalue(model)
    expected = CrossEncoder(str(path), device="cpu", max_length=512).predict(PAIRS[:4])
    assert np.allclose(BgeReranker(model=str(path)).scores(PAIRS[:4]), expected, atol=1e-4)


def test_the_best_stands_first_and_scores_are_told(bert_reranker: Path) -> None:
    reranker = BgeReranker(model=str(bert_reranker))
    documents = [Document(id=str(i), page_content=text, metadata={"score": 0.1}) for i, (_, text) in enumerate(PAIRS)]
    ranked = reranker.compress_documents(documents, "怎样备份知识库？")
    scores = [document.metadata["rerank_score"] for document in ranked]
    assert scores == sorted(scores, reverse=True)
    assert {document.id for document in ranked} == {"0", "1", "2", "3", "4"}
    assert all(document.metadata["score"] == max(0.1, document.metadata["rerank_score"]) for document in ranked)
    assert documents[0].metadata == {"score": 0.1}  # what was given stays as it was


def test_a_low_scoring_reranker_does_not_silence_the_retriever(
    bert_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = BgeReranker(model=str(bert_reranker))
    logit = np.log(0.01 / 0.99)
    monkeypatch.setattr(BgeReranker, "logits", lambda self, pairs: np.full(len(pairs), logit, np.float32))
    (ranked,) = reranker.compress_documents([Document(page_content="答案", metadata={"score": 0.8})], "问题")
    assert ranked.metadata == {"score": 0.8, "rerank_score": 0.01}


def test_passages_of_which_the_model_is_certain_are_still_put_in_order(
    bert_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the sigmoid is 1 for all of them: 1 - 1 / (1 + e^17) = 1 - 4e-8, half the distance to the next one."""
    logits = np.array([18.0, 20.0, 19.0, -120.0], np.float32)
    monkeypatch.setattr(BgeReranker, "logits", lambda self, pairs: logits)
    documents = [Document(id=str(index), page_content="答案") for index in range(4)]
    ranked = BgeReranker(model=str(bert_reranker)).compress_documents(documents, "问题")
    assert [document.id for document in ranked] == ["1", "2", "0", "3"]
    assert [document.metadata["rerank_score"] for document in ranked] == [1.0, 1.0, 1.0, 0.0]


def test_no_documents_are_no_documents(bert_reranker: Path) -> None:
    assert BgeReranker(model=str(bert_reranker)).compress_documents([], "问题") == []


def test_a_very_long_question_leaves_room_for_the_passage(bert_reranker: Path) -> None:
    one, other = BgeReranker(model=str(bert_reranker), max_length=32).scores([("问" * 99, "知识"), ("问" * 99, "备份")])
    assert one != other


def test_an_embedder_is_not_taken_for_a_reranker(bert: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="no reranker"):
        BgeReranker(model=str(bert)).scores(PAIRS)


def test_one_reranker_serves_all_chains_of_a_config(bert_reranker: Path) -> None:
    config = BgeRerankerConfig(model=str(bert_reranker))
    assert configured(config) is configured(BgeRerankerConfig(model=str(bert_reranker)))


def test_a_configured_embedder_and_reranker_answer_in_the_chain(
    bert: Path, bert_reranker: Path, tmp_path: Path
) -> None:
    """From YAML data alone: the knowledge base is filled, the passages come reranked, the embedder is recorded."""
    data = {
        "kb": str(tmp_path / "kb"),
        "embeddings": {"_type": "bge", "model": str(bert), "engine": "torch"},
        "reranker": {"_type": "bge_reranker", "model": str(bert_reranker)},
        "top_k": 2,
        "min_relevance": 0,
    }
    config = RagConfig.from_dict(data, where="test")
    from chains.retrieval_qa import open_vectorstore

    store: FaissVectorStore = open_vectorstore(config, create=True)
    store.add_texts([text for _, text in PAIRS if text])
    found = build_retrieval_qa(config).invoke("怎样备份知识库？")["source_documents"]
    assert len(found) == 2
    assert all(0 <= document.metadata["rerank_score"] <= 1 for document in found)
    generation = store.knowledge_base.generation()
    assert generation is not None
    assert generation.fingerprint.startswith("bge-64-")
    store.knowledge_base.close()
