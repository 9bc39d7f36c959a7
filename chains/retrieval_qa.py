"""build_retrieval_qa: RetrievalQA's contract as a Runnable: retrieve, refuse or answer, cite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, TypedDict, cast

from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableConfig,
    RunnableGenerator,
    RunnableSerializable,
)
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.configurable import DynamicRunnable
from langchain_core.runnables.utils import AddableDict, ConfigurableFieldSpec, get_unique_config_specs
from langchain_core.vectorstores import VectorStore

from chains.answerers import Answerer, AnswerInput, ChatModelAnswerer, ExtractiveAnswerer, refusal
from chains.calibration import Background, mention_relevance
from chains.config import (
    AnyRetrieverConfig,
    BgeEmbeddingsConfig,
    BgeRerankerConfig,
    EmbeddingsConfig,
    ExtractiveConfig,
    GeneratorConfig,
    HybridRetrieverConfig,
    LexicalEmbeddingsConfig,
    RagConfig,
)
from chains.fulltext import FullTextIndex
from chains.knowledge_base import KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings
from chains.retrievers import DenseRetriever, HybridRetriever, LexicalRetriever, StoreRetriever
from chains.vectorstores import FaissVectorStore
from loaders.errors import UsageError

MAX_TOP_K = 100
_ROLES = {"user", "human", "assistant", "ai", "system"}


class QAInput(TypedDict, total=False):
    """The chain's input; a plain string stands for `{"query": it}`."""

    query: str
    chat_history: Sequence[Any]


class QuestionError(UsageError):
    """The question is empty, too long, or not text."""


