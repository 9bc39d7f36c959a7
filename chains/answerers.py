"""Answerers: from a question and passages to an answer with citations, piece by piece."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cached_property
from typing import Any, NotRequired, TypedDict

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict

from chains.chat_models import ThoughtFilter, broke_off, describe_server_error, init_model, server_errors
from chains.config import ChatModelConfig
from chains.extraction import find_support, select_quotes
from chains.prompts import ANSWER_SYSTEM, ANSWER_USER, CONDENSE_SYSTEM, CONDENSE_USER, REFUSAL, Language
from loaders.splitters import context_lines

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


class AnswerInput(TypedDict):
    """What an answerer gets: a stand-alone question and passages, best first."""

    question: str
    passages: list[Document]


class Citation(TypedDict):
    """Where a part of an answer stands: `document_text[start:end] == quote`.

    `document_id` tells the records of one JSONL source apart; None where the retriever does not know documents.
    """

    n: int
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
    """Streams addable dictionaries: `{"result": piece}` each, then `{"citations": [...], "refused": bool}`."""

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


class ChatModelAnswerer(Answerer):
    """A chat model that answers from numbered references; its [n] marks become citations the passages bear out."""

    model: BaseChatModel | ChatModelConfig

    @cached_property
    def _chat_model(self) -> BaseChatModel:
        return self.model if isinstance(self.model, BaseChatModel) else init_model(self.model)

    def stream(
        self,
        input: AnswerInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[AddableDict]:
        """Pieces as the model generates them."""
        text, complete = "", False
        errors, thoughts = server_errors(), ThoughtFilter()
        try:
            for chunk in self._chat_model.stream(self._messages(input), config):
                piece, complete = thoughts.take(chunk.text), complete or _is_last(chunk)
                if piece:
                    text += piece
                    yield AddableDict({"result": piece})
        except errors as error:
            raise describe_server_error(error, self.model) from error
        yield from self._closing(text, complete, input["passages"])

    async def astream(
        self,
        input: AnswerInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AddableDict]:
        """As `stream`."""
        text, complete = "", False
        errors, thoughts = server_errors(), ThoughtFilter()
        try:
            async for chunk in self._chat_model.astream(self._messages(input), config):
                piece, complete = thoughts.take(chunk.text), complete or _is_last(chunk)
                if piece:
                    text += piece
                    yield AddableDict({"result": piece})
        except errors as error:
            raise describe_server_error(error, self.model) from error
        for closing in self._closing(text, complete, input["passages"]):
            yield closing

    def condense(self, question: str, history: Sequence[BaseMessage], config: RunnableConfig) -> str:
        """The question rewritten by the model; as it is where the model returns nothing."""
        messages = condense_messages(question, history, self.language)
        errors = server_errors()
        try:
            return ThoughtFilter().take(self._chat_model.invoke(messages, config).text).strip() or question
        except errors as error:
            raise describe_server_error(error, self.model) from error

    def _messages(self, inputs: AnswerInput) -> list[BaseMessage]:
        return answer_messages(inputs["question"], inputs["passages"], self.language)

    def _closing(self, text: str, complete: bool, passages: Sequence[Document]) -> Iterator[AddableDict]:
        # an OpenAI-compatible server says why it stopped; other models do not all tell
        if not complete and isinstance(self.model, ChatModelConfig) and self.model.model_provider == "openai":
            raise broke_off(self.model)
        said = CITATION_MARK.sub("", text).replace(REFUSAL[self.language], "")
        if not text.strip():
            yield from refusal(self.language)
            return
        refused = not said.strip(" \n。.")
        yield AddableDict({"citations": [] if refused else cited(text, passages), "refused": refused})


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


def _is_last(chunk: BaseMessage) -> bool:
    return bool(chunk.response_metadata.get("finish_reason"))


def refusal(language: Language) -> Iterator[AddableDict]:
    """The answer when nothing relevant was found."""
    yield AddableDict({"result": REFUSAL[language]})
    yield AddableDict({"citations": [], "refused": True})


def cited(text: str, passages: Sequence[Document]) -> list[Citation]:
    """A citation for each reference number in a generated answer whose passage supports the claim before it.

    The quote is the passage's sentence that covers the claim best; numbers that name no passage, or a passage with
    nothing of the claim in it, are left out.
    """
    citations: dict[int, Citation] = {}
    for claim in _CLAIM.finditer(text):
        numbers = [int(n) for mark in CITATION_MARK.findall(claim.group()) for n in re.findall(r"\d+", mark)]
        statement = CITATION_MARK.sub("", claim.group()).strip()
        for n in numbers:
            if n in citations or not 1 <= n <= len(passages):
                continue
            passage = passages[n - 1]
            support = find_support(statement, passage.page_content)
            if support is not None and support.score >= _SUPPORTED:
                citations[n] = cite(n, passage, support.start, support.end)
    return [citations[n] for n in sorted(citations)]


def _metadata_at(passage: Document, offset: int) -> dict[str, Any]:
    """A passage's metadata with page, slide or sheet of the part an offset lies in, where several were joined."""
    place: dict[str, Any] = {}
    for part in passage.metadata.get("parts", []):
        if part["start"] <= offset:
            place = {key: value for key, value in part.items() if key != "start"}
    return {**passage.metadata, **place}


def cite(n: int, passage: Document, start: int, end: int) -> Citation:
    """The citation of `passage.page_content[start:end]`, its offsets moved to the source document's text."""
    start_of_passage = passage.metadata.get("start")
    offset = start_of_passage if isinstance(start_of_passage, int) else 0
    metadata = _metadata_at(passage, offset + start)
    citation = Citation(
        n=n,
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
    if "also_in" in metadata:
        citation["also_in"] = metadata["also_in"]
    return citation
