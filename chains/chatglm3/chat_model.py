"""ChatGLM3 and other local models as LangChain chat models: streamed, batched, cancelled within one token."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import run_in_executor
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, PrivateAttr, model_validator

from chains.chatglm3.directories import native_adapter, native_directory
from chains.chatglm3.engine import Delivered, Finish, GenerationEngine, Request
from chains.chatglm3.formats import ChatGLM3Format, Format, Reader, TemplateFormat
from chains.chatglm3.loading import ModelOptions, load_causal_model
from chains.chatglm3.options import LocalModelOptions
from chains.chatglm3.sampling import Sampling
from chains.chatglm3.texts import StopFilter
from loaders.errors import RagProjError, UsageError

logger = logging.getLogger(__name__)

# Options that a call may set for itself, `model.bind(temperature=0)`; max_tokens as other LangChain models call it.
_PER_CALL = {"temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed"}
_RENAMED = {"max_tokens": "max_new_tokens"}


class PromptTooLongError(UsageError):
    """The prompt leaves no room in the model's context."""


class GenerationError(RagProjError):
    """The model failed while it generated."""


_engines: weakref.WeakValueDictionary[tuple[ModelOptions, int], GenerationEngine] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def shared_engine(options: ModelOptions, max_rows: int) -> GenerationEngine:
    """The engine of a model; one for all who use the model with equal options, loaded by the first."""
    with _loading:
        engine = _engines.get((options, max_rows))
        if engine is None:
            engine = _engine(load_causal_model(options), max_rows)
            _engines[options, max_rows] = engine
        return engine


def _engine(model: Any, max_rows: int) -> GenerationEngine:
    context = model.config.get_text_config().max_position_embeddings
    return GenerationEngine(model, stop_ids=_stop_ids(model), context=context, max_rows=max_rows)


def _stop_ids(model: Any) -> list[int]:
    stop = model.generation_config.eos_token_id
    return list(stop) if isinstance(stop, list) else [] if stop is None else [stop]


@dataclass(frozen=True)
class _Runtime:
    """What a chat model has once it is loaded."""

    engine: GenerationEngine
    format: Format


