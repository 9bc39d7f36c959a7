"""What only a GPU can show: the same vectors, scores, losses and answers as the CPU's. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bge_models import build_bert, build_reranker, build_xlm_roberta
from training_tasks import make_rows, reranker_config, training_config

from chains.bge.directory import read_model_directory
from chains.bge.embeddings import BGEEmbeddings

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXTS = [
    "怎样备份知识库？",
    "",
    "RAG 与 ChatGLM3-6B",
    "向量" * 100,
    *(f"第{n}条 文档" * (1 + n % 7) for n in range(300)),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("models") / "bert")


def lowest_cosine(one: Any, other: Any) -> float:
    return float((one * other).sum(axis=1).min())


@pytest.mark.parametrize(("dtype", "bar"), [("auto", 0.999), ("float32", 0.99999), ("bfloat16", 0.999)])
def test_vectors_are_those_of_the_cpu(bert: Path, dtype: Any, bar: float) -> None:
    embeddings = BGEEmbeddings(bert, dtype=dtype)
    exact = BGEEmbeddings(bert, engine="torch", device="cpu").embed_documents_array(TEXTS)
    assert lowest_cosine(embeddings.embed_documents_array(TEXTS), exact) >= bar
    assert embeddings.engine.name == f"torch cuda:0 {'float16' if dtype == 'auto' else dtype}"
    assert embeddings.fingerprint == BGEEmbeddings(bert, device="cpu").fingerprint


def test_bge_m3_has_its_vectors_there_too(tmp_path: Path) -> None:
    model = build_xlm_roberta(tmp_path / "m3")
    exact = BGEEmbeddings(model, engine="torch", device="cpu").embed_documents_array(TEXTS)
    assert lowest_cosine(BGEEmbeddings(model).embed_documents_array(TEXTS), exact) >= 0.999


def test_a_reranker_orders_as_on_the_cpu(bert: Path, tmp_path: Path) -> None:
    from chains.bge.reranker import BgeReranker

    model = build_reranker(bert, tmp_path / "reranker")
    pairs = [("怎样备份？", text) for text in TEXTS[:60]]
    expected = BgeReranker(model=str(model), engine="torch", device="cpu").logits(pairs)
    reranker = BgeReranker(model=str(model))
    np.testing.assert_allclose(reranker.logits(pairs), expected, atol=2e-2)
    assert reranker.running.name == "torch cuda:0 float16"


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"precision": "fp32", "dropout": 0.0}, 1e-3),
        ({"precision": "bf16", "dropout": 0.0}, 0.1),
        ({"precision": "fp16", "dropout": 0.0}, 0.1),
        ({"precision": "fp32", "dropout": 0.0, "method": "lora"}, 1e-3),
    ],
)
def test_training_loses_what_it_loses_on_the_cpu(
    bert: Path, tmp_path: Path, settings: dict[str, Any], apart: float
) -> None:
    from finetune.bge.train import train

    rows = make_rows(60)
    there = train(training_config(bert, tmp_path / "gpu", **settings).model_copy(update={"device": "cuda"}), rows)
    here = train(training_config(bert, tmp_path / "cpu", **settings | {"precision": "fp32"}), rows)
    np.testing.assert_allclose(there.losses, here.losses, atol=apart)


def test_graphs_kept_by_free_memory_change_nothing(bert: Path, tmp_path: Path) -> None:
    from finetune.bge.train import train

    rows, found = make_rows(60), []
    for name, settings in {"kept": {}, "encoded twice": {"graph_tokens": 0}}.items():
        config = training_config(bert, tmp_path / name, precision="fp32", **settings)
        found.append(train(config.model_copy(update={"device": "cuda"}), rows).losses)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_a_reranker_trains_there(bert: Path, tmp_path: Path) -> None:
    from finetune.reranker.train import train

    model = build_reranker(bert, tmp_path / "reranker")
    losses = []
    for device in ("cpu", "cuda"):
        config = reranker_config(model, tmp_path / device, precision="fp32").model_copy(update={"device": device})
        losses.append(train(config, make_rows(60), read_model_directory(model)).losses)
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_chatglm3_answers_on_the_gpu(tmp_path: Path, quantization: str) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    from chains.chatglm3.chat_model import ChatGLM3
    from finetune.chatglm3.copy_task import build_tiny_model

    model = build_tiny_model(tmp_path / "model", texts=TEXTS)
    settings = {"model": str(model), "temperature": 0, "max_new_tokens": 12, "dtype": "float32"}
    there = ChatGLM3(device="cuda:0", quantization=quantization, **settings).invoke("怎样备份知识库？").content
    if quantization == "none":
        assert there == ChatGLM3(device="cpu", **settings).invoke("怎样备份知识库？").content
    assert isinstance(there, str)
