"""ChatGLM3 and other local models as LangChain chat models: the standard suite, and what it does not ask."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from chains.chatglm3.chat_model import ChatGLM3, GenerationError, HuggingFaceChatModel, PromptTooLongError
from chains.chatglm3.settings import ConversionError
from loaders.errors import UsageError

pytest.importorskip("torch", reason="needs the extra [models]")
pytest.importorskip("transformers", reason="needs the extra [models]")


class OfRandomWeights:
    """What the suites need to know of a tiny model that says anything but what it was asked."""

    @pytest.fixture(autouse=True)
    def _tiny(self, tiny: Path) -> None:
        self.directory = tiny

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """No timeout and no retries: there is no server."""
        return {"temperature": 0.0, "max_new_tokens": 20, "stop": [], "seed": 1}

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.directory), "device": "cpu", "dtype": "float32", "max_new_tokens": 20}

    @property
    def supports_model_override(self) -> bool:
        return False

    @property
    def has_tool_choice(self) -> bool:
        return False


class TestChatGLM3Unit(OfRandomWeights, ChatModelUnitTests):
    """langchain-tests, unit."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatGLM3

    @property
    def has_structured_output(self) -> bool:
        """It needs tool_choice, and ChatGLM3 cannot be made to call a tool."""
        return False


class TestChatGLM3Integration(OfRandomWeights, ChatModelIntegrationTests):
    """langchain-tests, integration; random weights call no tools, so what tests their choice is left out."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatGLM3

    @property
    def has_tool_calling(self) -> bool:
        return False


class TestHuggingFaceUnit(OfRandomWeights, ChatModelUnitTests):
    """langchain-tests, unit."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return HuggingFaceChatModel


class TestHuggingFaceIntegration(OfRandomWeights, ChatModelIntegrationTests):
    """langchain-tests, integration."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return HuggingFaceChatModel


@pytest.fixture(scope="module")
def model(tiny: Path) -> ChatGLM3:
    return ChatGLM3(model=str(tiny), device="cpu", dtype="float32", temperature=0, max_new_tokens=30)


def test_making_a_model_loads_nothing() -> None:
    ChatGLM3(model="/nowhere/at/all")


def test_a_model_that_is_not_there_is_named_when_it_is_asked() -> None:
    with pytest.raises(ConversionError, match="/nowhere/at/all"):
        ChatGLM3(model="/nowhere/at/all").invoke("?")


def test_an_unknown_field_is_an_error(tiny: Path) -> None:
    with pytest.raises(ValueError, match="temprature"):
        ChatGLM3(model=str(tiny), temprature=0.3)


def test_both_classes_share_the_weights_and_say_the_same(model: ChatGLM3, tiny: Path) -> None:
    """The chat template and the prompt builder give the same ids; only the empty first line is ChatGLM3's own."""
    other = HuggingFaceChatModel(model=str(tiny), device="cpu", dtype="float32", temperature=0, max_new_tokens=30)
    messages = [SystemMessage("你是助手。"), HumanMessage("你好 <|assistant|>")]
    assert other.invoke(messages).text.strip() == model.invoke(messages).text.strip()
    assert other._loaded().engine is model._loaded().engine