class LocalChatModel(LocalModelOptions, BaseChatModel):
    """A causal language model in this process; its weights are loaded by the first call."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False
    """LangChain's: whether `invoke` reports pieces to callbacks as they come"""

    _format: ClassVar[type[ChatGLM3Format] | type[TemplateFormat]]
    _runtime: _Runtime | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _standard_names(cls, data: Any) -> Any:
        """LangChain's other models call it `max_tokens`."""
        return {_RENAMED.get(name, name): value for name, value in data.items()} if isinstance(data, dict) else data

    @property
    def _llm_type(self) -> str:
        return "local"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LocalModelOptions.model_fields}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        sampling = self._sampling({name: value for name, value in kwargs.items() if name in _PER_CALL})
        params = LangSmithParams(
            ls_provider=self._llm_type,
            ls_model_type="chat",
            ls_model_name=kwargs.get("model", self.model),
            ls_temperature=sampling.temperature,
            ls_max_tokens=sampling.max_new_tokens,
        )
        if stop or self.stop:
            params["ls_stop"] = stop or self.stop
        return params

    @classmethod
    def from_model(cls, model: Any, directory: Path, **options: Any) -> Self:
        """A chat model over weights that are in memory already, as in the middle of a training.

        Args:
            model: a causal language model of transformers, with or without a PEFT adapter, in evaluation mode.
            directory: the native directory it came from, for its tokenizer.
            options: fields of the class, such as `temperature`.
        """
        chat = cls(model=str(directory), **options)
        chat._runtime = _Runtime(_engine(model, chat.max_rows), cls._format(directory))
        return chat

    def load(self) -> None:
        """Load the weights now, so that the first answer need not wait for them.

        Raises:
            ConversionError: the model or its adapter cannot be found, converted or loaded.
        """
        self._loaded()

    def _loaded(self) -> _Runtime:
        if self._runtime is None:
            directory = native_directory(self.model)
            form = self._format(directory)
            adapter = None if self.adapter is None else native_adapter(self.adapter, directory)
            options = ModelOptions(Path(directory), adapter, self.quantization, self.device, self.dtype)
            self._runtime = _Runtime(shared_engine(options, self.max_rows), form)
        return self._runtime

    # -- tokens ----------------------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        return self._loaded().format.encode(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the prompt these messages make."""
        return len(self._loaded().format.prompt(messages, _offered(tools or ())))

    def spare_tokens(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens by which a prompt may still grow, negative where it must shrink.

        Room is kept for the answer: `max_new_tokens`, or a quarter of the context where that is less.
        """
        runtime = self._loaded()
        context = runtime.engine.context
        return context - min(self.max_new_tokens, context // 4) - len(runtime.format.prompt(messages, ()))

    # -- generation ------------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        delivered: queue.SimpleQueue[Delivered] = queue.SimpleQueue()
        answer, request = self._start(messages, stop, kwargs, delivered.put)
        try:
            while not answer.over:
                chunk = answer.take(delivered.get())
                if chunk is None:
                    continue
                if run_manager is not None:
                    run_manager.on_llm_new_token(str(chunk.message.text), chunk=chunk)
                yield chunk
        finally:  # also when the caller stops reading
            request.cancel()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        loop = asyncio.get_running_loop()
        delivered: asyncio.Queue[Delivered] = asyncio.Queue()

        def deliver(item: Delivered) -> None:
            loop.call_soon_threadsafe(delivered.put_nowait, item)

        await run_in_executor(None, self.load)
        answer, request = self._start(messages, stop, kwargs, deliver)
        try:
            while not answer.over:
                chunk = answer.take(await delivered.get())
                if chunk is None:
                    continue
                if run_manager is not None:
                    await run_manager.on_llm_new_token(str(chunk.message.text), chunk=chunk)
                yield chunk
        finally:
            request.cancel()

    def _start(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: Mapping[str, Any],
        deliver: Callable[[Delivered], None],
    ) -> tuple[_Answer, Request]:
        """Queue an answer; it arrives through `deliver`."""
        runtime = self._loaded()
        options = dict(options)
        tools = options.pop("tools", ())
        sampling = self._sampling(options)
        ids = runtime.format.prompt(messages, tools)
        room = runtime.engine.context - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"提示词有 {len(ids)} 个 token，模型 {self.model} 最多 {runtime.engine.context} 个；请缩短问题或对话",
                f"the prompt has {len(ids)} tokens, the model {self.model} takes {runtime.engine.context}; shorten the"
                " question or the conversation",
            )
        reader = runtime.format.reader(tools=bool(tools))
        answer = _Answer(reader, StopFilter(stop if stop is not None else self.stop), len(ids), self.model)
        request = Request(ids, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)), deliver)
        runtime.engine.submit(request)
        return answer, request

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        given = {_RENAMED.get(name, name): value for name, value in options.items()}
        unknown = sorted(set(given) - _PER_CALL)
        if unknown:
            raise UsageError(
                f"调用模型时不认识选项 {'、'.join(unknown)}，可用：{'、'.join(sorted(_PER_CALL))}",
                f"unknown option(s) of a call: {', '.join(unknown)}; known: {', '.join(sorted(_PER_CALL))}",
            )
        return Sampling(**{name: given.get(name, getattr(self, name)) for name in _PER_CALL})


class _Answer:
    """One answer on its way: what the engine delivers in, LangChain's chunks out."""

    def __init__(self, reader: Reader, stops: StopFilter, prompt_tokens: int, model: str) -> None:
        self.over = False
        self._reader = reader
        self._stops = stops
        self._prompt_tokens = prompt_tokens
        self._model = model
        self._tokens = 0

    def take(self, item: Delivered) -> ChatGenerationChunk | None:
        """The chunk to give on, if any; the last one has the counts and the reason.

        Raises:
            GenerationError: the model failed.
        """
        if isinstance(item, Exception):
            reason = " ".join(str(item).split())[:300] or type(item).__name__
            raise GenerationError(
                f"模型 {self._model} 生成时出错：{reason}", f"the model {self._model} failed while generating: {reason}"
            ) from item
        if isinstance(item, Finish):
            return self._last(self._stops.take(self._reader.rest()) + self._stops.rest(), item.reason)
        self._tokens += 1
        text = self._stops.take(self._reader.take(item))
        if self._stops.stopped:
            return self._last(text, "stop")
        return ChatGenerationChunk(message=AIMessageChunk(content=text)) if text else None

    def _last(self, text: str, reason: str) -> ChatGenerationChunk:
        self.over = True
        calls = [] if self._stops.stopped else self._reader.calls
        message = AIMessageChunk(
            content=text,
            tool_call_chunks=[
                tool_call_chunk(name=call["name"], args=_json(call["args"]), id=call["id"], index=place)
                for place, call in enumerate(calls)
            ],
            usage_metadata=UsageMetadata(
                input_tokens=self._prompt_tokens,
                output_tokens=self._tokens,
                total_tokens=self._prompt_tokens + self._tokens,
            ),
            response_metadata={"finish_reason": "tool_calls" if calls else reason, "model_name": self._model},
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message, generation_info={"finish_reason": reason})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _offered(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools as models are told of them: name, description and parameters."""
    return [dict(convert_to_openai_tool(tool)["function"]) for tool in tools]


class ChatGLM3(LocalChatModel):
    """ChatGLM3-6B, -base and -32k: a native directory, an original one (converted once), or a model id."""

    _format = ChatGLM3Format

    @property
    def _llm_type(self) -> str:
        return "chatglm3"

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools offered to it, in ChatGLM3's own way.

        It decides itself whether to call one; a `tool_choice` that asks for more is logged, and no more than a wish.
        """
        if tool_choice not in (None, "auto"):
            logger.warning("tool_choice=%r: ChatGLM3 cannot be made to call a tool", tool_choice)
        return self.bind(tools=_offered(tools), **kwargs)


class HuggingFaceChatModel(LocalChatModel):
    """Any causal language model that transformers knows, with the chat template of its own tokenizer."""

    _format = TemplateFormat

    @property
    def _llm_type(self) -> str:
        return "huggingface"
