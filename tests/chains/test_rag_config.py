"""RagConfig: a whole application as data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from chains.config import (
    BgeEmbeddingsConfig,
    BgeRerankerConfig,
    ChatGLM3Config,
    ChatModelConfig,
    DenseRetrieverConfig,
    EmbeddingsConfig,
    ExtractiveConfig,
    HuggingFaceConfig,
    HybridRetrieverConfig,
    LexicalEmbeddingsConfig,
    LexicalRetrieverConfig,
    LLMConfig,
    RagConfig,
    RetrieverConfig,
    default_config_path,
    load_config,
)
from loaders.config import Config
from loaders.errors import ConfigError
from ui.cli import build_parser, split_overrides

CONFIGS = sorted(default_config_path().parent.glob("*.yaml"))


# -- shipped files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert isinstance(load_config(path), RagConfig)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_starts_with_a_line_that_runs(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ragproj ")
    words = shlex.split(first.removeprefix("# ragproj "))
    arguments, extra = build_parser().parse_known_args(words)
    assert arguments.verb
    unknown, overrides = split_overrides(extra)
    assert unknown == []
    load_config(path, overrides)
    if arguments.config:
        assert (Path(__file__).resolve().parents[2] / arguments.config).samefile(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_value_of_a_shipped_config_says_what_it_does(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if ":" in line.split("#")[0]]
    values = [line for line in lines if line.split("#")[0].strip()[-1] != ":" and "_type" not in line]
    assert values
    assert [line for line in values if "#" not in line and "top_k" not in line] == []


def test_the_default_file_says_what_the_classes_say() -> None:
    """Each fact once: the file repeats defaults only to show them."""
    assert load_config() == RagConfig()
    assert load_config().kb == Path("kb")
    assert load_config(default_config_path()) == load_config()


def test_shipped_configs_hold_no_secret_and_no_import_path() -> None:
    for path in CONFIGS:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert "api_key" not in str(data)
        assert "password" not in str(data)


# -- components --------------------------------------------------------------------------------------------------


def tags(union: Any) -> set[str]:
    return {member.model_fields["type"].default for member in get_args(get_args(union)[0])}


def test_the_components_are_these() -> None:
    assert tags(RetrieverConfig) == {"dense", "lexical", "hybrid"}
    assert tags(EmbeddingsConfig) == {"lexical", "bge"}
    assert tags(LLMConfig) == {"extractive", "chat_model", "chatglm3", "huggingface"}


@pytest.mark.parametrize(
    ("field", "data", "expected"),
    [
        ("retriever", {"_type": "dense"}, DenseRetrieverConfig()),
        ("retriever", {"_type": "lexical"}, LexicalRetrieverConfig()),
        ("retriever", {"_type": "hybrid", "dense_weight": 0.5}, HybridRetrieverConfig(dense_weight=0.5)),
        ("llm", {"_type": "extractive", "max_chars": 99}, ExtractiveConfig(max_chars=99)),
        ("llm", {"_type": "chat_model", "model": "m"}, ChatModelConfig(model="m")),
        (
            "llm",
            {"_type": "chatglm3", "model": "m", "quantization": "nf4"},
            ChatGLM3Config(model="m", quantization="nf4"),
        ),
        ("llm", {"_type": "huggingface", "model": "m"}, HuggingFaceConfig(model="m")),
        ("embeddings", {"_type": "bge", "model": "m"}, BgeEmbeddingsConfig(model="m")),
        (
            "embeddings",
            {"_type": "bge", "model": "m", "dimensions": 256},
            BgeEmbeddingsConfig(model="m", dimensions=256),
        ),
        ("reranker", {"_type": "bge_reranker", "model": "m"}, BgeRerankerConfig(model="m")),
        ("embeddings", {"_type": "lexical", "dimensions": 256}, LexicalEmbeddingsConfig(dimensions=256)),
    ],
)
def test_a_type_names_the_component(field: str, data: dict[str, Any], expected: Config) -> None:
    assert getattr(RagConfig.from_dict({field: data}, where="x"), field) == expected


@pytest.mark.parametrize(
    ("data", "place", "allowed"),
    [
        ({"retriever": {"_type": "sparse"}}, "retriever", ["dense", "hybrid", "lexical"]),
        ({"llm": {"_type": "chatglm4"}}, "llm", ["extractive", "chat_model", "chatglm3", "huggingface"]),
        ({"llms": {"big": {"model": "x"}}}, "llms.big", ["extractive", "chat_model"]),
        ({"embeddings": {"_type": "word2vec"}}, "embeddings", ["lexical", "bge"]),
        ({"embeddings": {"_type": "bge"}}, "embeddings.model", ["model"]),
        ({"reranker": {"model": "m", "batch": 1}}, "reranker.batch", ["max_length", "device"]),
        ({"vectorstore": {"_type": "milvus"}}, "vectorstore", ["faiss"]),
        ({"language": "fr"}, "language", ["zh", "en"]),
        ({"loader": {"ocr": "always"}}, "loader.ocr", ["auto", "off"]),
        ({"topk": 3}, "topk", ["top_k", "kb", "llm", "retriever", "min_relevance"]),
        ({"llm": {"_type": "extractive", "model": "x"}}, "llm.model", ["max_chars"]),
        ({"llms": {"big": {"_type": "chat_model", "modle": "x"}}}, "llms.big.modle", ["model", "base_url"]),
    ],
)
def test_a_mistake_names_its_place_and_what_is_allowed(data: dict[str, Any], place: str, allowed: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RagConfig.from_dict(data, where="my.yaml")
    for text in (caught.value.zh, caught.value.en):
        assert "my.yaml" in text
        assert place in text
        for value in allowed:
            assert value in text


def test_all_mistakes_of_a_file_come_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "top_k: 0\nlanguage: de\nretriever: {_type: hybrid, dense_weight: 2, fetch: many}\n"
        "splitter: {chunk_size: 1}\nllm: {_type: chat_model}\nserver: {port: 70000}\nnew: 1\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    places = ("top_k", "language", "retriever.dense_weight", "retriever.fetch", "splitter.chunk_size", "llm.model",
              "server.port", "new")  # fmt: skip
    assert f"{len(places)} error(s) in config {path}" in caught.value.en
    for place in places:
        assert f"{place}: " in caught.value.en
        assert f"{place}：" in caught.value.zh


@pytest.mark.parametrize(
    "data",
    [
        {"top_k": 0}, {"top_k": 101}, {"min_relevance": -0.1}, {"min_relevance": 1.1}, {"min_relevance": float("nan")},
        {"max_question_chars": 0}, {"kb": None}, {"kb": 3}, {"server": {"port": -1}}, {"server": {"username": ""}},
        {"retriever": {"_type": "hybrid", "fetch": 0}}, {"llm": {"_type": "chat_model", "model": "m", "timeout_s": 0}},
        {"embeddings": {"_type": "lexical", "dimensions": 4096}}, {"splitter": {"chunk_size": 64, "chunk_overlap": 64}},
        {"embeddings": {"_type": "bge", "model": "m", "dimensions": 0}},
        {"loader": {"timeout_s": 0}}, {"loader": {"memory_mb": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="1 error"):
        RagConfig.from_dict(data, where="x")


@pytest.mark.parametrize("secret", ["sk-123456", 123456, ["sk-123456"]])
def test_keys_and_passwords_stay_out_of_messages_and_prints(secret: object) -> None:
    for data in (
        {"llm": {"model": "m", "api_key": secret}},
        {"llm": {"_type": "chat_model", "api_key": secret, "bad": 1}},
        {"llm": {"_type": "extractive", "api_key": secret}},
        {"server": {"password": secret, "bad": 1}},
    ):
        with pytest.raises(ConfigError) as caught:
            RagConfig.from_dict(data, where="x")
        assert "123456" not in str(caught.value)
    config = RagConfig.from_dict({"llm": {"_type": "chat_model", "model": "m", "api_key": "sk-123456"}}, where="x")
    assert "123456" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"


# -- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_lie_over_the_file() -> None:
    config = load_config(
        overrides=["top_k=3", "retriever.dense_weight=0.5", "splitter.chunk_size=300", "kb=/data/知识库"]
    )
    assert (config.top_k, config.splitter.chunk_size, config.kb) == (3, 300, Path("/data/知识库"))
    assert config.retriever == HybridRetrieverConfig(dense_weight=0.5)


@pytest.mark.parametrize(
    "overrides",
    [["llm._type=chat_model", "llm.model=qwen"], ["llm.model=qwen", "llm._type=chat_model"]],
    ids=["type first", "type last"],
)
def test_an_override_changes_the_component(overrides: list[str]) -> None:
    assert load_config(overrides=overrides).llm == ChatModelConfig(model="qwen")


def test_an_override_can_go_back_to_the_embedded_default() -> None:
    config = load_config(default_config_path().with_name("openai_compatible.yaml"), ["llm._type=extractive"])
    assert config.llm == ExtractiveConfig()


def test_an_override_of_a_section_that_the_file_leaves_out_means_its_default() -> None:
    config = load_config(default_config_path().with_name("openai_compatible.yaml"), ["retriever.dense_weight=0.5"])
    assert config.retriever == HybridRetrieverConfig(dense_weight=0.5)


def test_a_wrong_override_is_named_like_a_wrong_line() -> None:
    with pytest.raises(ConfigError, match=r"retriever\.weight: unknown key"):
        load_config(overrides=["retriever.weight=1"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")


def test_a_file_given_as_text_works_like_a_path(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("top_k: 7\n", encoding="utf-8")
    assert load_config(str(path)) == load_config(path)
    assert load_config(path).top_k == 7
    path.write_text("", encoding="utf-8")
    assert load_config(path) == RagConfig()


def test_every_number_says_what_it_counts() -> None:
    undescribed = [
        f"{model.__name__}.{name}"
        for model in (
            RagConfig,
            HybridRetrieverConfig,
            ExtractiveConfig,
            ChatModelConfig,
            ChatGLM3Config,
            LexicalEmbeddingsConfig,
        )
        for name, field in model.model_fields.items()
        if field.annotation in (int, float) and not field.description and name != "temperature"
    ]
    assert undescribed == []
