"""Answerers: from a question and passages to an answer with citations, piece by piece."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict

from chains.analysis import fold
from chains.chat_models import (
    ThoughtFilter,
    broke_off,
    describe_server_error,
    empty_answer,
    finish_reason,
    init_model,
    server_errors,
    was_cut,
)
from chains.config import ChatModelConfig, GeneratorConfig
from chains.extraction import find_support, select_quotes
from chains.prompts import ANSWER_SYSTEM, ANSWER_USER, CONDENSE_SYSTEM, CONDENSE_USER, REFUSAL, Language
from loaders.splitters import context_lines

logger = logging.getLogger(__name__)

# Words that point back to something said before: such a question cannot be searched for on its own.
_POINTING_BACK = re.compile(
    r"(?<![其吉])[他她](?!人|乡|国)|(?<!其)它|这个|那个|这些|那些|上述|前面|刚才|前者|后者|呢[？?]?$"
    r"|(?<![应活])该(?![不怎如找])|(?<![尤极与耳何])其(?![他它余中实次])|(?<![因彼如从])此(?![外前后])"
    r"|\b(?:it|its|they|them|their|he|his|him|she|her|this|that|these|those)\b",
    re.IGNORECASE,
)
# "[1]", and what Chinese models write as well: 【1】, ［1］, [1, 2], [1、2]
_NUMBERS = r"[\[［【]\s{0,2}\d{1,3}(?:\s{0,2}[,，、]\s{0,2}\d{1,3}){0,9}\s{0,2}[\]］】]"
CITATION_MARK = re.compile(rf"[ \t]{{0,4}}{_NUMBERS}")
_CLAIM = re.compile(r"(?:[^。！？!?.\n]|\.(?!\s|$|\[))*(?:[。！？!?.\n]|$)" + rf"(?:[ \t]{{0,4}}{_NUMBERS})*")
# Of a claim's information, how much a quote must hold to count as its support.
_SUPPORTED = 0.35
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LIST_MARKER = re.compile(r"^\s*\d{1,2}(?:[.、)]|$)")
_NUMERALS = re.compile(r"[〇零一二两三四五六七八九十百千万亿]")


class AnswerInput(TypedDict):
    """What an answerer gets: a stand-alone question and passages, best first."""

    question: str
    passages: list[Document]


class Citation(TypedDict):
    """Where a part of an answer stands: `document_text[start:end] == quote`.

    `document_id` tells the records of one JSONL source apart; None where the retriever does not know documents.
    """

    n: int
    supported: bool
    """False where a model named a passage that does not bear out what it said, or that does not exist: no quote then"""
    source: str
    document_id: int | None
    page: int | None
    start: int
    end: int
    quote: str
    slide: NotRequired[int]
    sheet: NotRequired[str]
    also_in: NotRequired[list[dict[str, str]]]
    """further sources with the same text"""


class Answerer(RunnableSerializable[AnswerInput, AddableDict]):
    """Streams addable dictionaries: `{"result": piece}` each, then `{"citations": [...], "refused": bool}`.

    An answer that ended because the generator had used up its tokens has `"truncated": True`, too.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, ignored_types=(cached_property,))

    language: Language = "zh"

    def invoke(self, input: AnswerInput, config: RunnableConfig | None = None, **kwargs: Any) -> AddableDict:  # noqa: A002
        """The whole answer at once."""
        answer = AddableDict({"result": ""})
        for piece in self.stream(input, config, **kwargs):
            answer = answer + piece
        return answer

    async def astream(
        self,
        input: AnswerInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AddableDict]:
        """As `stream`."""
        for piece in await run_in_executor(config, lambda: list(self.stream(input, config, **kwargs))):
            yield piece

    def condense(self, question: str, history: Sequence[BaseMessage], config: RunnableConfig) -> str:
        """The question as one that can be searched for without the conversation."""
        raise NotImplementedError

    def load(self) -> None:
        """Load what answers, so that the first question need not wait; quoting needs nothing loaded."""


