"""BgeReranker: parity with FlagReranker and sentence-transformers, engines, order, scores, its place in the chain."""

from __future__ import annotations

import gc
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bge_models import build_reranker
from langchain_core.documents import Document

from chains.bge.directory import ModelDirectoryError
from chains.bge.reranker import BgeReranker
from chains.bge.reranker_engines import disagreement
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
TOPICS = ("备份知识库", "向量模型检索", "文档问题答案", "第一条为了", "怎样做检索", "知识问题", "rag and bm25")
TEXTS = [TOPICS[number % 7] * (1 + number % 4) + str(number) for number in range(60)]
QUESTION = "怎样备份知识库？"


@pytest.fixture(scope="module")
def bert_reranker(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(bert, tmp_path_factory.mktemp("rerankers") / "bert", spread=0.1)


@pytest.fixture(scope="module")
def xlm_reranker(xlm_roberta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(xlm_roberta, tmp_path_factory.mktemp("rerankers") / "xlm-roberta", spread=0.1)


@pytest.fixture(scope="module")
def reranker_adapter(bert_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on `bert_reranker`, and a head of its own."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(str(bert_reranker)),
        peft.LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    target = tmp_path_factory.mktemp("rerankers") / "adapter"
    model.save_pretrained(str(target))
    return target


@pytest.mark.parametrize("model", ["bert_reranker", "xlm_reranker"])
def test_scores_are_those_of_flagreranker(model: str, request: pytest.FixtureRequest) -> None:
    from FlagEmbedding import FlagReranker

    path = request.getfixturevalue(model)
    flag = FlagReranker(str(path), use_fp16=False, devices="cpu", max_length=512)
    pairs = [pair for pair in PAIRS if pair[1]]  # it leaves out the second [SEP] before an empty text
    scores = np.array(flag.compute_score([list(pair) for pair in pairs], normalize=True))
    ours = BgeReranker(model=str(path), engine="torch").scores(pairs)
    assert np.allclose(ours, scores, atol=1e-4)


@pytest.mark.parametrize("model", ["bert_reranker", "xlm_reranker"])
def test_scores_are_those_of_sentence_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from sentence_transformers import CrossEncoder

    path = request.getfixturevalue(model)
    expected = CrossEncoder(str(path), device="cpu", max_length=512).predict(PAIRS[:4])
    ours = BgeReranker(model=str(path), engine="torch").scores(PAIRS[:4])
    assert np.allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("model", ["bert_reranker", "xlm_reranker"])
def test_eight_bits_agree_with_float32_and_keep_the_order(model: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(model))
    exact = BgeReranker(model=path, engine="torch")
    apart = np.argsort(-exact.logits([(QUESTION, text) for text in TEXTS]))[::12]  # not by rounding
    documents = [Document(id=str(number), page_content=TEXTS[number]) for number in sorted(apart)]
    ours = BgeReranker(model=path, engine="onnx_int8")
    ranked = ours.compress_documents(documents, QUESTION)
    assert ours.running.name == "onnx_int8"
    assert [document.id for document in ranked] == [str(number) for number in apart]
    assert np.abs(ours.logits(PAIRS) - exact.logits(PAIRS)).max() <= 0.02
    assert np.abs(ours.scores(PAIRS) - exact.scores(PAIRS)).max() <= 0.01


def test_eight_bits_follow_an_adapter(bert_reranker: Path, reranker_adapter: Path) -> None:
    plain, exact, ours = (
        BgeReranker(model=str(bert_reranker), **settings).logits(PAIRS)
        for settings in (
            {"engine": "onnx_int8"},
            {"engine": "torch", "adapter": str(reranker_adapter)},
            {"engine": "onnx_int8", "adapter": str(reranker_adapter)},
        )
    )
    assert np.abs(ours - exact).max() <= 0.02
    assert np.abs(ours - plain).max() > 0.1


def test_an_engine_apart_from_float32_gives_way_to_it(
    bert_reranker: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("chains.bge.reranker_engines.MOST_APART", -1.0)
    reranker = BgeReranker(model=str(bert_reranker), engine="onnx_int8")
    logits = reranker.logits(PAIRS)
    assert "onnx_int8, down in float32, output in float32 refuses itself: scores 0.0" in caplog.text
    assert reranker.running.name == "torch cpu float32"
    assert np.array_equal(logits, BgeReranker(model=str(bert_reranker), engine="torch").logits(PAIRS))


def test_sixteen_bits_that_overflow_give_way_to_float32(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    model = build_reranker(bert, tmp_path / "model", spread=0.1)
    sound = BgeReranker(model=str(model), engine="torch", dtype="bfloat16")
    assert sound.running.name == "torch cpu bfloat16"
    weights = load_file(model / "model.safetensors")
    wide = "bert.encoder.layer.0.intermediate.dense.weight"
    weights[wide] = weights[wide] * 1e6  # within float32, beyond the 65,504 of float16
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    overflowing = BgeReranker(model=str(model), engine="torch", dtype="float16")
    exact = BgeReranker(model=str(model), engine="torch").logits(PAIRS)
    assert np.array_equal(overflowing.logits(PAIRS), exact)
    assert overflowing.running.name == "torch cpu float32"
    assert "torch cpu float16 refuses itself: scores nan" in caplog.text


def logits_of(*values: float) -> Any:
    return np.array(values, np.float32)[:, None]


def test_trained_and_random_rerankers_are_each_held_to_what_their_order_hangs_on() -> None:
    trained, random = logits_of(-10, -6, 0, 10), logits_of(0.1, 0.12, 0.15)
    # by hand: 2% of 20 is 0.4, but near 0 a score moves by a quarter of its logit
    assert not disagreement(trained + logits_of(0.39, -0.39, 0.03, 0.39), trained)
    assert "logits 0.41" in disagreement(trained + logits_of(0.41, 0, 0, 0), trained)
    assert "scores 0.0125" in disagreement(trained + logits_of(0, 0, 0.05, 0), trained)
    assert not disagreement(random + 0.019, random)
    assert disagreement(random + 0.021, random)
    assert disagreement(random * np.float32("nan"), random)


def test_auto_takes_the_fastest_that_agrees_and_remembers_it(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_reranker(bert, tmp_path / "model", spread=0.1)
    with caplog.at_level(logging.INFO):
        first = BgeReranker(model=str(model)).running.name
        second = BgeReranker(model=str(model)).running.name
    assert first == second
    assert "fastest here that agrees" in caplog.text
    assert "the fastest of an earlier run" in caplog.text
    (note,) = (model / ".ragproj").glob("reranker-engine-*.json")
    noted = json.loads(note.read_text(encoding="utf-8"))
    assert set(noted["tokens_per_second"]) == {"torch", "onnx_int8"}
    # what is remembered is held to float32 all the same
    note.write_text(note.read_text(encoding="utf-8").replace('"engine": "torch"', '"engine": "onnx_int8"'), "utf-8")
    monkeypatch.setattr("chains.bge.reranker_engines.MOST_APART", -1.0)
    assert BgeReranker(model=str(model)).running.name == "torch cpu float32"


def test_an_engine_without_its_library_says_what_to_install(
    bert_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelDirectoryError, match=r"onnxruntime onnx: pip install 'ragproj\[models\]'"):
        BgeReranker(model=str(bert_reranker), engine="onnx_int8").scores(PAIRS)


@pytest.mark.parametrize("engine", ["torch", "onnx_int8"])
def test_cores_and_threads_at_once_give_the_scores_of_one(
    bert_reranker: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = BgeReranker(model=str(bert_reranker), engine=engine)
    pairs = [(QUESTION, text) for text in TEXTS]
    expected = reranker.logits(pairs)
    monkeypatch.setattr("chains.bge.pool.cores", lambda: 3)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: reranker.logits(pairs), range(8)):
            assert np.allclose(found, expected, atol=1e-5)


def test_two_devices_share_the_pairs_and_give_the_scores_of_one(bert_reranker: Path) -> None:
    """More pairs than one batch holds, so that both compute."""
    pairs = [(QUESTION, f"{text}{number}") for number in range(40) for text in TEXTS]
    alone = BgeReranker(model=str(bert_reranker), engine="torch", device="cpu")
    both = BgeReranker(model=str(bert_reranker), engine="torch", device="cpu,cpu")
    assert np.allclose(both.logits(pairs), alone.logits(pairs), atol=1e-5)
    assert len(both._opened().pool.engines) == 2


def test_weights_that_only_the_choice_of_an_engine_needed_are_let_go(bert_reranker: Path) -> None:
    from transformers import BertForSequenceClassification

    def networks() -> int:
        gc.collect()
        return sum(type(thing) is BertForSequenceClassification for thing in gc.get_objects())

    before = networks()
    reranker = BgeReranker(model=str(bert_reranker), engine="onnx_int8")
    reranker.scores(PAIRS)
    assert networks() == before


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
