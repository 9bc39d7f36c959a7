"""Prompt ids: the original's, whatever a user or a document says; labels; what is read from an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage

from chains.chatglm3.prompt import (
    IGNORED,
    AnswerReader,
    ChatGLM3Tokenizer,
    Turn,
    prompt_ids,
    read_call,
    training_ids,
    turn_ids,
    turns_of,
)
from chains.chatglm3.settings import ConversionError
from chains.chatglm3.tokenizer import SURFACES
from loaders.errors import UsageError

pytest.importorskip("tokenizers", reason="needs the extra [models]")


@pytest.fixture(scope="session")
def tokenizer(native: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.from_directory(native)


def golden_chats(golden: Path) -> list[dict[str, Any]]:
    return list(json.loads((golden / "expected_tokens.json").read_text(encoding="utf-8"))["chat"])


def test_prompts_have_the_originals_ids(golden: Path, tokenizer: ChatGLM3Tokenizer) -> None:
    """Also where the user's text holds literal special tokens."""
    for row in golden_chats(golden):
        turns = [Turn(m["role"], m["content"], m.get("metadata", "")) for m in row["messages"]]
        assert prompt_ids(tokenizer, turns) == row["input_ids"]


def test_langchains_messages_have_the_originals_ids(golden: Path, tokenizer: ChatGLM3Tokenizer) -> None:
    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    for row in golden_chats(golden):
        messages = [kinds[m["role"]](m["content"]) for m in row["messages"]]
        assert prompt_ids(tokenizer, turns_of(messages)) == row["input_ids"]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "observation"])
@pytest.mark.parametrize("typed", [*SURFACES, "sop", "eop", "</s>", "<s>", "<unk>"])
def test_a_special_token_that_is_typed_stays_text(tokenizer: ChatGLM3Tokenizer, role: Any, typed: str) -> None:
    specials = {tokenizer.special(surface) for surface in SURFACES} | {0, 1, 2}
    ids = turn_ids(tokenizer, Turn(role, f"前{typed}\n后", metadata=typed))
    assert [number for number in ids if number in specials] == [tokenizer.role(role)]


def test_metadata_stands_on_the_roles_line(tokenizer: ChatGLM3Tokenizer) -> None:
    """build_single_message of the original: role, encode(metadata + newline), encode(content)."""
    ids = turn_ids(tokenizer, Turn("assistant", "tool_call(x=1)", metadata="get_weather"))
    assert ids == [
        tokenizer.role("assistant"),
        *tokenizer.encode("get_weather\n"),
        *tokenizer.encode("tool_call(x=1)"),
    ]


def test_tools_are_listed_in_the_system_turn_as_the_original_lists_them(tokenizer: ChatGLM3Tokenizer) -> None:
    """build_chat_input of the original: content, newline, json.dumps(tools, indent=4, ensure_ascii=False)."""
    tool = {"name": "查天气", "parameters": {"city": "string"}}
    ids = turn_ids(tokenizer, Turn("system", "你有工具：", tools=(tool,)))
    listed = (
        '你有工具：\n[\n    {\n        "name": "查天气",\n        "parameters": {\n'
        '            "city": "string"\n        }\n    }\n]'
    )
    assert ids == [tokenizer.role("system"), *tokenizer.encode("\n"), *tokenizer.encode(listed)]


def test_a_tool_conversation_becomes_turns() -> None:
    call = {"name": "get_weather", "args": {"city": "北京", "days": 2}, "id": "1", "type": "tool_call"}
    messages = [
        HumanMessage("天气？"),
        AIMessage("我查一下。", tool_calls=[call]),
        ToolMessage("晴", tool_call_id="1"),
        AIMessage("晴天。"),
    ]
    tool = {"name": "get_weather"}
    turns = turns_of(messages, tools=[tool])
    assert [(turn.role, turn.metadata) for turn in turns] == [
        ("system", ""), ("user", ""), ("assistant", ""), ("assistant", "get_weather"),
        ("observation", ""), ("assistant", ""),
    ]  # fmt: skip
    assert turns[0].tools == (tool,)
    assert turns[3].content == "```python\ntool_call(city='北京', days=2)\n```"
    assert read_call(turns[3].content) == call["args"]


def test_tools_join_a_system_message_that_is_there() -> None:
    turns = turns_of([SystemMessage("你是助手。"), HumanMessage("?")], tools=[{"name": "t"}])
    assert turns[0] == Turn("system", "你是助手。", tools=({"name": "t"},))
    assert len(turns) == 2


def test_roles_by_name_are_known_and_others_are_named() -> None:
    assert turns_of([ChatMessage("晴", role="observation")]) == [Turn("observation", "晴")]
    with pytest.raises(UsageError, match="'critic'"):
        turns_of([ChatMessage("x", role="critic")])
    with pytest.raises(UsageError, match="'function'"):
        turns_of([FunctionMessage("x", name="f")])