class ExtractiveAnswerer(Answerer):
    """Quotes the sentences that answer, each with its citation; no model, nothing invented."""

    max_chars: int = 120
    max_quotes: int = 3

    def stream(
        self,
        input: AnswerInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[AddableDict]:
        """One piece a quote."""
        passages = input["passages"]
        quotes = select_quotes(
            input["question"],
            [passage.page_content for passage in passages],
            headings=[" ".join(context_lines(passage)) for passage in passages],
            max_chars=self.max_chars,
            max_quotes=self.max_quotes,
        )
        if not quotes:
            yield from refusal(self.language)
            return
        citations = []
        for n, quote in enumerate(quotes, 1):
            citation = cite(n, passages[quote.passage], quote.start, quote.end)
            citations.append(citation)
            yield AddableDict({"result": ("\n" if n > 1 else "") + f"{citation['quote']} [{n}]"})
        yield AddableDict({"citations": citations, "refused": False})

    def condense(self, question: str, history: Sequence[BaseMessage], config: RunnableConfig) -> str:
        """The question, behind the one before it where it points back ("它的……", "呢？")."""
        previous = next((m.text for m in reversed(history) if isinstance(m, HumanMessage)), "")
        return f"{previous} {question}" if previous and _POINTING_BACK.search(question) else question


@runtime_checkable
class CountsTokens(Protocol):
    """A chat model that knows how long its prompts may be."""

    def spare_tokens(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens by which the prompt of these messages may still grow, negative where it must shrink."""


@runtime_checkable
class LoadsWeights(Protocol):
    """A chat model in this process."""

    def load(self) -> None:
        """Load the weights now rather than with the first question."""


class ChatModelAnswerer(Answerer):
    """A chat model that answers from numbered references; its [n] marks become citations, checked against them.

    References that do not fit the model's context are left out whole, the lowest ranked first; the answer then says
    in `references_used` which numbers the model was given. One that ended at the limit of tokens says `truncated`.
    """

    model: BaseChatModel | GeneratorConfig
    max_history_chars: int = 4000
    """of a conversation, where the model does not tell how many tokens its context has room for"""

    @cached_property
    def _chat_model(self) -> BaseChatModel:
        return self.model if isinstance(self.model, BaseChatModel) else init_model(self.model)

    def stream(
        self,
        input: AnswerInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[AddableDict]:
        """Pieces as the model generates them.

        Raises:
            GeneratorError: the model cannot be asked, breaks off, or says nothing.
        """
        text, reason = "", ""
        errors, thoughts = server_errors(), ThoughtFilter()
        try:
            passages = self._fitting(input)
            for chunk in self._chat_model.stream(self._messages(input["question"], passages), config):
                piece, reason = thoughts.take(chunk.text), finish_reason(chunk) or reason
                if piece:
                    text += piece
                    yield AddableDict({"result": piece})
        except errors as error:
            raise describe_server_error(error, self.model) from error
        yield from self._closing(text, reason, passages, len(input["passages"]))

    async def astream(
        self,
        input: AnswerInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AddableDict]:
        """As `stream`."""
        text, reason = "", ""
        errors, thoughts = server_errors(), ThoughtFilter()
        try:
            passages = await run_in_executor(config, self._fitting, input)  # it may load the model
            async for chunk in self._chat_model.astream(self._messages(input["question"], passages), config):
                piece, reason = thoughts.take(chunk.text), finish_reason(chunk) or reason
                if piece:
                    text += piece
                    yield AddableDict({"result": piece})
        except errors as error:
            raise describe_server_error(error, self.model) from error
        for closing in self._closing(text, reason, passages, len(input["passages"])):
            yield closing

    def condense(self, question: str, history: Sequence[BaseMessage], config: RunnableConfig) -> str:
        """The question rewritten by the model; as it is where the model returns nothing, or has no room for a turn."""
        errors = server_errors()
        try:
            recent = self._recent(question, history)
            if not recent:
                return question
            messages = condense_messages(question, recent, self.language)
            return ThoughtFilter().take(self._chat_model.invoke(messages, config).text).strip() or question
        except errors as error:
            raise describe_server_error(error, self.model) from error

    def load(self) -> None:
        """Load the weights of a model in this process; a server is not asked.

        Raises:
            RagProjError: they cannot be found or loaded.
        """
        if isinstance(self._chat_model, LoadsWeights):
            self._chat_model.load()

    def _messages(self, question: str, passages: Sequence[Document]) -> list[BaseMessage]:
        return answer_messages(question, passages, self.language)

    def _recent(self, question: str, history: Sequence[BaseMessage]) -> Sequence[BaseMessage]:
        """The latest messages of a conversation that the model's context, or else `max_history_chars`, has room for."""
        model = self._chat_model

        def fits(messages: Sequence[BaseMessage]) -> bool:
            if isinstance(model, CountsTokens):
                return model.spare_tokens(condense_messages(question, messages, self.language)) >= 0
            return sum(len(message.text) for message in messages) <= self.max_history_chars

        while history and not fits(history):
            history = history[1:]
        return history

    def _fitting(self, inputs: AnswerInput) -> list[Document]:
        """The passages that the model's context has room for, best first; one at least, and the model says if not."""
        passages, model = list(inputs["passages"]), self._chat_model
        if isinstance(model, CountsTokens):
            while len(passages) > 1 and model.spare_tokens(self._messages(inputs["question"], passages)) < 0:
                passages.pop()
        if dropped := len(inputs["passages"]) - len(passages):
            logger.warning("the last %d of %d references do not fit the context", dropped, len(inputs["passages"]))
        return passages

    def _closing(self, text: str, reason: str, passages: Sequence[Document], found: int) -> Iterator[AddableDict]:
        # an OpenAI-compatible server says why it stopped; other models do not all tell
        if not reason and isinstance(self.model, ChatModelConfig) and self.model.model_provider == "openai":
            raise broke_off(self.model)
        if not text.strip():
            raise empty_answer(self.model, reason)  # no refusal: nobody has said that the passages do not tell
        said = CITATION_MARK.sub("", text).replace(REFUSAL[self.language], "")
        refused = not said.strip(" \n。.")
        closing = AddableDict({"citations": [] if refused else cited(text, passages), "refused": refused})
        if len(passages) < found:
            closing["references_used"] = list(range(1, len(passages) + 1))
        if was_cut(reason):
            closing["truncated"] = True
        yield closing


def answer_messages(question: str, passages: Sequence[Document], language: Language) -> list[BaseMessage]:
    """What a model is asked when it answers from passages; training asks it the same."""
    references = "\n\n".join(
        "\n".join([f"[{n}] {' · '.join(context_lines(passage))}".rstrip(), passage.page_content])
        for n, passage in enumerate(passages, 1)
    )
    user = ANSWER_USER[language].format(references=references, question=question)
    return [SystemMessage(ANSWER_SYSTEM[language]), HumanMessage(user)]


def condense_messages(question: str, history: Sequence[BaseMessage], language: Language) -> list[BaseMessage]:
    """What a model is asked when a question of a conversation shall stand on its own; training asks it the same."""
    lines = "\n".join(f"{'用户' if isinstance(m, HumanMessage) else '助手'}：{m.text}" for m in history)
    user = CONDENSE_USER[language].format(history=lines, question=question)
    return [SystemMessage(CONDENSE_SYSTEM[language]), HumanMessage(user)]


def refusal(language: Language) -> Iterator[AddableDict]:
    """The answer when nothing relevant was found."""
    yield AddableDict({"result": REFUSAL[language]})
    yield AddableDict({"citations": [], "refused": True})


def cited(text: str, passages: Sequence[Document]) -> list[Citation]:
    """A citation for each reference number in a generated answer, in order of the numbers.

    It is supported where the passage bears out a claim that it is put to: the quote is then the passage's sentence that
    covers the claim best. Otherwise, or where the number names no passage, it is marked as unsupported and quotes
    nothing.
    """
    citations: dict[int, Citation] = {}
    for claim in _CLAIM.finditer(text):
        numbers = [int(n) for mark in CITATION_MARK.findall(claim.group()) for n in re.findall(r"\d+", mark)]
        statement = CITATION_MARK.sub("", claim.group()).strip()
        for n in numbers:
            if n not in citations or not citations[n]["supported"]:
                citations[n] = _checked(n, statement, passages)
    return [citations[n] for n in sorted(citations)]


def _checked(n: int, statement: str, passages: Sequence[Document]) -> Citation:
    """The citation of the passage with number `n` for a statement, supported or not."""
    if not 1 <= n <= len(passages):
        return cite(n, Document(page_content=""), 0, 0, supported=False)
    passage = passages[n - 1]
    support = find_support(statement, passage.page_content)
    if support is None or support.score < _SUPPORTED or _has_other_numbers(statement, passage.page_content):
        return cite(n, passage, 0, 0, supported=False)
    return cite(n, passage, support.start, support.end)


def _has_other_numbers(statement: str, passage: str) -> bool:
    """Whether a statement has numbers that its passage does not: words may overlap much where a figure is made up.

    Nothing is said of passages with Chinese numerals, which may stand for the same numbers.
    """
    if _NUMERALS.search(passage):
        return False
    numbers, known = (
        set(_NUMBER.findall(_THOUSANDS.sub("", fold(text)))) for text in (_LIST_MARKER.sub("", statement), passage)
    )
    return not numbers <= known


def _metadata_at(passage: Document, offset: int) -> dict[str, Any]:
    """A passage's metadata with page, slide or sheet of the part an offset lies in, where several were joined."""
    place: dict[str, Any] = {}
    for part in listed(passage.metadata, "parts"):
        if part["start"] <= offset:
            place = {key: value for key, value in part.items() if key != "start"}
    return {**passage.metadata, **place}


def listed(metadata: Mapping[str, Any], key: str) -> list[Any]:
    """The `parts` or `also_in` of a found document; none where another retriever means something else by the word."""
    entries, needed = metadata.get(key), {"parts": "start", "also_in": "source"}[key]
    if isinstance(entries, list) and all(isinstance(entry, Mapping) and needed in entry for entry in entries):
        return entries
    return []


def cite(n: int, passage: Document, start: int, end: int, *, supported: bool = True) -> Citation:
    """The citation of `passage.page_content[start:end]`, its offsets moved to the source document's text."""
    start_of_passage = passage.metadata.get("start")
    offset = start_of_passage if isinstance(start_of_passage, int) else 0
    metadata = _metadata_at(passage, offset + start)
    citation = Citation(
        n=n,
        supported=supported,
        source=str(metadata.get("source", "")),
        document_id=metadata.get("document_id"),
        page=metadata.get("page"),
        start=offset + start,
        end=offset + end,
        quote=passage.page_content[start:end],
    )
    if "slide" in metadata:
        citation["slide"] = metadata["slide"]
    if "sheet" in metadata:
        citation["sheet"] = metadata["sheet"]
    if also_in := listed(metadata, "also_in"):
        citation["also_in"] = also_in
    return citation
