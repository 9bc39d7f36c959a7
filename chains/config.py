"""RagConfig: one field per component, each a closed union on `_type`; still data, nothing is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from chains.chatglm3.options import LocalModelOptions
from chains.faiss_index import FaissConfig
from chains.prompts import Language
from loaders.config import Config, apply_overrides, read_yaml
from loaders.documents import LoaderConfig
from loaders.splitters import SplitterConfig


class LexicalEmbeddingsConfig(Config):
    """The embedded default: hashed character n-grams, no weights to download."""

    type: Literal["lexical"] = Field(default="lexical", alias="_type")
    dimensions: int = Field(default=1024, ge=64, le=1024, description="length of a vector")


class BgeEmbeddingsConfig(Config):
    """A BGE model: small, base and large v1.5 in Chinese or English, bge-m3's dense vectors, or one trained here."""

    type: Literal["bge"] = Field(default="bge", alias="_type")
    model: str = Field(min_length=1, description="directory of the model, or a model id such as BAAI/bge-base-zh-v1.5")
    adapter: str | None = Field(default=None, description="directory of a LoRA adapter trained on it")
    engine: Literal["auto", "torch", "onnx_int8", "openvino", "openvino_int8"] = Field(
        default="auto", description="what computes; auto measures those that agree with float32 and takes the fastest"
    )
    query_instruction: str | None = Field(
        default=None, description='put before questions; null: what the model directory says; "": none'
    )
    max_length: int | None = Field(
        default=None, ge=3, description="tokens of a text, [CLS] and [SEP] included; null: the model's own limit"
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="first numbers of a vector that are kept, one of `matryoshka`; null: all"
    )
    device: str | None = Field(
        default=None, description="cpu, cuda (every GPU) or some, as cuda:0,cuda:1; null: GPUs where there are any"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the engine torch; auto: float16 on a GPU, else float32"
    )


class BgeRerankerConfig(Config):
    """A cross-encoder, such as bge-reranker-base: reads question and passage together; better order, more work."""

    type: Literal["bge_reranker"] = Field(default="bge_reranker", alias="_type")
    model: str = Field(min_length=1, description="directory of the model, or a model id such as BAAI/bge-reranker-base")
    adapter: str | None = Field(default=None, description="directory of a LoRA adapter trained on it")
    engine: Literal["auto", "torch", "onnx_int8"] = Field(
        default="auto", description="what computes; auto measures those that agree with float32 and takes the fastest"
    )
    max_length: int = Field(default=512, ge=8, description="tokens of question and passage together")
    device: str | None = Field(
        default=None, description="cpu, cuda (every GPU) or some, as cuda:0,cuda:1; null: GPUs where there are any"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the engine torch; auto: float16 on a GPU, else float32"
    )


FilterValue = str | int | float | bool


class AnyRetrieverConfig(Config):
    """What every retriever over a knowledge base can do with its hits."""

    filter: dict[str, FilterValue | list[FilterValue]] | None = Field(
        default=None, description="only chunks whose metadata has these values, or one of a list of them"
    )
    per_source: int | None = Field(default=None, ge=1, description="chunks of one source, at most")
    mmr_lambda: float | None = Field(
        default=None, ge=0, le=1, description="weight of relevance against variety (maximal marginal relevance)"
    )
    neighbours: int = Field(
        default=0, ge=0, le=20_000, description="characters up to which hits grow by the chunks around them; 0: none"
    )
    rerank_fetch: int = Field(default=20, ge=1, le=1000, description="chunks given to a reranker, where there is one")


class DenseRetrieverConfig(AnyRetrieverConfig):
    """Nearest vectors."""

    type: Literal["dense"] = Field(default="dense", alias="_type")


class LexicalRetrieverConfig(AnyRetrieverConfig):
    """BM25 over Chinese terms."""

    type: Literal["lexical"] = Field(default="lexical", alias="_type")


class HybridRetrieverConfig(AnyRetrieverConfig):
    """Both, fused."""

    type: Literal["hybrid"] = Field(default="hybrid", alias="_type")
    fusion: Literal["weighted", "rrf"] = Field(default="weighted", description="of scores, or of reciprocal ranks")
    dense_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="weight of the dense leg, BM25 has the rest; null: 0.1 with the lexical embedder, else 0.5",
    )
    support: float = Field(default=0.1, ge=0, lt=1, description="raise by other hits of the same document; 0: none")
    fetch: int = Field(default=100, ge=1, le=1000, description="chunks asked of each leg before fusing")
    rescore: int = Field(
        default=20, ge=0, le=200, description="of them compared with the question word by word (weighted only); 0: none"
    )


