"""BgeTokenizer against transformers and by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chains.bge.directory import ModelDirectoryError, read_model_directory
from chains.bge.tokenizer import BgeTokenizer, truncated

TEXTS = ["怎样备份知识库？", "rag, 第2条：向量", "", "文档" * 300, "😀 emoji"]


def tokenizer(path: Path) -> BgeTokenizer:
    return BgeTokenizer.from_directory(read_model_directory(path))


@pytest.mark.parametrize("model", ["bert", "xlm_roberta"])
def test_ids_are_those_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    path = request.getfixturevalue(model)
    expected = AutoTokenizer.from_pretrained(str(path))(TEXTS, truncation=True, max_length=100)["input_ids"]
    assert tokenizer(path).encode(TEXTS, 100) == expected


def test_capitals_are_the_same_as_small_letters_where_the_vocabulary_has_none(bge_small: Path) -> None:
    ours = tokenizer(bge_small)
    upper, lower = ours.encode(["RAG 与 ChatGLM3-6B", "rag 与 chatglm3-6b"], 512)
    assert upper == lower
    assert ours.unknown_share(["RAG 与 ChatGLM3-6B 的检索"]) == 0


def test_a_directory_with_only_a_vocabulary_tokenizes_as_one_with_tokenizer_json(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "old", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert tokenizer(tmp_path / "old").encode(TEXTS, 512) == tokenizer(bert).encode(TEXTS, 512)


def test_count_leaves_out_what_the_model_adds(bert: Path) -> None:
    assert tokenizer(bert).count("知识库") == 3
    assert tokenizer(bert).count("") == 0


def test_a_cut_text_still_ends_with_sep() -> None:
    assert truncated([2, 10, 11, 12, 3], 4) == [2, 10, 11, 3]
    assert truncated([2, 10, 3], 4) == [2, 10, 3]


def test_unknown_share_is_counted_by_hand(bert: Path) -> None:
    # 知 and 识 are in the small vocabulary, the two rare characters are not
    assert tokenizer(bert).unknown_share(["知识龘靐"]) == 0.5
    assert tokenizer(bert).unknown_share([]) == 0


def test_a_damaged_tokenizer_is_named(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "broken")
    data = (bert / "tokenizer.json").read_text(encoding="utf-8").replace('"WordPiece"', '"Nonsense"', 1)
    (tmp_path / "broken" / "tokenizer.json").write_text(data, encoding="utf-8")
    with pytest.raises(ModelDirectoryError, match="damaged"):
        tokenizer(tmp_path / "broken")
