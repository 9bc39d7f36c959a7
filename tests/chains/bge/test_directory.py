"""What a model directory says, and the files that make other libraries read it alike."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chains.bge.directory import (
    CHINESE_INSTRUCTION,
    ENGLISH_INSTRUCTION,
    ModelDirectoryError,
    digest,
    read_model_directory,
    resolve_model,
    trained_prefixes,
    write_layout,
)
from chains.bge.embeddings import BGEEmbeddings

TEXTS = ["怎样备份知识库？", "第一条 为了 RAG 与 ChatGLM3-6B 的检索。", "É Ａ Δ", "", "向量" * 400]


def edited(source: Path, target: Path, name: str, data: Any) -> Path:
    """A copy of a model directory with one JSON file of other content."""
    shutil.copytree(source, target)
    (target / name).write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return target


def test_bge_small_is_read_as_its_authors_wrote_it(bge_small: Path) -> None:
    directory = read_model_directory(bge_small)
    assert (directory.pooling, directory.normalize, directory.max_tokens) == ("cls", True, 512)
    assert directory.query_instruction == CHINESE_INSTRUCTION
    assert directory.lower_case  # no capitals in its vocabulary, do_lower_case false in its tokenizer


def test_bge_m3_has_no_instruction_and_two_positions_less(xlm_roberta: Path) -> None:
    directory = read_model_directory(xlm_roberta)
    assert (directory.model_type, directory.query_instruction, directory.lower_case) == ("xlm-roberta", "", False)
    assert directory.max_tokens == 512  # of 514 positions


def test_an_english_vocabulary_has_the_english_instruction(bert: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((bert / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: index for word, index in vocabulary.items() if word.isascii()}
    target = edited(bert, tmp_path / "english", "tokenizer.json", tokenizer)
    assert read_model_directory(target).query_instruction == ENGLISH_INSTRUCTION


def test_the_directory_s_own_prompt_is_the_instruction(bert: Path, tmp_path: Path) -> None:
    settings = {"prompts": {"query": "查询："}}
    target = edited(bert, tmp_path / "prompted", "config_sentence_transformers.json", settings)
    assert read_model_directory(target).query_instruction == "查询："


def test_what_flagembedding_saves_is_read_as_cls_and_unit_length(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        directory = read_model_directory(plain)
    assert (directory.pooling, directory.normalize) == ("cls", True)
    assert "no modules.json" in caplog.text


def test_mean_pooling_is_believed_and_has_no_instruction(bert: Path, tmp_path: Path) -> None:
    target = edited(bert, tmp_path / "mean", "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    directory = read_model_directory(target)
    assert (directory.pooling, directory.query_instruction) == ("mean", "")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", "{", "config.json"),
        ("config.json", {"model_type": "gpt2"}, "gpt2"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}], "Dense"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(bert: Path, tmp_path: Path, name: str, data: Any, words: str) -> None:
    target = edited(bert, tmp_path / "odd", name, data)
    with pytest.raises(ModelDirectoryError) as caught:
        read_model_directory(target)
    assert words in caught.value.zh
    assert words in caught.value.en


def test_an_adapter_is_not_taken_for_a_model(adapter: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="adapter"):
        read_model_directory(adapter)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="nowhere"):
        resolve_model(tmp_path / "nowhere")


def test_a_model_that_cannot_be_fetched_says_how_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelDirectoryError, match=r"no network.*download it to a directory"):
        resolve_model("BAAI/bge-base-zh-v1.5")


def test_the_digest_follows_the_weights(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(bert)
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert digest(tmp_path / "copy") != digest(bert)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"settings": {"matryoshka": [64, 16]}}, (64, 16)),
        ({"settings": {"matryoshka": []}}, ()),
        ({"settings": {"lora": {}}}, None),  # of another kind of model
        ("{", None),
        ([], None),
    ],
)
def test_the_lengths_that_were_trained_stand_in_the_report(tmp_path: Path, report: Any, expected: Any) -> None:
    assert trained_prefixes(tmp_path) is None
    text = report if isinstance(report, str) else json.dumps(report)
    (tmp_path / "ragproj.json").write_text(text, encoding="utf-8")
    assert trained_prefixes(tmp_path) == expected


def test_a_directory_without_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelDirectoryError, match="no weights"):
        digest(tmp_path / "empty")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_written_layout_makes_every_library_pool_alike(plain: Path, tmp_path: Path, pooling: Any) -> None:
    """FlagEmbedding, sentence-transformers and we agree on a directory that had no sentence-transformers files."""
    from FlagEmbedding import FlagModel
    from sentence_transformers import SentenceTransformer

    target = tmp_path / "trained"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(plain / name, target / name)
    write_layout(target, read_model_directory(plain), pooling=pooling, query_instruction="查：", max_tokens=64)
    ours = BGEEmbeddings(target, engine="torch")
    vectors = ours.embed_documents_array(TEXTS)
    flag = FlagModel(str(target), use_fp16=False, devices="cpu", pooling_method=pooling, passage_max_length=64)
    other = SentenceTransformer(str(target), device="cpu")
    assert ours.directory.max_tokens == other.max_seq_length == 64
    assert (vectors * flag.encode_corpus(TEXTS)).sum(axis=1).min() >= 0.9999
    assert (vectors * other.encode(TEXTS)).sum(axis=1).min() >= 0.9999
    assert (ours.embed_queries_array(TEXTS) * other.encode_query(TEXTS)).sum(axis=1).min() >= 0.9999
    lower = BGEEmbeddings(plain, engine="torch", max_length=64).embed_documents_array(TEXTS)
    assert np.allclose(vectors, lower, atol=1e-5) == (pooling == "cls")
