"""`_type: chat_model` against a real HTTP server on this machine that speaks OpenAI's chat-completions protocol."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from pydantic import SecretStr

from chains.answerers import ChatModelAnswerer
from chains.chat_models import EmptyAnswerError, GeneratorError, ThoughtFilter, describe_server_error, init_model
from chains.config import ChatModelConfig
from loaders.errors import ConfigError

PASSAGES = [Document(page_content="员工每年享有十天带薪年假。", metadata={"source": "a.md", "start": 0})]
INPUT: Any = {"question": "年假有几天？", "passages": PASSAGES}


@dataclass
class Request:
    """What the server was asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Reply(BaseHTTPRequestHandler):
    """One request; the test's script writes the reply with the helpers below."""

    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.path, headers, body))
        self.server.script(self)

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output stays readable."""

    def start_events(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def send_piece(self, text: str, *, finish: str | None = None) -> None:
        self.send_chunk(event(text, finish=finish))

    def finish_events(self, finish: str = "stop") -> None:
        self.send_piece("", finish=finish)
        self.send_chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def send_body(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after-ms", "1")  # the client tries some errors again: at once, not in a second
        self.end_headers()
        self.wfile.write(body)


class ChatServer(ThreadingHTTPServer):
    """Answers every POST with `script`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reply)
        self.requests: list[Request] = []
        self.script: Callable[[Reply], None] = says("十天。[1]")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """A client that went away is part of the tests."""