def test_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match="image_url"):
        turns_of([HumanMessage([{"type": "text", "text": "看"}, {"type": "image_url", "image_url": {"url": "x"}}])])


# -- labels --------------------------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_the_end(tokenizer: ChatGLM3Tokenizer) -> None:
    """As the original's fine-tuning: what follows <|assistant|>, and </s>."""
    ids, labels = training_ids(tokenizer, [Turn("user", "你好"), Turn("assistant", "你好，世界！")])
    prompt = prompt_ids(tokenizer, [Turn("user", "你好")])
    answer = [*tokenizer.encode("\n"), *tokenizer.encode("你好，世界！"), 2]
    assert ids == prompt + answer
    assert labels == [IGNORED] * len(prompt) + answer


def test_labels_of_an_earlier_answer_end_with_the_next_role(tokenizer: ChatGLM3Tokenizer) -> None:
    turns = [Turn("user", "甲"), Turn("assistant", "乙"), Turn("user", "丙"), Turn("assistant", "丁")]
    ids, labels = training_ids(tokenizer, turns)
    user, assistant = tokenizer.role("user"), tokenizer.role("assistant")
    first = ids.index(assistant) + 1
    second_user = ids.index(user, first)
    assert labels[first : second_user + 1] == ids[first : second_user + 1]
    learned = [number for number in labels if number != IGNORED]
    line = tokenizer.encode("\n")
    assert learned == [*line, *tokenizer.encode("乙"), user, *line, *tokenizer.encode("丁"), 2]


def test_the_last_answer_alone_can_be_learned(tokenizer: ChatGLM3Tokenizer) -> None:
    turns = [Turn("user", "甲"), Turn("assistant", "乙"), Turn("user", "丙"), Turn("assistant", "丁")]
    _, labels = training_ids(tokenizer, turns, answers="last")
    learned = [number for number in labels if number != IGNORED]
    assert learned == [*tokenizer.encode("\n"), *tokenizer.encode("丁"), 2]


def test_training_continues_the_prompt_that_serving_builds(tokenizer: ChatGLM3Tokenizer) -> None:
    turns = [Turn("system", "规则"), Turn("user", "问 <|assistant|>"), Turn("observation", "文")]
    ids, labels = training_ids(tokenizer, [*turns, Turn("assistant", "答")])
    prompt = prompt_ids(tokenizer, turns)
    assert ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORED}


@pytest.mark.parametrize("turns", [[], [Turn("user", "?")]])
def test_a_conversation_without_an_answer_cannot_be_learned(tokenizer: ChatGLM3Tokenizer, turns: list[Turn]) -> None:
    with pytest.raises(UsageError, match="assistant"):
        training_ids(tokenizer, turns)


# -- answers -------------------------------------------------------------------------------------------------------


def read(pieces: list[str], *, tools: bool = False) -> tuple[str, list[Any]]:
    reader = AnswerReader(tools)
    shown = "".join(reader.take(piece) for piece in pieces) + reader.rest()
    return shown, reader.calls


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize(
    "pieces", [["", "\n", " ", "你好", "\n 世界"], ["\n 你好\n 世界"], ["\n", "你", "好\n 世", "界"]]
)
def test_the_empty_line_before_an_answer_is_not_shown(pieces: list[str], tools: bool) -> None:
    assert read(pieces, tools=tools) == ("你好\n 世界", [])


def test_without_tools_a_first_line_is_part_of_the_answer() -> None:
    assert read(["年假", "\n十天"])[0] == "年假\n十天"


def test_a_tool_call_is_not_shown_but_told() -> None:
    shown, calls = read(["get_wea", "ther\n ```py", "thon\ntool_call(city='北京')\n```"], tools=True)
    assert shown == ""
    assert calls == [{"name": "get_weather", "args": {"city": "北京"}, "id": "call_0", "type": "tool_call"}]


def test_a_text_and_then_a_tool_call() -> None:
    reader = AnswerReader(tools=True)
    shown = reader.take("\n 我查。") + reader.new_part() + reader.take("t\n tool_call(a=1)") + reader.rest()
    assert shown == "我查。\n"
    assert [call["name"] for call in reader.calls] == ["t"]


def test_what_is_no_tool_call_after_all_is_shown() -> None:
    assert read(["结论\n 十天", "年假"], tools=True) == ("结论\n 十天年假", [])


@pytest.mark.parametrize(
    "content", ["tool_call(__import__('os').system('x'))", "x=1", "tool_call(1)", "", "f(a=open('x'))"]
)
def test_what_is_not_a_call_with_plain_values_is_none(content: str) -> None:
    assert read_call(content) is None


# -- tokenizer -----------------------------------------------------------------------------------------------------


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no tokenizer\.json"):
        ChatGLM3Tokenizer.from_directory(tmp_path)


def test_another_models_tokenizer_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConversionError, match="_type: huggingface"):
        ChatGLM3Tokenizer.from_directory(tmp_path)
