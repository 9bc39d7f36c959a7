"""Chat models behind a server or in this process: made from the config, their errors told in a sentence."""

from __future__ import annotations

import os
import sys
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from chains.config import ChatGLM3Config, ChatModelConfig, GeneratorConfig, HuggingFaceConfig
from loaders.errors import ConfigError, RagProjError

# What the providers' messages call the reason why an answer ended, and the one that says "out of tokens".
_REASON_KEYS = ("finish_reason", "stop_reason", "done_reason")
_CUT = {"length", "max_tokens"}


class GeneratorError(RagProjError):
    """The generator's server cannot be reached or refuses the request."""


class EmptyAnswerError(GeneratorError):
    """The generator was asked and has said nothing."""


def init_model(config: GeneratorConfig) -> BaseChatModel:
    """LangChain's chat model for the config; no request is sent and no weights are loaded yet.

    Raises:
        ConfigError: the provider is unknown or its package is not installed.
    """
    match config:
        case ChatModelConfig():
            return _server_model(config)
        case ChatGLM3Config():
            from chains.chatglm3.chat_model import ChatGLM3

            return ChatGLM3(**config.model_dump(exclude={"type"}))
        case HuggingFaceConfig():
            from chains.chatglm3.chat_model import HuggingFaceChatModel

            return HuggingFaceChatModel(**config.model_dump(exclude={"type"}))


def _server_model(config: ChatModelConfig) -> BaseChatModel:
    from langchain.chat_models import init_chat_model

    options: dict[str, Any] = {
        "temperature": config.temperature,
        "timeout": config.timeout_s,
        "max_retries": 1,
    }
    if config.base_url is not None:
        options["base_url"] = config.base_url
    if config.base_url is not None and config.model_provider == "openai":
        # as every compatible server knows it; the client would send OpenAI's own newer name
        options["extra_body"] = {"max_tokens": config.max_tokens}
    else:
        options["max_tokens"] = config.max_tokens
    if config.api_key is not None:
        options["api_key"] = config.api_key.get_secret_value()
    elif config.base_url is not None and config.model_provider == "openai" and not os.environ.get("OPENAI_API_KEY"):
        options["api_key"] = "none"  # local servers ask for no key, the client insists on one
    try:
        model: BaseChatModel = init_chat_model(config.model, model_provider=config.model_provider, **options)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"无法创建生成模型 {config.model}（{config.model_provider}）：{reason}",
            f"cannot make the chat model {config.model} ({config.model_provider}): {reason}",
        ) from error
    return model


class ThoughtFilter:
    """Takes an answer piece by piece and leaves out the white space and the `<think>…</think>` some models begin with.

    Servers without a reasoning parser send thoughts inline; those that serve ChatGLM3 as any other model send the
    "\\n " that stands before each of its answers. Text is held back only while it may belong to one of these.
    """

    _OPEN, _CLOSE = "<think>", "</think>"

    def __init__(self) -> None:
        self._held: str | None = ""

    def take(self, piece: str) -> str:
        """What of the answer can be shown after this piece."""
        if self._held is None:
            return piece
        self._held = (self._held + piece).lstrip()
        if self._held.startswith(self._OPEN):
            _, closed, answer = self._held.partition(self._CLOSE)
            if not closed:
                return ""
            self._held = answer.lstrip()
        if self._OPEN.startswith(self._held):  # also while there is nothing but white space
            return ""
        shown, self._held = self._held, None
        return shown


def server_errors() -> tuple[type[Exception], ...]:
    """What a model server's client raises when the server is away or says no."""
    import openai

    # the HTTP client below openai tells of a stream that breaks off itself
    # ValueError: what is not a chat completion at all, such as the HTML of a wrong base_url
    return (openai.OpenAIError, *http_errors(), OSError, ValueError)


def http_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client below other libraries raises, under either of its names; none where it is not loaded."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


def broke_off(model: ChatModelConfig) -> GeneratorError:
    """The stream ended without saying that the answer was complete."""
    name = _name(model)
    return GeneratorError(
        f"生成模型 {name} 的回答中途断开，不完整；请检查服务后重新提问",
        f"the answer of the generator {name} broke off half-way; check the server and ask again",
    )


def finish_reason(message: BaseMessage) -> str:
    """Why the model ended its answer with this message, as its provider words it; empty where it says none."""
    return next((str(message.response_metadata[key]) for key in _REASON_KEYS if message.response_metadata.get(key)), "")


def was_cut(reason: str) -> bool:
    """Whether an answer ended because it had used up its tokens."""
    return reason.lower() in _CUT


def empty_answer(model: BaseChatModel | GeneratorConfig, reason: str) -> EmptyAnswerError:
    """The answer has no text: what may be the reason, and the way out."""
    name = _name(model)
    if was_cut(reason):
        limit = "max_tokens" if isinstance(model, BaseChatModel | ChatModelConfig) else "max_new_tokens"
        return EmptyAnswerError(
            f"生成模型 {name} 用完了 token 还没有开始回答（思考太长）；请调大 llm.{limit}，或在服务里关闭思考",
            f"the generator {name} used up its tokens before it began to answer (it thought too long); raise"
            f" llm.{limit}, or turn thinking off on the server",
        )
    return EmptyAnswerError(
        f"生成模型 {name} 的回答是空的（结束原因：{reason or '未说明'}）；可能被服务的内容过滤拦下，请换个问法或换一个"
        "模型，或改用 llm._type=extractive",
        f"the generator {name} gave an empty answer (it ended for: {reason or 'no reason given'}); a content filter of"
        " the server may have stopped it: ask in other words, take another model, or use llm._type=extractive",
    )


def _name(model: BaseChatModel | GeneratorConfig) -> str:
    if isinstance(model, ChatModelConfig):
        return f"{model.model} ({model.base_url or model.model_provider})"
    return type(model).__name__ if isinstance(model, BaseChatModel) else model.model


def describe_server_error(error: Exception, model: BaseChatModel | GeneratorConfig) -> GeneratorError:
    """The error as a sentence that names the server and the way out."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    name = _name(model)
    return GeneratorError(
        f"生成模型 {name} 没有给出回答：{reason}；请检查服务是否启动、llm.base_url、模型名和密钥，"
        "或改用 llm._type=extractive",
        f"the generator {name} gave no answer: {reason}; check that the server runs, llm.base_url, the model name and"
        " the key, or use llm._type=extractive",
    )
