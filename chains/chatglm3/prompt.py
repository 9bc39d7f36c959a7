"""ChatGLM3's prompt as token ids, built turn by turn, for training and serving alike.

A special token stands in a prompt only where this module puts it: what a user types or a document says is text, also
where it reads `<|assistant|>`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
)

from chains.chatglm3.settings import EOS_ID, ConversionError
from loaders.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Role = Literal["system", "user", "assistant", "observation"]
PREFIX = ("[gMASK]", "<sop>")
IGNORED = -100  # the label torch's cross entropy leaves out


@dataclass(frozen=True)
class Turn:
    """One message as ChatGLM3 knows it.

    `metadata` stands on the role's line: the tool that an assistant calls. `tools` are offered by a system turn.
    """

    role: Role
    content: str
    metadata: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


class ChatGLM3Tokenizer:
    """Ids of plain text, and of the special tokens by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # text is text
        self.tokenizer = tokenizer

    @classmethod
    def from_directory(cls, directory: Path) -> ChatGLM3Tokenizer:
        """The tokenizer of a native model directory.

        Raises:
            ConversionError: its tokenizer.json is missing, or not one that `ragproj convert` wrote.
        """
        from tokenizers import Tokenizer

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConversionError(
                f"{directory} 中没有 tokenizer.json；请用 ragproj convert chatglm3 转换",
                f"there is no tokenizer.json in {directory}; convert the model with ragproj convert chatglm3",
            )
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.token_to_id("<|assistant|>") is None or tokenizer.token_to_id(PREFIX[1]) is None:
            raise ConversionError(
                f"{path} 不是 ChatGLM3 的分词器；其他模型请用 _type: huggingface",
                f"{path} is not ChatGLM3's tokenizer; for other models use _type: huggingface",
            )
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, nothing put before or after it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def special(self, surface: str) -> int:
        """Id of a special token."""
        number = self.tokenizer.token_to_id(surface)
        assert number is not None
        return int(number)

    def role(self, role: Role) -> int:
        """Id of the token that begins a role's turn."""
        return self.special(f"<|{role}|>")


def prompt_ids(tokenizer: ChatGLM3Tokenizer, turns: Iterable[Turn]) -> list[int]:
    """Ids of a conversation whose next turn is the assistant's."""
    ids = [tokenizer.special(surface) for surface in PREFIX]
    for turn in turns:
        ids += turn_ids(tokenizer, turn)
    return [*ids, tokenizer.role("assistant")]


def turn_ids(tokenizer: ChatGLM3Tokenizer, turn: Turn) -> list[int]:
    """Ids of one turn: its role, a line of metadata, its content; each encoded by itself, as the original does."""
    content = turn.content
    if turn.tools:
        content += "\n" + json.dumps(list(turn.tools), indent=4, ensure_ascii=False)
    return [tokenizer.role(turn.role), *tokenizer.encode(f"{turn.metadata}\n"), *tokenizer.encode(content)]


