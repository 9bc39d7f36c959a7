"""How a model is spoken to: messages to prompt ids, ids to an answer. ChatGLM3's own way, and a model's template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from langchain_core.messages import BaseMessage, ToolCall, convert_to_openai_messages

from chains.chatglm3.prompt import AnswerReader, ChatGLM3Tokenizer, prompt_ids, turns_of
from chains.chatglm3.settings import ConversionError
from chains.chatglm3.texts import PieceDecoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# marks a text that must not become a special token while a template is rendered; no document has it
_MARK = "\U000f0000"
_MARKED = re.compile(f"{_MARK}(\\d+){_MARK}")


class Reader(Protocol):
    """Takes the ids of one answer."""

    calls: list[ToolCall]

    def take(self, number: int) -> str:
        """The text to show after this id."""

    def rest(self) -> str:
        """What is still held back when the answer is over."""


class Format(Protocol):
    """Prompt ids and answers of one model."""

    def prompt(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation whose next turn is the model's."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself."""

    def reader(self, *, tools: bool) -> Reader:
        """For one answer."""


class ChatGLM3Format:
    """ChatGLM3's: see `chains.chatglm3.prompt`."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = ChatGLM3Tokenizer.from_directory(directory)

    def prompt(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation whose next turn is the model's."""
        return prompt_ids(self._tokenizer, turns_of(messages, tools=tools))

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        return self._tokenizer.encode(text)

    def reader(self, *, tools: bool) -> Reader:
        """For one answer."""
        return _ChatGLM3Reader(self._tokenizer, tools=tools)


class _ChatGLM3Reader:
    def __init__(self, tokenizer: ChatGLM3Tokenizer, *, tools: bool) -> None:
        self._answer = AnswerReader(tools)
        self._tokenizer = tokenizer
        self._decoder = PieceDecoder(tokenizer.tokenizer)
        self._assistant = tokenizer.role("assistant")
        self.calls = self._answer.calls

    def take(self, number: int) -> str:
        """The text to show after this id."""
        if number != self._assistant:
            return self._answer.take(self._decoder.take(number))
        before = self._answer.take(self._decoder.rest())
        self._decoder = PieceDecoder(self._tokenizer.tokenizer)
        return before + self._answer.new_part()

    def rest(self) -> str:
        """What is still held back when the answer is over."""
        return self._answer.take(self._decoder.rest()) + self._answer.rest()


class TemplateFormat:
    """Any model's: the chat template of its tokenizer. Special tokens in messages stay text here as well.

    So do other added tokens by which a template marks parts of a turn (Qwen's `<think>`, `<tool_call>`), in all but the
    assistant's own turns: a template takes these apart by them.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConversionError(
                f"无法加载 {directory} 的分词器：{reason}", f"cannot load the tokenizer of {directory}: {reason}"
            ) from error
        if not self._tokenizer.chat_template:
            raise ConversionError(
                f"{directory} 的分词器没有对话模板，这不是对话模型",
                f"the tokenizer of {directory} has no chat template: it is no chat model",
            )
        added = self._tokenizer.added_tokens_decoder
        self._numbers = {token.content: number for number, token in added.items()}
        self._added = _any_of(self._numbers)
        self._special = _any_of(token.content for token in added.values() if token.special)
        self._plain = self._tokenizer.backend_tokenizer
        self._text = _without_added_tokens(self._plain)

    def prompt(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation whose next turn is the model's."""
        typed: list[str] = []

        def mark(match: re.Match[str]) -> str:
            typed.append(match.group())
            return f"{_MARK}{len(typed) - 1}{_MARK}"

        def unmark(text: str) -> str:
            return _MARKED.sub(lambda match: typed[int(match[1])], text)

        marked = [
            _replaced(message, self._special if message["role"] == "assistant" else self._added, mark)
            for message in convert_to_openai_messages(list(messages))
        ]
        arguments: dict[str, Any] = {"tools": list(tools)} if tools else {}
        text = str(self._tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False, **arguments))
        if not typed:
            whole: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return whole
        # what stands between the template's own tokens is text
        ids: list[int] = []
        for part in self._added.split(text):
            ids += [self._numbers[part]] if part in self._numbers else self.encode(unmark(part)) if part else []
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, added tokens in it taken as text."""
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def reader(self, *, tools: bool) -> Reader:
        """For one answer; tool calls stay part of its text."""
        return _PlainReader(PieceDecoder(self._plain))


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the tokens, the longest there is, as a group."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)()")


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that knows no added tokens; `split_special_tokens` would still let through those that are not special."""
    from tokenizers import Tokenizer

    content = {**json.loads(tokenizer.to_str()), "added_tokens": [], "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(content))


def _replaced(item: Any, pattern: re.Pattern[str], by: Callable[[re.Match[str]], str]) -> Any:
    """A message, or a part of one, with what matches in its texts replaced."""
    if isinstance(item, str):
        return pattern.sub(by, item.replace(_MARK, ""))
    if isinstance(item, dict):
        return {key: value if key == "role" else _replaced(value, pattern, by) for key, value in item.items()}
    return [_replaced(value, pattern, by) for value in item] if isinstance(item, list) else item


class _PlainReader:
    def __init__(self, decoder: PieceDecoder) -> None:
        self._decoder = decoder
        self.calls: list[ToolCall] = []

    def take(self, number: int) -> str:
        """The text to show after this id."""
        return self._decoder.take(number)

    def rest(self) -> str:
        """What is still held back when the answer is over."""
        return self._decoder.rest()
