"""BGEEmbeddings: LangChain's contract, parity with FlagModel and sentence-transformers, fingerprints, long texts."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from chains.bge.directory import CHINESE_INSTRUCTION, digest, read_model_directory
from chains.bge.embeddings import BGEEmbeddings
from chains.bge.encoder import load_encoder
from chains.config import BgeEmbeddingsConfig
from chains.embeddings import ArrayEmbeddings, Fingerprinted, TokenLimited
from chains.retrieval_qa import build_embeddings
from loaders.errors import UsageError

TEXTS = ["怎样备份知识库？", "第一条 为了惩罚犯罪，保护人民。", "rag and bm25", "", "向量" * 400, "😀 emoji"]


class TestUnitContract(EmbeddingsUnitTests):
    @pytest.fixture(autouse=True)
    def _model(self, bert: Path) -> None:
        type(self).path = bert  # type: ignore[attr-defined]

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return BGEEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": self.path, "engine": "torch"}  # type: ignore[attr-defined]


class TestIntegrationContract(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _model(self, bert: Path) -> None:
        type(self).path = bert  # type: ignore[attr-defined]

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return BGEEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": self.path, "engine": "torch"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["bert", "bge_small", "plain", "xlm_roberta"])
def test_vectors_are_those_of_flagmodel(model: str, request: pytest.FixtureRequest) -> None:
    from FlagEmbedding import FlagModel

    path = request.getfixturevalue(model)
    ours = BGEEmbeddings(path, engine="torch")
    flag = FlagModel(
        str(path),
        use_fp16=False,
        devices="cpu",
        query_instruction_for_retrieval=ours.query_instruction or None,
    )
    assert (ours.embed_documents_array(TEXTS) * flag.encode_corpus(TEXTS)).sum(axis=1).min() >= 0.9999
    assert (ours.embed_queries_array(TEXTS) * flag.encode_queries(TEXTS)).sum(axis=1).min() >= 0.9999


@pytest.mark.parametrize("model", ["bert", "bge_small", "xlm_roberta"])
def test_vectors_are_those_of_sentence_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from sentence_transformers import SentenceTransformer

    path = request.getfixturevalue(model)
    texts = [*TEXTS, "RAG 与 ChatGLM3-6B", "É Ａ Δ"]  # it lower-cases as `sentence_bert_config.json` asks
    other = SentenceTransformer(str(path), device="cpu").encode(texts)
    assert (BGEEmbeddings(path, engine="torch").embed_documents_array(texts) * other).sum(axis=1).min() >= 0.9999


def test_capitals_reach_the_model_where_flagmodel_loses_them(bge_small: Path) -> None:
    """FlagModel follows `do_lower_case=false` alone: RAG is [UNK] to it (FlagEmbedding 1.4.2)."""
    from FlagEmbedding import FlagModel

    ours = BGEEmbeddings(bge_small, engine="torch").embed_documents_array(["RAG", "rag", "BM"])
    flag = FlagModel(str(bge_small), use_fp16=False, devices="cpu").encode(["RAG", "rag", "BM"])
    assert np.allclose(ours[0], ours[1], atol=1e-6)
    assert np.allclose(flag[0], flag[2], atol=1e-6)  # both are one [UNK]
    assert np.allclose(ours[1], flag[1], atol=1e-5)


def test_it_is_what_the_knowledge_base_asks_for(bert: Path) -> None:
    embeddings = BGEEmbeddings(bert, engine="torch")
    assert isinstance(embeddings, Fingerprinted)
    assert isinstance(embeddings, TokenLimited)
    assert isinstance(embeddings, ArrayEmbeddings)
    assert embeddings.max_tokens == 510
    assert embeddings.count_tokens("知识库") == 3


def test_the_instruction_stands_before_questions_only(bert: Path) -> None:
    embeddings = BGEEmbeddings(bert, engine="torch")
    assert embeddings.query_instruction == CHINESE_INSTRUCTION
    (expected,) = embeddings.embed_documents([CHINESE_INSTRUCTION + "问题"])
    assert embeddings.embed_query("问题") == expected
    plain = BGEEmbeddings(bert, engine="torch", query_instruction="")
    assert plain.embed_query("问题") == plain.embed_documents(["问题"])[0]


def test_vectors_do_not_depend_on_order_or_repeats(bert: Path) -> None:
    embeddings = BGEEmbeddings(bert, engine="torch")
    once = embeddings.embed_documents_array(TEXTS)
    shuffled = embeddings.embed_documents_array([*reversed(TEXTS), *TEXTS])
    assert np.allclose(shuffled, np.concatenate([once[::-1], once]), atol=1e-6)


def test_eight_bit_vectors_do_not_depend_on_the_texts_beside(bert: Path) -> None:
    embeddings = BGEEmbeddings(bert, engine="onnx_int8")
    alone = np.concatenate([embeddings.embed_documents_array([text]) for text in TEXTS])
    assert np.allclose(embeddings.embed_documents_array(TEXTS), alone, atol=1e-6)


def test_no_texts_are_an_empty_array(bert: Path) -> None:
    assert BGEEmbeddings(bert, engine="torch").embed_documents_array([]).shape == (0, 64)


def test_many_windows_give_the_vectors_of_one(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = BGEEmbeddings(bert, engine="torch")
    texts = [f"第{number}条 文档" for number in range(50)]
    whole = embeddings.embed_documents_array(texts)
    monkeypatch.setattr("chains.bge.embeddings._WINDOW", 7)
    assert np.allclose(embeddings.embed_documents_array(texts), whole, atol=1e-6)


def test_texts_that_are_cut_are_reported(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = BGEEmbeddings(bert, engine="torch", max_length=16)
    embeddings.embed_documents(["短", "长" * 14])
    assert caplog.text == ""
    assert embeddings.cut_texts == 0
    embeddings.embed_documents(["短", "知" * 15, "知" * 30])
    assert embeddings.cut_texts == 2
    assert "2 of 3 texts are longer than the 16 tokens" in caplog.text
    assert "the longest has 32 tokens" in caplog.text  # 30 and [CLS], [SEP]


def test_an_ingest_reports_chunks_that_its_title_makes_too_long(bert: Path, tmp_path: Path) -> None:
    """The splitter leaves 16 tokens to a chunk where the model sees 30; a title of 40 stands before its chunks."""
    from chains.fulltext import FullTextIndex
    from chains.ingestion import Ingestor
    from chains.knowledge_base import KnowledgeBase
    from chains.vectorstores import FaissVectorStore

    for name, text in {"long.md": f"# {'备份' * 20}\n\n怎样做备份。怎样做文档。", "short.md": "知识库的文档"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    embeddings = BGEEmbeddings(bert, engine="torch", max_length=32)
    knowledge_base = KnowledgeBase(tmp_path / "kb", create=True)
    ingestor = Ingestor(FaissVectorStore(embeddings, knowledge_base), FullTextIndex(knowledge_base))
    report = ingestor.ingest([tmp_path / "long.md", tmp_path / "short.md"])
    embedded = dict(knowledge_base.index_texts(knowledge_base.chunk_ids()))
    knowledge_base.close()
    assert report.cut == sum(embeddings.count_tokens(text) > 30 for text in set(embedded.values())) > 0
    assert report.chunks > report.cut


@pytest.mark.parametrize("length", [2, 513])
def test_a_length_the_model_cannot_have_is_refused(bert: Path, length: int) -> None:
    with pytest.raises(UsageError, match="3 to 512"):
        BGEEmbeddings(bert, max_length=length)


def test_the_fingerprint_changes_with_whatever_changes_vectors(bert: Path, xlm_roberta: Path, adapter: Path) -> None:
    variants = [
        BGEEmbeddings(bert),
        BGEEmbeddings(xlm_roberta),
        BGEEmbeddings(bert, adapter),
        BGEEmbeddings(bert, max_length=128),
        BGEEmbeddings(bert, query_instruction=""),
        BGEEmbeddings(bert, dimensions=32),
        BGEEmbeddings(bert, dimensions=16),
    ]
    assert len({embeddings.fingerprint for embeddings in variants}) == len(variants)


def test_whole_vectors_have_the_fingerprint_that_they_had_before_they_could_be_cut(bert: Path) -> None:
    """As of 33afc2a: knowledge bases keep their vectors."""
    made = repr((digest(bert), "", True, "cls", True, CHINESE_INSTRUCTION, 512))
    expected = f"bge-64-{hashlib.sha256(made.encode()).hexdigest()[:24]}"
    assert BGEEmbeddings(bert).fingerprint == BGEEmbeddings(bert, dimensions=64).fingerprint == expected


def test_the_fingerprint_is_the_same_for_every_engine_and_copy(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "copy")
    prints = {BGEEmbeddings(bert, engine="torch").fingerprint, BGEEmbeddings(tmp_path / "copy").fingerprint}
    assert prints == {BGEEmbeddings(bert, engine="onnx_int8").fingerprint}


@pytest.mark.parametrize(
    ("engine", "bar"), [("torch", 0.9999), ("onnx_int8", 0.999), ("openvino", 0.9999), ("openvino_int8", 0.999)]
)
def test_cut_vectors_are_those_of_sentence_transformers_truncated(bert: Path, engine: Any, bar: float) -> None:
    from sentence_transformers import SentenceTransformer

    if engine.startswith("openvino"):
        pytest.importorskip("openvino")
    other = SentenceTransformer(str(bert), device="cpu", truncate_dim=32).encode(TEXTS, normalize_embeddings=True)
    ours = BGEEmbeddings(bert, engine=engine, dimensions=32)
    vectors = ours.embed_documents_array(TEXTS)
    assert vectors.shape == (len(TEXTS), 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors * other).sum(axis=1).min() >= bar
    assert ours.engine.name.startswith(engine)
    assert len(ours.embed_query("问题")) == 32
    assert ours.embed_documents_array([]).shape == (0, 32)


def test_cut_vectors_keep_their_length_where_the_directory_does_not_normalise(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    raw = tmp_path / "raw"
    shutil.copytree(bert, raw)
    modules = json.loads((raw / "modules.json").read_text(encoding="utf-8"))
    (raw / "modules.json").write_text(json.dumps(modules[:2]), encoding="utf-8")
    other = SentenceTransformer(str(raw), device="cpu", truncate_dim=32).encode(TEXTS)
    vectors = BGEEmbeddings(raw, engine="torch", dimensions=32).embed_documents_array(TEXTS)
    assert np.allclose(vectors, other, atol=1e-5)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.1)


@pytest.mark.parametrize("dimensions", [0, -1, 65])
def test_dimensions_that_the_vectors_do_not_have_are_refused(bert: Path, dimensions: int) -> None:
    with pytest.raises(UsageError, match=f"dimensions is {dimensions};.* give 1 to 64"):
        BGEEmbeddings(bert, dimensions=dimensions)


def test_a_config_can_cut_vectors(bert: Path) -> None:
    embeddings = build_embeddings(BgeEmbeddingsConfig(model=str(bert), engine="torch", dimensions=16))
    whole = BGEEmbeddings(bert, engine="torch").embed_query("问题")[:16]
    assert np.allclose(embeddings.embed_query("问题"), np.array(whole) / np.linalg.norm(whole), atol=1e-6)


@pytest.mark.parametrize(
    ("trained", "asked", "said"),
    [
        ([64, 16], 32, "vectors of 32 numbers are not what"),
        ([64, 16], 16, None),
        ([64, 16], None, None),
        ([], 16, "set dimensions to one of 64,"),  # trained without prefixes: the whole vector alone
        ([], None, None),
        ([32, 16], None, "set dimensions to one of 16, 32,"),  # the full length was not named
    ],
)
def test_a_length_that_was_not_trained_is_warned_of(
    bert: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trained: list[int],
    asked: int | None,
    said: str | None,
) -> None:
    model = reported(bert, tmp_path / "model", trained)
    BGEEmbeddings(model, dimensions=asked)
    assert caplog.text == "" if said is None else said in caplog.text


def test_an_adapter_says_itself_for_which_lengths_it_was_trained(
    bert: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tuned = reported(bert, tmp_path / "model", [64, 32]), reported(adapter, tmp_path / "adapter", [64, 16])
    BGEEmbeddings(model, tuned, dimensions=16)
    assert caplog.text == ""
    BGEEmbeddings(model, tuned, dimensions=32)
    assert f"not what {tuned} was trained for" in caplog.text


def test_a_directory_without_a_report_is_cut_without_a_warning(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        BGEEmbeddings(bert, dimensions=16)
    assert "does not say for which lengths it was trained" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def reported(source: Path, target: Path, trained: list[int]) -> Path:
    """A copy of a model or an adapter with the report of a training over these lengths."""
    shutil.copytree(source, target)
    report = {"kind": "bge", "settings": {"matryoshka": trained}}
    (target / "ragproj.json").write_text(json.dumps(report), encoding="utf-8")
    return target


def test_weights_in_memory_embed_as_they_change(bert: Path) -> None:
    import torch

    directory = read_model_directory(bert)
    encoder = load_encoder(directory)
    encoder.train()
    embeddings = BGEEmbeddings.from_encoder(encoder, directory)
    before, named = embeddings.embed_documents_array(TEXTS), embeddings.fingerprint
    assert np.allclose(before, BGEEmbeddings(bert, engine="torch").embed_documents_array(TEXTS), atol=1e-6)
    assert encoder.training  # as it was: dropout off only while embedding
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert not np.allclose(embeddings.embed_documents_array(TEXTS), before, atol=1e-3)
    assert embeddings.fingerprint != named


def test_loading_logs_no_noise(
    bert: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        BGEEmbeddings(bert, engine="torch").embed_query("问题")
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")