def event(text: str, *, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    data = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def says(*pieces: str) -> Callable[[Reply], None]:
    """A script: the pieces as a stream, or joined in one body where no stream was asked for."""

    def script(reply: Reply) -> None:
        if not reply.server.requests[-1].body.get("stream"):
            message = {"role": "assistant", "content": "".join(pieces)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            data = {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}
            return reply.send_body(200, json.dumps(data).encode())
        reply.start_events()
        for piece in pieces:
            reply.send_piece(piece)
        return reply.finish_events()

    return script


def waits(done: threading.Event) -> None:
    """A reply that does not come, until the test is over."""
    done.wait(5)


def fails(status: int) -> Callable[[Reply], None]:
    return lambda reply: reply.send_body(status, json.dumps({"error": {"message": "不行 nope"}}).encode())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Generator[ChatServer, None, None]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits half a second before it tries again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def answerer(server: ChatServer, **options: Any) -> ChatModelAnswerer:
    return ChatModelAnswerer(model=ChatModelConfig(model="tiny", base_url=server.base_url, **options))


def pieces(stream: Iterator[dict[str, Any]]) -> list[str]:
    return [piece["result"] for piece in stream if piece.get("result")]


@dataclass
class Gate:
    """Lets the server go on only when the client has got what was sent before."""

    received: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    in_time: list[bool] = field(default_factory=list)

    def wait(self) -> None:
        self.in_time.append(self.received.acquire(timeout=5))


# -- what is sent --------------------------------------------------------------------------------------------------


def test_request_carries_model_temperature_key_and_the_numbered_passages(server: ChatServer) -> None:
    config = ChatModelConfig(
        model="qwen3-8b", base_url=server.base_url, temperature=0.7, max_tokens=77, api_key=SecretStr("sk-secret")
    )
    ChatModelAnswerer(model=config).invoke(INPUT)
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer sk-secret"
    assert request.body["model"] == "qwen3-8b"
    assert request.body["temperature"] == 0.7
    assert request.body["stream"] is True
    system, user = request.body["messages"]
    assert system["role"] == "system"
    assert user["role"] == "user"
    assert "[1]\n员工每年享有十天带薪年假。" in user["content"]
    assert user["content"].endswith("问题：年假有几天？")


def test_the_answer_is_limited_in_tokens(server: ChatServer) -> None:
    answerer(server, max_tokens=77).invoke(INPUT)
    assert 77 in {server.requests[0].body.get(name) for name in ("max_tokens", "max_completion_tokens")}


def test_the_limit_has_the_name_that_every_local_server_knows(server: ChatServer) -> None:
    answerer(server, max_tokens=77).invoke(INPUT)
    assert server.requests[0].body.get("max_tokens") == 77


def test_a_local_server_is_asked_without_a_key(server: ChatServer) -> None:
    answerer(server).invoke(INPUT)
    assert server.requests[0].headers["authorization"] == "Bearer none"


def test_key_of_the_environment_is_used(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    answerer(server).invoke(INPUT)
    assert server.requests[0].headers["authorization"] == "Bearer sk-env"


def test_an_empty_address_is_not_openai_itself() -> None:
    """`base_url: ""` would otherwise send the documents out of the house."""
    with pytest.raises(ValueError, match="base_url"):
        ChatModelConfig(model="tiny", base_url="")


def test_key_is_not_shown_by_the_config() -> None:
    config = ChatModelConfig(model="tiny", api_key=SecretStr("sk-secret"))
    assert "sk-secret" not in repr(config) + config.model_dump_json()


def test_making_the_model_sends_nothing(server: ChatServer) -> None:
    init_model(ChatModelConfig(model="tiny", base_url=server.base_url))
    assert server.requests == []


# -- what comes back -----------------------------------------------------------------------------------------------


def test_pieces_arrive_while_the_server_still_generates(server: ChatServer) -> None:
    gate = Gate()

    def script(reply: Reply) -> None:
        reply.start_events()
        for piece in ("年假", "有十天。", "[1]"):
            reply.send_piece(piece)
            gate.wait()
        reply.finish_events()

    server.script = script
    received = []
    for piece in answerer(server).stream(INPUT):
        if piece.get("result"):
            received.append(piece["result"])
            gate.received.release()
    assert received == ["年假", "有十天。", "[1]"]
    assert gate.in_time == [True, True, True]


async def test_pieces_arrive_while_the_server_still_generates_async(server: ChatServer) -> None:
    gate = Gate()

    def script(reply: Reply) -> None:
        reply.start_events()
        for piece in ("年假", "有十天。[1]"):
            reply.send_piece(piece)
            gate.wait()
        reply.finish_events()

    server.script = script
    received: list[str] = []
    async for piece in answerer(server).astream(INPUT):
        if piece.get("result"):
            received.append(piece["result"])
            gate.received.release()
    assert received == ["年假", "有十天。[1]"]
    assert gate.in_time == [True, True]


def test_a_character_split_between_network_packets_stays_whole(server: ChatServer) -> None:
    def script(reply: Reply) -> None:
        reply.start_events()
        line = event("十天").replace(json.dumps("十天").encode(), '"十天"'.encode())  # raw UTF-8, as vLLM sends it
        cut = line.index("天".encode()) + 1
        reply.send_chunk(line[:cut])
        time.sleep(0.02)
        reply.send_chunk(line[cut:])
        reply.finish_events()

    server.script = script
    assert pieces(answerer(server).stream(INPUT)) == ["十天"]


def test_marks_in_the_stream_become_citations(server: ChatServer) -> None:
    server.script = says("每年有十天", "带薪年假。", "[", "1", "]")
    output = answerer(server).invoke(INPUT)
    assert output["result"] == "每年有十天带薪年假。[1]"
    assert [(c["n"], c["source"], c["quote"]) for c in output["citations"]] == [(1, "a.md", PASSAGES[0].page_content)]


def test_invoke_and_stream_and_async_give_the_same(server: ChatServer) -> None:
    server.script = says("每年有十天", "带薪年假。[1]")
    plain = answerer(server)
    total = None
    for piece in plain.stream(INPUT):
        total = piece if total is None else total + piece
    assert total == plain.invoke(INPUT)


def test_leaving_the_stream_early_hangs_up(server: ChatServer) -> None:
    """The server notices at once that nobody listens, so its GPU is free again."""
    sent, hung_up = [], threading.Event()

    def script(reply: Reply) -> None:
        reply.start_events()
        try:
            for number in range(2000):
                reply.send_piece(f"{number} " + "x" * 1000)
                sent.append(number)
                time.sleep(0.005)
        except OSError:
            hung_up.set()

    server.script = script
    stream = answerer(server).stream(INPUT)
    next(stream)
    stream.close()  # type: ignore[attr-defined] # it is a generator
    assert hung_up.wait(5)
    assert len(sent) < 1000


def test_condense_sends_the_conversation_and_returns_the_models_question(server: ChatServer) -> None:
    server.script = says("  XR-7 的保修期多久？\n")
    history = [HumanMessage("XR-7 转多快？")]
    assert answerer(server).condense("它的保修期呢？", history, {}) == "XR-7 的保修期多久？"
    sent = server.requests[0].body["messages"][1]["content"]
    assert sent == "对话历史：\n用户：XR-7 转多快？\n\n最后的问题：它的保修期呢？"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_thought_is_left_out_however_it_is_cut_into_pieces(size: int) -> None:
    text = "\n<think>\n想[1]</think>\n\n十天。<b>[1]"
    thoughts = ThoughtFilter()
    shown = [thoughts.take(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(shown) == "十天。<b>[1]"


@pytest.mark.parametrize("text", ["十天。", "<b>十天</b>", "<thin>", "十天\n ", "想 <think>x</think>", "<", "<tab>"])
def test_an_answer_without_a_thought_is_shown_whole(text: str) -> None:
    thoughts = ThoughtFilter()
    shown = "".join(thoughts.take(character) for character in text)
    assert shown == text or text == "<"  # a lone beginning of a tag may be held back


@pytest.mark.parametrize("size", [1, 2, 100])
def test_the_white_space_that_chatglm3_begins_with_is_left_out(server: ChatServer, size: int) -> None:
    """Behind `transformers serve`, which does not know of it, every answer of ChatGLM3 begins with a line break."""
    text = "\n 十天。[1]\n 其余见制度。[1]"
    server.script = says(*(text[start : start + size] for start in range(0, len(text), size)))
    pieces = [piece["result"] for piece in answerer(server).stream(INPUT) if "result" in piece]
    assert "".join(pieces) == text[2:]
    assert len(pieces) == -(-len(text[2:]) // size)  # and still as they come


def test_a_chatglm3_that_is_served_rewrites_questions_without_its_white_space(server: ChatServer) -> None:
    server.script = says("\n XR-7 的保修期多久？")
    assert answerer(server).condense("它呢？", [HumanMessage("XR-7 转多快？")], {}) == "XR-7 的保修期多久？"


# -- errors --------------------------------------------------------------------------------------------------------


def assert_clear(error: GeneratorError, *named: str) -> None:
    """One line, Chinese first, English beside it, the server and the cause named, no key."""
    line = str(error)
    assert "\n" not in line
    zh, _, en = line.partition(" / ")
    for half in (zh, en):
        for name in ("tiny", *named):
            assert name in half
    assert "请检查" in zh
    assert "check that" in en
    assert "sk-secret" not in line
    assert isinstance(error.__cause__, Exception)


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (401, 1), (403, 1), (404, 1)])
def test_a_refused_request_names_server_and_reason_and_is_not_repeated(
    server: ChatServer, status: int, tries: int
) -> None:
    server.script = fails(status)
    with pytest.raises(GeneratorError) as caught:
        answerer(server, api_key=SecretStr("sk-secret")).invoke(INPUT)
    assert_clear(caught.value, server.base_url, str(status), "nope")
    assert len(server.requests) == tries


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_in_trouble_ends_in_one_clear_error(server: ChatServer, status: int) -> None:
    server.script = fails(status)
    with pytest.raises(GeneratorError) as caught:
        answerer(server).invoke(INPUT)
    assert_clear(caught.value, server.base_url, str(status))


async def test_a_refused_request_is_as_clear_in_async(server: ChatServer) -> None:
    server.script = fails(401)
    with pytest.raises(GeneratorError) as caught:
        async for _ in answerer(server).astream(INPUT):
            pass
    assert_clear(caught.value, server.base_url, "401")


def test_a_refused_condensation_is_as_clear(server: ChatServer) -> None:
    server.script = fails(500)
    with pytest.raises(GeneratorError) as caught:
        answerer(server).condense("它呢？", [HumanMessage("年假？")], {})
    assert_clear(caught.value, server.base_url, "500")


def test_connection_refused_is_a_clear_error() -> None:
    with socket.socket() as unused:  # bound, never listening
        unused.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        model = ChatModelAnswerer(model=ChatModelConfig(model="tiny", base_url=base_url))
        with pytest.raises(GeneratorError) as caught:
            model.invoke(INPUT)
    assert_clear(caught.value, base_url)


@pytest.mark.parametrize("base_url", ["nonsense", "ftp://127.0.0.1/v1", "http://[bad"])
def test_an_address_that_is_none_is_a_clear_error(base_url: str) -> None:
    with pytest.raises((GeneratorError, ValueError), match=r"base_url|tiny"):
        ChatModelAnswerer(model=ChatModelConfig(model="tiny", base_url=base_url)).invoke(INPUT)


def test_a_silent_server_times_out_with_a_clear_error(server: ChatServer) -> None:
    done = threading.Event()
    server.script = lambda _: waits(done)
    with pytest.raises(GeneratorError) as caught:
        answerer(server, timeout_s=0.1).invoke(INPUT)
    done.set()
    assert_clear(caught.value, server.base_url, "timed out")


def test_a_silent_server_is_tried_once_more_and_no_longer(server: ChatServer) -> None:
    done = threading.Event()
    server.script = lambda _: waits(done)
    started = time.monotonic()
    with pytest.raises(GeneratorError):
        answerer(server, timeout_s=0.3).invoke(INPUT)
    waited = time.monotonic() - started
    done.set()
    assert len(server.requests) == 2
    assert waited < 3 * 0.3


def test_what_counts_as_a_server_error_is_known_before_the_stream_starts(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up when a stream is left, it would import a client library in the middle of closing that client."""
    looked_up = []

    def errors() -> tuple[type[Exception], ...]:
        looked_up.append(True)
        return (OSError,)

    monkeypatch.setattr("chains.answerers.server_errors", errors)
    stream = answerer(server).stream(INPUT)
    next(stream)
    assert looked_up
    looked_up.clear()
    stream.close()  # type: ignore[attr-defined] # it is a generator
    assert not looked_up


def test_a_stream_that_stalls_times_out_after_what_it_had(server: ChatServer) -> None:
    done = threading.Event()

    def script(reply: Reply) -> None:
        reply.start_events()
        reply.send_piece("年假")
        done.wait(5)

    server.script = script
    stream = answerer(server, timeout_s=0.2).stream(INPUT)
    assert next(stream)["result"] == "年假"
    with pytest.raises(GeneratorError) as caught:
        list(stream)
    done.set()
    assert_clear(caught.value, server.base_url, "timed out")


def test_a_stream_that_breaks_off_is_an_error_not_an_answer(server: ChatServer) -> None:
    def script(reply: Reply) -> None:
        reply.start_events()
        reply.send_piece("年假")
        reply.close_connection = True
        reply.connection.shutdown(socket.SHUT_RDWR)

    server.script = script
    received = []
    with pytest.raises(GeneratorError) as caught:
        for piece in answerer(server).stream(INPUT):
            received.append(piece["result"])
    assert "".join(received) == "年假"
    assert_clear(caught.value, server.base_url)


def test_a_stream_that_ends_without_its_last_event_is_an_error_too(server: ChatServer) -> None:
    """Without chunked encoding the end of the connection looks like the end of the answer; `finish_reason` tells."""

    def script(reply: Reply) -> None:
        reply.send_response(200)
        reply.send_header("content-type", "text/event-stream")
        reply.send_header("connection", "close")
        reply.end_headers()
        reply.wfile.write(event("年假有"))

    server.script = script
    with pytest.raises(GeneratorError):
        answerer(server).invoke(INPUT)


def test_an_error_inside_the_stream_is_told(server: ChatServer) -> None:
    def script(reply: Reply) -> None:
        reply.start_events()
        reply.send_chunk(b'data: {"error": {"message": "CUDA out of memory"}}\n\n')
        reply.wfile.write(b"0\r\n\r\n")

    server.script = script
    with pytest.raises(GeneratorError, match="CUDA out of memory"):
        answerer(server).invoke(INPUT)


def web_page(reply: Reply) -> None:
    reply.send_body(200, b"<html>Welcome</html>", kind="text/html")


def no_events(reply: Reply) -> None:
    reply.start_events()
    reply.send_chunk(b"data: [DONE]\n\n")
    reply.wfile.write(b"0\r\n\r\n")


def broken_json(reply: Reply) -> None:
    reply.start_events()
    reply.send_chunk(b"data: {oops\n\n")
    reply.wfile.write(b"0\r\n\r\n")


@pytest.mark.parametrize("script", [web_page, no_events, broken_json])
def test_something_that_is_no_chat_server_is_a_clear_error(server: ChatServer, script: Callable[[Reply], None]) -> None:
    """A `base_url` without /v1 reaches the server's start page: the commonest mistake."""
    server.script = script
    with pytest.raises(GeneratorError) as caught:
        answerer(server).invoke(INPUT)
    assert_clear(caught.value, server.base_url)


@pytest.mark.parametrize("script", [web_page, broken_json])
def test_something_that_is_no_chat_server_is_a_clear_error_when_condensing(
    server: ChatServer, script: Callable[[Reply], None]
) -> None:
    server.script = script
    with pytest.raises(GeneratorError) as caught:
        answerer(server).condense("它呢？", [HumanMessage("年假？")], {})
    assert_clear(caught.value, server.base_url)


def test_an_answer_of_nothing_is_an_error_and_no_refusal(server: ChatServer) -> None:
    server.script = says(" ", "\n")
    with pytest.raises(EmptyAnswerError, match="tiny"):
        answerer(server).invoke(INPUT)


@pytest.mark.parametrize("provider", ["no_such_provider", "anthropic"])
def test_an_unknown_provider_or_a_missing_package_is_a_config_error(provider: str) -> None:
    """langchain-anthropic is not a dependency; the message says what to install."""
    with pytest.raises(ConfigError, match=f"{provider}.* / .*{provider}"):
        init_model(ChatModelConfig(model="tiny", model_provider=provider))


def test_openai_itself_without_a_key_says_that_the_key_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises((GeneratorError, ConfigError), match="OPENAI_API_KEY"):
        ChatModelAnswerer(model=ChatModelConfig(model="tiny")).invoke(INPUT)


def test_an_error_of_a_model_from_python_is_named_by_its_class() -> None:
    error = describe_server_error(ConnectionError(), FakeListChatModel(responses=["x"]))
    assert "FakeListChatModel" in error.zh
    assert "ConnectionError" in error.zh
    assert "FakeListChatModel" in error.en


def test_a_long_reason_is_cut_and_kept_on_one_line() -> None:
    config = ChatModelConfig(model="tiny", base_url="http://127.0.0.1:1/v1")
    error = describe_server_error(ConnectionError("line\n" * 1000), config)
    assert len(str(error)) < 1200
    assert "\n" not in str(error)


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_an_answer_without_a_text_says_why_the_server_ended_it(server: ChatServer, finish: str) -> None:
    def script(reply: Reply) -> None:
        reply.start_events()
        reply.send_piece("<think>想了很久")
        reply.finish_events(finish)

    server.script = script
    with pytest.raises(GeneratorError, match="max_tokens" if finish == "length" else "content_filter"):
        answerer(server).invoke(INPUT)


def test_an_answer_that_the_server_cut_off_is_marked(server: ChatServer) -> None:
    def script(reply: Reply) -> None:
        reply.start_events()
        reply.send_piece("年假有十天，而且")
        reply.finish_events("length")

    server.script = script
    assert answerer(server).invoke(INPUT)["truncated"] is True