def test_an_original_directory_answers_as_its_conversion(
    model: ChatGLM3, tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGPROJ_CACHE", str(tmp_path))
    original = ChatGLM3(model=str(tiny_original), device="cpu", dtype="float32", temperature=0, max_new_tokens=30)
    assert original.invoke("你好").text == model.invoke("你好").text


def test_stream_and_invoke_and_their_async_forms_say_the_same(model: ChatGLM3) -> None:
    text = model.invoke("你好").text

    async def pieces() -> list[str]:
        return [chunk.text async for chunk in model.astream("你好")]

    streamed = [chunk.text for chunk in model.stream("你好")]
    assert "".join(streamed) == text
    assert len(streamed) > 5
    assert asyncio.run(pieces()) == streamed
    assert asyncio.run(model.ainvoke("你好")).text == text


def test_batch_says_what_each_says_alone(model: ChatGLM3) -> None:
    short = model.bind(max_new_tokens=6)
    questions = [f"第{n}条规定了什么？" * (n % 4 + 1) for n in range(8)]
    assert [a.text for a in short.batch(questions)] == [short.invoke(q).text for q in questions]


def test_sixteen_streams_at_once_all_finish_in_order(model: ChatGLM3) -> None:
    short = model.bind(max_new_tokens=6)
    questions = [f"问题 {n}" for n in range(16)]

    async def one(question: str) -> str:
        return "".join([chunk.text async for chunk in short.astream(question)])

    async def all_of_them() -> list[str]:
        return list(await asyncio.gather(*map(one, questions)))

    assert asyncio.run(all_of_them()) == [short.invoke(question).text for question in questions]


def wait_until_idle(model: ChatGLM3) -> None:
    deadline = time.monotonic() + 30
    while model._loaded().engine.busy and time.monotonic() < deadline:
        time.sleep(0.005)
    assert model._loaded().engine.busy == 0


@pytest.fixture
def generated(model: ChatGLM3, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every token the engine computes."""
    engine, tokens = model._loaded().engine, []
    take = engine._take

    def counted(*args: Any) -> Any:
        tokens.append(1)
        return take(*args)

    monkeypatch.setattr(engine, "_take", counted)
    return tokens


LONG = 800  # tokens, seconds of work


def test_a_stream_that_is_closed_stops_generating(model: ChatGLM3, generated: list[int]) -> None:
    stream: Iterator[Any] = model.bind(max_new_tokens=LONG).stream("你好")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_until_idle(model)
    assert 0 < len(generated) < LONG - 50


def test_a_task_that_is_cancelled_stops_generating(model: ChatGLM3, generated: list[int]) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(model.bind(max_new_tokens=LONG).ainvoke("你好"))
        while not generated:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    wait_until_idle(model)
    assert 0 < len(generated) < LONG - 50


def test_stop_texts_end_the_answer_and_the_generation(model: ChatGLM3) -> None:
    text = model.invoke("你好").text
    stop = text[6:9]
    answer = model.invoke("你好", stop=[stop])
    assert answer.text == text[: text.index(stop)]
    assert answer.response_metadata["finish_reason"] == "stop"
    wait_until_idle(model)


def test_usage_counts_prompt_and_answer_tokens(model: ChatGLM3) -> None:
    message = HumanMessage("你好，世界")
    usage = model.invoke([message]).usage_metadata
    assert usage is not None
    assert usage["input_tokens"] == model.get_num_tokens_from_messages([message])
    assert usage["output_tokens"] == 30
    assert model.get_num_tokens("你好，世界") == usage["input_tokens"] - 2 - 1 - len(model.get_token_ids("\n")) - 1


def test_options_of_a_call_count_and_unknown_ones_are_named(model: ChatGLM3) -> None:
    usage = model.invoke("你好", max_tokens=3).usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 3
    with pytest.raises(UsageError, match="temprature"):
        model.invoke("你好", temprature=1)


def test_the_same_seed_gives_the_same_answer(tiny: Path) -> None:
    model = ChatGLM3(model=str(tiny), device="cpu", dtype="float32", temperature=1.5, top_p=1, max_new_tokens=20)
    assert model.invoke("你好", seed=1).text == model.invoke("你好", seed=1).text
    assert model.invoke("你好", seed=1).text != model.invoke("你好", seed=2).text


def test_a_prompt_longer_than_the_context_is_told_with_its_length(model: ChatGLM3) -> None:
    with pytest.raises(PromptTooLongError, match=r"has \d{3,} tokens, .* takes 1024"):
        model.invoke("很长的问题" * 1000)


def test_an_answer_ends_with_the_context(model: ChatGLM3) -> None:
    prompt = "问" * 980
    room = 1024 - model.get_num_tokens_from_messages([HumanMessage(prompt)])
    answer = model.invoke(prompt, max_new_tokens=10_000)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= room
    assert answer.response_metadata["finish_reason"] == "length"


def test_room_in_the_context_counts_the_answer(model: ChatGLM3) -> None:
    message = HumanMessage("你好")
    assert model.spare_tokens([message]) == 1024 - 30 - model.get_num_tokens_from_messages([message])
    assert model.spare_tokens([HumanMessage("长" * 2000)]) < 0


def test_a_failure_of_the_model_is_one_sentence(model: ChatGLM3, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory\nsecond line")

    monkeypatch.setattr(model._loaded().engine, "_model", type("Broken", (), {"device": "cpu", "__call__": fail})())
    with pytest.raises(GenerationError, match="out of memory second line"):
        model.invoke("你好")


def test_tools_are_offered_as_chatglm3_knows_them(model: ChatGLM3) -> None:
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return city

    bound = model.bind_tools([get_weather])
    prompt = model._loaded().format.prompt([HumanMessage("?")], bound.kwargs["tools"])  # type: ignore[attr-defined]
    text = model._loaded().format._tokenizer.tokenizer.decode(prompt)  # type: ignore[attr-defined]
    assert '"name": "get_weather"' in text
    assert isinstance(bound.invoke("北京天气"), AIMessage)


def test_a_forced_tool_call_is_said_to_be_a_wish(model: ChatGLM3, caplog: pytest.LogCaptureFixture) -> None:
    model.bind_tools([{"name": "t", "description": "", "parameters": {}}], tool_choice="any")
    assert "cannot be made to call a tool" in caplog.text


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_models_answer_and_stream(tiny: Path, quantization: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra [train]")
    model = ChatGLM3(
        model=str(tiny), device="cpu", dtype="float32", temperature=0, max_new_tokens=12, quantization=quantization
    )
    assert "".join(chunk.text for chunk in model.stream("你好")) == model.invoke("你好").text != ""


def test_weights_in_memory_answer_before_and_after_a_step_of_training(tiny: Path) -> None:
    """What evaluation in mid-training needs: nothing that generation leaves behind may stop the next backward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(tiny).eval()
    chat = ChatGLM3.from_model(weights, tiny, temperature=0, max_new_tokens=8)
    loaded = ChatGLM3(model=str(tiny), device="cpu", dtype="float32", temperature=0, max_new_tokens=8)
    assert chat.invoke("你好").text == loaded.invoke("你好").text
    ids = torch.tensor([[5, 6, 7, 8]])
    optimizer = torch.optim.SGD(weights.parameters(), lr=5.0)
    weights.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    weights.eval()
    assert chat.invoke("你好").text != loaded.invoke("你好").text


def test_many_threads_get_one_engine(tiny: Path) -> None:
    """Loading is slow; two requests at the start must not load twice."""
    models = [ChatGLM3(model=str(tiny), device="cpu", dtype="float32", max_rows=3) for _ in range(4)]
    threads = [threading.Thread(target=model.load) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({id(model._loaded().engine) for model in models}) == 1