class RetrievalQA(RunnableGenerator[Any, AddableDict]):
    """The chain. `invoke` returns `{"query", "result", "source_documents", "citations", "refused"}`.

    `stream` yields addable dictionaries whose sum is that: `query` and `source_documents` first, `result` piece by
    piece, then `citations` and `refused`, with `references_used` or `truncated` where they apply.
    Run-time choices, through `with_config(configurable={...})`: `llm`, `retriever` and `top_k`; `config_specs` lists
    them.
    """

    def __init__(
        self,
        retriever: Runnable[str, list[Document]],
        answerer: Runnable[Any, Any],
        config: RagConfig,
        *,
        calibrated: bool,
    ) -> None:
        # the base class passes the config to functions that take one, which its signature does not tell
        super().__init__(cast("Any", self._run), cast("Any", self._arun), name="RetrievalQA")
        self.retriever = retriever
        self.answerer = answerer
        self.config = config
        self.calibrated = calibrated

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What may stand in `configurable`."""
        return get_unique_config_specs([*self.retriever.config_specs, *self.answerer.config_specs])

    def choices(self, key: str) -> list[str]:
        """The values `configurable` takes for "llm" or "retriever", the default one first."""
        part = {"llm": self.answerer, "retriever": self.retriever}[key]
        alternatives = getattr(part, "alternatives", None)
        return [] if alternatives is None else [cast("Any", part).default_key, *alternatives]

    def load_generator(self) -> None:
        """Load the weights of the default generator, where it runs in this process, before the first question.

        Raises:
            RagProjError: they cannot be found or loaded.
        """
        answerer, _ = self._chosen({})
        answerer.load()

    def _run(self, inputs: Iterator[Any], config: RunnableConfig) -> Iterator[AddableDict]:
        value = None
        for piece in inputs:
            value = _gathered(value, piece)
        query, history = self._read(value)
        answerer, question = self._prepare(query, history, config)
        documents = self.retriever.invoke(question, config)
        yield AddableDict({"query": query, "source_documents": documents})
        if self._irrelevant(question, documents, answerer):
            yield from refusal(self.config.language)
        else:
            yield from answerer.stream(AnswerInput(question=question, passages=documents), config)

    async def _arun(self, inputs: AsyncIterator[Any], config: RunnableConfig) -> AsyncIterator[AddableDict]:
        value = None
        async for piece in inputs:
            value = _gathered(value, piece)
        query, history = self._read(value)
        answerer, question = await run_in_executor(config, self._prepare, query, history, config)
        documents = await self.retriever.ainvoke(question, config)
        yield AddableDict({"query": query, "source_documents": documents})
        if self._irrelevant(question, documents, answerer):
            for refused in refusal(self.config.language):
                yield refused
            return
        async for answered in answerer.astream(AnswerInput(question=question, passages=documents), config):
            yield answered

    def _prepare(self, query: str, history: Sequence[BaseMessage], config: RunnableConfig) -> tuple[Answerer, str]:
        """The answerer chosen at run time, and the question as it can be searched for without the conversation."""
        self._check_choices(config)
        answerer, config = self._chosen(config)
        question = answerer.condense(query, history, config) if history else query
        return answerer, question

    def _chosen(self, config: RunnableConfig) -> tuple[Answerer, RunnableConfig]:
        """The answerer that `configurable` names, with the config it is called with."""
        answerer: Any = self.answerer
        while isinstance(answerer, DynamicRunnable):
            answerer, config = answerer.prepare(config)
        return answerer, config

    def _check_choices(self, config: RunnableConfig) -> None:
        configurable = config.get("configurable", {})
        for key, allowed in (("llm", self.choices("llm")), ("retriever", self.choices("retriever"))):
            if key in configurable and configurable[key] not in allowed:
                raise _not_a_choice(key, configurable[key], ", ".join(allowed) or "-")
        top_k = configurable.get("top_k", 1)
        if type(top_k) is not int or not 1 <= top_k <= MAX_TOP_K:
            raise _not_a_choice("top_k", top_k, f"1-{MAX_TOP_K}")

    def _irrelevant(self, question: str, documents: Sequence[Document], answerer: Answerer) -> bool:
        """Whether nothing was found that an answer could rest on.

        Our retrievers tell the probability that a hit answers, be it worded otherwise. Quotes need the question's own
        words, so for them only those count. What another retriever found may be right without any.
        """
        if not documents:
            return True
        if isinstance(answerer, ExtractiveAnswerer):
            best = max(mention_relevance(question, document) for document in documents)
        elif self.calibrated:
            best = max(float(document.metadata.get("score", 0.0)) for document in documents)  # a reranker's own
        else:
            return False
        return best < self.config.min_relevance

    def _read(self, value: Any) -> tuple[str, list[BaseMessage]]:
        """(question, conversation) of an input.

        Raises:
            QuestionError: what is wrong with it.
        """
        query = self.check_question(value.get("query") if isinstance(value, Mapping) else value)
        history = value.get("chat_history") if isinstance(value, Mapping) else None
        return query, read_history(history or [])

    def check_question(self, query: object) -> str:
        """The question without white space around it.

        Raises:
            QuestionError: it is not a string, empty, or longer than `max_question_chars`.
        """
        if not isinstance(query, str):
            raise QuestionError(
                f'问题应为字符串或 {{"query": 字符串}}，实际是 {type(query).__name__}',
                f'the question must be a string or {{"query": string}}, got {type(query).__name__}',
            )
        if not query.strip():
            raise QuestionError("问题是空的，请输入要问的内容", "the question is empty; type what you want to know")
        if len(query) > self.config.max_question_chars:
            raise QuestionError(
                f"问题有 {len(query)} 个字，上限是 {self.config.max_question_chars}；请缩短，或调大 max_question_chars",
                f"the question has {len(query)} characters, the limit is {self.config.max_question_chars};"
                " shorten it or raise max_question_chars",
            )
        # half of a surrogate pair, as a terminal of another encoding sends it, is no text to any library below
        return query.encode("utf-8", "replace").decode("utf-8").strip()


def _gathered(value: Any, piece: Any) -> Any:
    """An input that comes in pieces (a `RunnableParallel` streams one key at a time), put together."""
    if value is None:
        return piece
    try:
        return value + piece
    except TypeError:  # not addable: the latest state of it
        return piece


def _not_a_choice(key: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        f"configurable 中 {key} 为 {value!r}，可用的值：{allowed}",
        f"{key} is {value!r} in configurable; allowed: {allowed}",
    )


def read_history(history: Sequence[Any]) -> list[BaseMessage]:
    """A conversation as messages: from messages, (role, text) or {"role", "content"}, or (question, answer) pairs.

    Raises:
        QuestionError: it is not a list, or a turn is none of these.
    """
    if not isinstance(history, list | tuple):
        raise QuestionError(
            f"chat_history 应为列表，实际是 {type(history).__name__}",
            f"chat_history must be a list, got {type(history).__name__}",
        )
    messages: list[BaseMessage] = []
    for number, turn in enumerate(history, 1):
        if isinstance(turn, tuple | list) and len(turn) == 2 and str(turn[0]) not in _ROLES:
            question, answer = turn
            messages += [HumanMessage(str(question))] + ([] if answer is None else [AIMessage(str(answer))])
            continue
        try:
            messages += convert_to_messages([tuple(turn) if isinstance(turn, list) else turn])
        except (KeyError, ValueError, NotImplementedError) as error:
            raise QuestionError(
                f"chat_history 第 {number} 轮无法识别：{turn!r}；应为消息、(角色, 文本) 或 (问题, 回答)",
                f"turn {number} of chat_history is not understood: {turn!r}; it must be a message, (role, text) or"
                " (question, answer)",
            ) from error
    return messages


def build_retrieval_qa(
    config: RagConfig,
    *,
    embeddings: Embeddings | None = None,
    vectorstore: VectorStore | None = None,
    retriever: BaseRetriever | None = None,
    llm: BaseChatModel | Answerer | None = None,
    fulltext: FullTextIndex | None = None,
    reranker: BaseDocumentCompressor | None = None,
) -> RetrievalQA:
    """The chain a config describes; any LangChain object given takes the place of the configured one.

    Args:
        config: from `load_config`.
        embeddings: embedder of the knowledge base.
        vectorstore: a `FaissVectorStore`, or any other store, which is then searched by its own retriever.
        retriever: used as it is; `retriever` and `top_k` cannot then be chosen at run time.
        llm: generator; `extractive` stays available at run time.
        fulltext: shared BM25 index of the same knowledge base.
        reranker: in place of the configured one: puts the hits in a better order, such as a cross-encoder; not used
            with a `retriever` of your own.

    Raises:
        KnowledgeBaseError: the knowledge base does not exist or cannot be read.
        FingerprintError: its vectors were made by another embedder.
    """
    store = vectorstore
    if store is None and retriever is None:
        store = build_vectorstore(config, embeddings)
    if reranker is None and config.reranker is not None and retriever is None:
        reranker = build_reranker(config.reranker)
    chosen = (
        retriever if store is None or retriever is not None else _build_retriever(config, store, fulltext, reranker)
    )
    assert chosen is not None
    calibrated = retriever is None and isinstance(store, FaissVectorStore)
    return RetrievalQA(chosen, _build_answerer(config, llm), config, calibrated=calibrated)


def build_embeddings(config: EmbeddingsConfig) -> Embeddings:
    """The embedder a config section describes."""
    match config:
        case LexicalEmbeddingsConfig(dimensions=dimensions):
            return LexicalEmbeddings(dimensions=dimensions)
        case BgeEmbeddingsConfig():
            from chains.bge.embeddings import BGEEmbeddings

            return BGEEmbeddings(**config.model_dump(exclude={"type"}))


@lru_cache(maxsize=1)
def build_reranker(config: BgeRerankerConfig) -> BaseDocumentCompressor:
    """The reranker a config section describes, one for all chains; its weights load with the first question."""
    from chains.bge.reranker import BgeReranker

    return BgeReranker(**config.model_dump(exclude={"type"}))


def build_vectorstore(
    config: RagConfig, embeddings: Embeddings | None = None, *, create: bool = False
) -> FaissVectorStore:
    """The configured store, its embedder checked against the knowledge base."""
    store = open_vectorstore(config, embeddings, create=create)
    store.check_embedder()
    return store


def open_vectorstore(
    config: RagConfig, embeddings: Embeddings | None = None, *, create: bool = False
) -> FaissVectorStore:
    """The configured store as it is, whoever made its vectors: what changing the embedder starts from."""
    knowledge_base = KnowledgeBase(config.kb, create=create)
    return FaissVectorStore(
        embeddings or build_embeddings(config.embeddings),
        knowledge_base,
        config=config.vectorstore,
        embedder=None if embeddings is not None else config.embeddings.model_dump(mode="json", by_alias=True),
    )


def _build_retriever(
    config: RagConfig, store: VectorStore, fulltext: FullTextIndex | None, reranker: BaseDocumentCompressor | None
) -> Runnable[str, list[Document]]:
    top_k = ConfigurableField("top_k", name="top_k", description="passages an answer is made from")
    if not isinstance(store, FaissVectorStore):
        plain = StoreRetriever(
            vectorstore=store,
            top_k=config.top_k,
            reranker=reranker,
            rerank_fetch=config.retriever.rerank_fetch,
        )
        return plain.configurable_fields(top_k=top_k)
    settings = config.retriever.model_dump(exclude={"type"})
    hybrid = settings if isinstance(config.retriever, HybridRetrieverConfig) else {}
    common: dict[str, Any] = {
        **{key: settings[key] for key in AnyRetrieverConfig.model_fields},
        "store": store,
        "top_k": config.top_k,
        "reranker": reranker,
        "background": Background(store),
    }
    fulltext = fulltext or FullTextIndex(store.knowledge_base)
    legs: dict[str, RunnableSerializable[str, list[Document]]] = {
        "dense": DenseRetriever(**common),
        "lexical": LexicalRetriever(fulltext=fulltext, **common),
        "hybrid": HybridRetriever(fulltext=fulltext, **{**hybrid, **common}),
    }
    chosen = {name: leg.configurable_fields(top_k=top_k) for name, leg in legs.items()}
    default = chosen.pop(config.retriever.type)
    others: dict[str, Any] = chosen
    return default.configurable_alternatives(
        ConfigurableField("retriever"), default_key=config.retriever.type, **others
    )


def _build_answerer(config: RagConfig, llm: BaseChatModel | Answerer | None) -> Runnable[Any, Any]:
    choices: dict[str, ExtractiveConfig | GeneratorConfig] = {
        "extractive": config.llm if isinstance(config.llm, ExtractiveConfig) else ExtractiveConfig(),
        **config.llms,
    }
    if isinstance(llm, Answerer):
        default, key = llm, "custom"
    elif llm is not None:
        default, key = _generating(llm, config), "chat_model"
    else:
        default, key = _answerer(config.llm, config), config.llm.type
    lazily: dict[str, Any] = {
        name: cache(partial(_answerer, choice, config)) for name, choice in choices.items() if name != key
    }
    return default.configurable_alternatives(ConfigurableField("llm"), default_key=key, **lazily)


def _answerer(choice: ExtractiveConfig | GeneratorConfig, config: RagConfig) -> Answerer:
    if isinstance(choice, ExtractiveConfig):
        return ExtractiveAnswerer(max_chars=choice.max_chars, max_quotes=choice.max_quotes, language=config.language)
    return _generating(choice, config)


def _generating(model: BaseChatModel | GeneratorConfig, config: RagConfig) -> Answerer:
    return ChatModelAnswerer(model=model, language=config.language, max_history_chars=config.max_history_chars)