def training_ids(
    tokenizer: ChatGLM3Tokenizer, turns: Sequence[Turn], *, answers: Literal["all", "last"] = "all"
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation that ends with the assistant's turn; both of the same length.

    Learned is what the model has to generate: everything after `<|assistant|>`, and the token that ends the turn, which
    is the next role or the end of text. All other labels are IGNORED. Labels are not shifted; models do that.

    Args:
        tokenizer: of the model.
        turns: the conversation.
        answers: whether every assistant's turn is learned, or the last one alone.

    Raises:
        UsageError: the last turn is not the assistant's.
    """
    if not turns or turns[-1].role != "assistant":
        raise UsageError(
            "训练的对话应以 assistant 结尾", "a conversation to learn from must end with the assistant's turn"
        )
    ids = [tokenizer.special(surface) for surface in PREFIX]
    learned = [False] * len(ids)
    for place, turn in enumerate(turns):
        answer = turn.role == "assistant" and (answers == "all" or place == len(turns) - 1)
        added = turn_ids(tokenizer, turn)
        ids += added
        learned += [answer] * len(added)
    ids.append(EOS_ID)
    # one to the right: the role's own token is given, the token after the turn is to be generated
    learned = [False, *learned]
    return ids, [number if learn else IGNORED for number, learn in zip(ids, learned, strict=True)]


# -- LangChain's messages ------------------------------------------------------------------------------------------

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "observation": "observation",
    "tool": "observation",
}


def turns_of(messages: Sequence[BaseMessage], *, tools: Sequence[Mapping[str, Any]] = ()) -> list[Turn]:
    """LangChain's messages as turns.

    Tools offered are part of the system turn, which is put first where there is none. `metadata` of an assistant's
    message is taken from its `additional_kwargs`.

    Raises:
        UsageError: a message has a role ChatGLM3 does not know, or holds something other than text.
    """
    turns = [turn for message in messages for turn in _turns(message)]
    if not tools:
        return turns
    if not turns or turns[0].role != "system":
        turns.insert(0, Turn("system", _TOOLS_OFFERED))
    return [Turn("system", turns[0].content, tools=tuple(tools)), *turns[1:]]


# The sentence that ChatGLM3 was trained to see before a list of tools.
_TOOLS_OFFERED = "Answer the following questions as best as you can. You have access to the following tools:"


def _turns(message: BaseMessage) -> Iterator[Turn]:
    text = _text(message)
    match message:
        case SystemMessage():
            yield Turn("system", text, tools=tuple(message.additional_kwargs.get("tools", ())))
        case HumanMessage():
            yield Turn("user", text)
        case AIMessage():
            metadata = str(message.additional_kwargs.get("metadata", ""))
            if text or metadata or not message.tool_calls:
                yield Turn("assistant", text, metadata=metadata)
            for call in message.tool_calls:
                yield Turn("assistant", _write_call(call["args"]), metadata=call["name"])
        case ToolMessage():
            yield Turn("observation", text)
        case ChatMessage(role=role) if role in _ROLES:
            yield Turn(_ROLES[role], text)
        case _:
            role = getattr(message, "role", message.type)
            raise UsageError(
                f"ChatGLM3 没有角色 {role!r}，可用：{'、'.join(sorted(_ROLES))}",
                f"ChatGLM3 has no role {role!r}; it has {', '.join(sorted(_ROLES))}",
            )


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, list):
        kinds = {block.get("type") for block in message.content if isinstance(block, dict)}
        if others := sorted(str(kind) for kind in kinds - {"text", "tool_use", "tool_call"}):
            raise UsageError(
                f"生成模型只接受文字，消息中有 {'、'.join(others)}",
                f"the generator takes text only; a message holds {', '.join(others)}",
            )
    return str(message.text)


def _write_call(arguments: Mapping[str, Any]) -> str:
    """A tool call as ChatGLM3 writes it."""
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"```python\ntool_call({listed})\n```"


def read_call(content: str) -> dict[str, Any] | None:
    """The arguments of a tool call that ChatGLM3 wrote; None where it is none. Nothing is executed."""
    lines = [line for line in content.strip().splitlines() if not line.startswith("```")]
    try:
        call = ast.parse("\n".join(lines).strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


# -- what the model answers ----------------------------------------------------------------------------------------


@dataclass
class AnswerReader:
    """Takes an answer piece by piece; gives back what of it is to be shown.

    An answer begins with a line for metadata, which is empty unless a tool is called, and a space. A further
    `<|assistant|>` inside the answer begins such a part again: `new_part`.
    """

    tools: bool
    """whether any were offered; without, everything is text"""
    calls: list[ToolCall] = field(default_factory=list)
    _head: str | None = ""
    _call: tuple[str, list[str]] | None = None
    _shown: bool = False

    def take(self, piece: str) -> str:
        """What can be shown after this piece."""
        if self._call is not None:
            self._call[1].append(piece)
            return ""
        if self._head is None:
            return piece
        self._head += piece
        if not self.tools:
            return self._show(self._head.lstrip())
        metadata, newline, content = self._head.partition("\n")
        if not newline:
            return ""
        if not metadata.strip():
            return self._show(content.lstrip())
        self._call = (metadata.strip(), [content])
        return ""

    def new_part(self) -> str:
        """A further `<|assistant|>`: what separates the parts shown."""
        self._close_call()
        separator = "\n" if self._shown and self._head is None else ""
        self._head = ""
        return separator

    def rest(self) -> str:
        """What is still held back when the answer is over; tool calls are then complete."""
        held, self._head = (self._head or "").strip(), None
        if self._call is None:
            return held
        name, pieces = self._call
        return "" if self._close_call() else f"{name}\n{''.join(pieces)}"

    def _show(self, text: str) -> str:
        if text:
            self._head, self._shown = None, True
        return text

    def _close_call(self) -> bool:
        if self._call is None:
            return False
        name, pieces = self._call
        arguments = read_call("".join(pieces))
        self._call = None
        if arguments is None:
            return False
        self.calls.append(ToolCall(name=name, args=arguments, id=f"call_{len(self.calls)}", type="tool_call"))
        return True