class ExtractiveConfig(Config):
    """The embedded default: quotes the sentences that answer."""

    type: Literal["extractive"] = Field(default="extractive", alias="_type")
    max_chars: int = Field(default=120, ge=20, le=2000, description="characters quoted, about")
    max_quotes: int = Field(default=3, ge=1, le=10, description="quotes in an answer, at most")


class ChatModelConfig(Config):
    """Anything LangChain's `init_chat_model` reaches, such as an OpenAI-compatible server."""

    type: Literal["chat_model"] = Field(default="chat_model", alias="_type")
    model: str = Field(description="model name as the server knows it")
    model_provider: str = Field(default="openai", description="LangChain's provider name; openai for vLLM or Ollama")
    base_url: str | None = Field(
        default=None, pattern="^https?://", description="address of the server, such as http://127.0.0.1:8000/v1"
    )
    api_key: SecretStr | None = Field(default=None, description="key; better left out and set in the environment")
    temperature: float = Field(default=0.1, ge=0, le=2)
    max_tokens: int = Field(default=1024, ge=1, description="tokens of an answer, at most")
    timeout_s: float = Field(default=120, gt=0, description="seconds to wait for the server, each attempt")


class ChatGLM3Config(Config, LocalModelOptions):
    """ChatGLM3 in this process: a native or original directory, or a model id."""

    type: Literal["chatglm3"] = Field(default="chatglm3", alias="_type")


class HuggingFaceConfig(Config, LocalModelOptions):
    """Any causal language model of transformers in this process, with its own chat template."""

    type: Literal["huggingface"] = Field(default="huggingface", alias="_type")


EmbeddingsConfig = Annotated[LexicalEmbeddingsConfig | BgeEmbeddingsConfig, Field(discriminator="type")]
RetrieverConfig = Annotated[
    DenseRetrieverConfig | LexicalRetrieverConfig | HybridRetrieverConfig, Field(discriminator="type")
]
GeneratorConfig = ChatModelConfig | ChatGLM3Config | HuggingFaceConfig
LLMConfig = Annotated[ExtractiveConfig | GeneratorConfig, Field(discriminator="type")]


class ServerConfig(Config):
    """Where the page is served."""

    host: str = Field(default="127.0.0.1", description="any other address needs a password")
    port: int = Field(default=7860, ge=0, le=65535, description="0 picks a free one")
    username: str = Field(default="ragproj", min_length=1)
    password: SecretStr | None = Field(default=None, description="better set in RAGPROJ_PASSWORD")


class RagConfig(Config):
    """A whole application."""

    kb: Path = Field(default=Path("kb"), description="directory of the knowledge base")
    language: Language = Field(default="zh", description="of answers' fixed sentences, prompts and the page")
    loader: LoaderConfig = Field(default_factory=LoaderConfig)
    splitter: SplitterConfig = Field(default_factory=SplitterConfig)
    embeddings: EmbeddingsConfig = Field(default_factory=LexicalEmbeddingsConfig)
    vectorstore: FaissConfig = Field(default_factory=FaissConfig)
    retriever: RetrieverConfig = Field(default_factory=HybridRetrieverConfig)
    reranker: BgeRerankerConfig | None = Field(default=None, description="puts the hits in a better order; null: none")
    llm: LLMConfig = Field(default_factory=ExtractiveConfig)
    llms: dict[str, LLMConfig] = Field(
        default_factory=dict, description="further generators by name, to choose from at run time"
    )
    top_k: int = Field(default=5, ge=1, le=100, description="passages an answer is made from")
    min_relevance: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="refuse when no passage reaches this probability of answering; 0 never refuses",
    )
    max_question_chars: int = Field(default=4000, ge=1, description="a longer question is an error")
    max_history_chars: int = Field(
        default=4000, ge=0, description="of a conversation that a generator on a server is told, the latest turns"
    )
    server: ServerConfig = Field(default_factory=ServerConfig)

    @model_validator(mode="after")
    def _names_are_free(self) -> RagConfig:
        taken = {"extractive", self.llm.type} & set(self.llms)
        if taken:
            raise ValueError(f"llms: {', '.join(sorted(taken))} already names the default; choose another name")
        return self


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RagConfig:
    """The config in a YAML file (the shipped default without one), `key.sub=value` overrides laid over it.

    Raises:
        ConfigError: every problem at once, with its place and the allowed values.
    """
    file = Path(path) if path is not None else default_config_path()
    where = str(path) if path is not None else file.name
    return RagConfig.from_dict(apply_overrides(read_yaml(file), overrides), where=where)


def default_config_path() -> Path:
    """The shipped `default.yaml`: the embedded default, nothing downloaded."""
    return Path(str(files("chains"))) / "configs" / "default.yaml"
