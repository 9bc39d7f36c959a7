"""RagService: upload, remove, passages, stopping, generators; over a real knowledge base."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from chains import KnowledgeBase, load_config
from chains.ingestion import Ingestor
from chains.knowledge_base import FingerprintError, KnowledgeBaseError
from loaders.errors import RagProjError
from ui.examples import MANUAL_QUESTIONS, example_questions
from ui.service import RagService
from ui.views import Passage

LEAVE = "年假有几天？"
REPORT_KEYS = ["added", "updated", "unchanged", "removed", "failed", "chunks", "cut", "seconds"]
TOKEN_S = 0.1  # long enough for a busy machine to take each token before the next is made


class EndlessModel(BaseChatModel):
    """Generates until somebody stops pulling, ten tokens a second; counts what it made."""

    made: list[int]

    @property
    def _llm_type(self) -> str:
        return "endless"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("年假"))])

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        while True:
            time.sleep(TOKEN_S)
            self.made.append(1)
            yield ChatGenerationChunk(message=AIMessageChunk(content="字"))


def quiet(done: int, total: int, name: str) -> None:
    """No progress shown."""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def service(tmp_path: Path) -> Generator[RagService, None, None]:
    service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True)
    yield service
    service.close()


@pytest.fixture
def leave(tmp_path: Path) -> Path:
    return write(tmp_path / "in" / "leave.txt", "入职满一年的员工每年享有十天带薪年假。\n报销须在三十天内办理。")


def names(service: RagService) -> list[str]:
    return [Path(row.source).name for row in service.sources()]


def kept(service: RagService) -> list[str]:
    folder = service.knowledge_base.path / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def answer(service: RagService, question: str = LEAVE, **options: Any) -> dict[str, Any]:
    options = {"llm": None, "top_k": None, "stop": threading.Event(), **options}
    total: Any = None
    for piece in service.stream(question, options.pop("history", []), **options):
        total = piece if total is None else total + piece
    return dict(total or {})


# -- opening -------------------------------------------------------------------------------------------------------


def test_a_missing_knowledge_base_is_made_only_when_asked_to(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}"])
    with pytest.raises(KnowledgeBaseError, match="ragproj ingest"):
        RagService(config)
    assert not (tmp_path / "kb").exists()
    RagService(config, create=True).close()
    RagService(config).close()


def test_another_embedder_is_refused_when_opening(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    with pytest.raises(FingerprintError, match="lexical-1024"):
        RagService(service.config, embeddings=DeterministicFakeEmbedding(size=8))


def test_a_new_service_is_empty_and_refuses(service: RagService) -> None:
    assert service.sources() == []
    assert answer(service)["refused"] is True


# -- loading -------------------------------------------------------------------------------------------------------


class HeavyModel(FakeListChatModel):
    """Has weights to load."""

    times_loaded: int = 0

    def load(self) -> None:
        self.times_loaded += 1


def test_a_model_of_this_process_is_loaded_when_asked_to_and_not_before(tmp_path: Path, leave: Path) -> None:
    model = HeavyModel(responses=["十天。[1]"])
    service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True, llm=model)
    service.upload([leave], quiet)
    assert model.times_loaded == 0
    service.load()
    assert model.times_loaded == 1
    service.close()


def test_what_cannot_be_loaded_is_named_before_and_after(tmp_path: Path) -> None:
    words = [f"kb={tmp_path / 'kb'}", "llm._type=chatglm3", f"llm.model={tmp_path / 'nowhere'}"]
    service = RagService(load_config(None, words), create=True)
    told: list[str] = []
    with pytest.raises(RagProjError, match="nowhere"):
        service.load(told.append)
    assert told == [str(tmp_path / "nowhere")]
    service.close()


def test_nothing_is_told_where_nothing_has_weights(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    told: list[str] = []
    service.load(told.append)
    assert told == []
    assert "十天" in answer(service)["result"]


# -- upload --------------------------------------------------------------------------------------------------------


def test_an_upload_is_copied_ingested_and_answers(service: RagService, leave: Path) -> None:
    report = service.upload([leave], quiet)
    assert list(report) == REPORT_KEYS
    assert (report["added"], report["failed"]) == (1, [])
    leave.unlink()  # the browser's temporary file goes away
    assert kept(service) == ["leave.txt"]
    output = answer(service)
    assert "十天" in output["result"]
    assert output["citations"][0]["source"] == str(service.knowledge_base.path / "files" / "leave.txt")


def test_an_upload_reports_its_progress(service: RagService, leave: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "in" / "other.txt", "停车费每小时五元。")
    seen: list[tuple[int, int, str]] = []
    service.upload([leave, other], lambda done, total, name: seen.append((done, total, name)))
    read, written = [(0, 2, "leave.txt"), (0, 2, "other.txt")], [(0, 2, "leave.txt"), (1, 2, "other.txt")]
    assert seen == [*read, *written, (2, 2, "")]


def test_the_same_name_again_is_a_new_version(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    write(leave, "员工每年享有二十天带薪年假。")
    report = service.upload([leave], quiet)
    assert (report["added"], report["updated"]) == (0, 1)
    assert names(service) == kept(service) == ["leave.txt"]
    assert "二十天" in answer(service)["result"]


def test_the_same_file_again_changes_nothing(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    assert service.upload([leave], quiet)["unchanged"] == 1


def test_a_file_that_cannot_be_read_is_reported_and_not_kept(service: RagService, leave: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "in" / "bad.pdf", "not a pdf")
    zero = write(tmp_path / "in" / "zero.txt", "")
    odd = write(tmp_path / "in" / "odd.xyz", "x")
    report = service.upload([bad, leave, zero, odd], quiet)
    assert report["added"] == 1
    assert {Path(failure["path"]).name for failure in report["failed"]} == {"bad.pdf", "zero.txt", "odd.xyz"}
    assert all(" / " in failure["reason"] for failure in report["failed"])
    assert kept(service) == names(service) == ["leave.txt"]


def test_a_damaged_new_version_leaves_the_old_one_and_its_file(service: RagService, leave: Path) -> None:
    original = leave.read_bytes()
    service.upload([leave], quiet)
    leave.write_bytes(b"")
    assert len(service.upload([leave], quiet)["failed"]) == 1
    assert "十天" in answer(service)["result"]
    assert kept(service) == ["leave.txt"]
    assert (service.knowledge_base.path / "files" / "leave.txt").read_bytes() == original


def test_two_files_of_one_name_are_both_stored(service: RagService, tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "same.txt", "年假一共有十天。")
    second = write(tmp_path / "b" / "same.txt", "停车费每小时五元。")
    assert service.upload([first, second], quiet)["added"] == 2
    assert len(names(service)) == len(kept(service)) == 2
    assert "十天" in answer(service)["result"]
    assert "五元" in answer(service, "停车费多少？")["result"]


@pytest.mark.parametrize("name", ["a b=c.txt", "年假 (1).txt", "' OR 1=1.txt", "%2e%2e.txt", "[x]*.txt"])
def test_odd_file_names_are_kept_as_they_are(service: RagService, tmp_path: Path, name: str) -> None:
    service.upload([write(tmp_path / "in" / name, "年假一共有十天。")], quiet)
    assert kept(service) == names(service) == [name]
    assert service.remove([row.source for row in service.sources()]) == 1
    assert kept(service) == []


def test_a_path_outside_stays_outside(service: RagService, tmp_path: Path) -> None:
    """Only the last part of an uploaded path names the copy."""
    write(tmp_path / "in" / "deep" / "x.txt", "年假一共有十天。")
    service.upload([tmp_path / "in" / "deep" / ".." / "deep" / "x.txt"], quiet)
    assert kept(service) == ["x.txt"]


def test_an_upload_that_is_gone_is_a_clear_error(service: RagService, leave: Path, tmp_path: Path) -> None:
    with pytest.raises(RagProjError, match=r"gone\.txt.* / .*gone\.txt"):
        service.upload([leave, tmp_path / "gone.txt"], quiet)
    assert names(service) == []
    assert kept(service) == []


def test_an_upload_that_cannot_be_stored_leaves_what_was_there(
    service: RagService, leave: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.upload([leave], quiet)
    write(leave, "员工每年享有二十天带薪年假。")

    def full(*args: object, **kwargs: object) -> None:
        raise KnowledgeBaseError("磁盘满", "the disk is full")

    with monkeypatch.context() as patch, pytest.raises(KnowledgeBaseError):
        patch.setattr(Ingestor, "ingest", full)
        service.upload([leave], quiet)
    assert kept(service) == ["leave.txt"]
    assert "十天" in (service.knowledge_base.path / "files" / "leave.txt").read_text(encoding="utf-8")
    assert "二十天" not in (service.knowledge_base.path / "files" / "leave.txt").read_text(encoding="utf-8")


def test_a_stopped_upload_keeps_no_copy_of_what_was_not_stored(
    service: RagService, leave: Path, tmp_path: Path
) -> None:
    stop = threading.Event()

    def stop_at_second(done: int, total: int, name: str) -> None:
        if done == 1:
            stop.set()

    later = [write(tmp_path / "in" / f"z{n}.txt", f"第{n}条规定。") for n in range(3)]
    service.upload([leave, *later], stop_at_second, stop)
    assert names(service) == ["leave.txt"]
    assert kept(service) == ["leave.txt"]


def test_a_stopped_upload_leaves_nothing_of_what_it_had_begun(
    service: RagService, leave: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.upload([leave], quiet)
    rows = "".join(json.dumps({"text": f"机密的第{n}条"}, ensure_ascii=False) + "\n" for n in range(9))
    monkeypatch.setattr("chains.ingestion._BATCH_CHUNKS", 2)
    stop = threading.Event()

    def stop_while_written(done: int, total: int, name: str) -> None:
        if service.knowledge_base.staged_sources():
            stop.set()

    service.upload([write(tmp_path / "in" / "pool.jsonl", rows)], stop_while_written, stop)
    assert stop.is_set()
    assert (names(service), kept(service)) == (["leave.txt"], ["leave.txt"])
    assert service.knowledge_base.staged_sources() == []


def test_nothing_to_upload_is_an_empty_report(service: RagService) -> None:
    report = service.upload([], quiet)
    assert (report["added"], report["failed"]) == (0, [])


# -- remove --------------------------------------------------------------------------------------------------------


def test_removed_documents_answer_no_more_and_their_copies_go(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    assert service.remove([service.sources()[0].source]) == 1
    assert (names(service), kept(service)) == ([], [])
    assert answer(service)["refused"] is True
    assert leave.exists()


def test_removing_a_document_that_was_ingested_elsewhere_leaves_its_file(service: RagService, leave: Path) -> None:
    service.ingestor().ingest([leave])
    assert service.remove([str(leave)]) == 1
    assert leave.exists()


def test_removing_something_unknown_counts_nothing(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    assert service.remove(["nope.txt"]) == 0
    assert service.remove([]) == 0
    assert names(service) == ["leave.txt"]


@pytest.mark.parametrize("form", ["kb", "./kb", "sub/../kb"])
def test_copies_go_however_the_knowledge_base_was_named(
    tmp_path: Path, leave: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    service = RagService(load_config(None, [f"kb={form}"]), create=True)
    service.upload([leave], quiet)
    service.remove([service.sources()[0].source])
    assert kept(service) == []
    service.close()


def test_a_link_to_the_knowledge_base_is_as_good_as_its_folder(tmp_path: Path, leave: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    service = RagService(load_config(None, [f"kb={tmp_path / 'link' / 'kb'}"]), create=True)
    service.upload([leave], quiet)
    assert service.remove([service.sources()[0].source]) == 1
    assert kept(service) == []
    service.close()


# -- passages ------------------------------------------------------------------------------------------------------


def test_a_passage_is_the_quote_in_its_surroundings(service: RagService, tmp_path: Path) -> None:
    text = "前" * 1000 + "\n\n年假一共有十天。\n\n" + "后" * 1000
    service.upload([write(tmp_path / "in" / "long.txt", text)], quiet)
    citation = answer(service)["citations"][0]
    passage = service.passage(citation)
    assert isinstance(passage, Passage)
    assert passage.quote == citation["quote"]
    assert "十天" in passage.quote
    stored = service.knowledge_base.document_text(citation["document_id"]) or ""
    assert passage.before + passage.quote + passage.after in stored
    assert passage.before.endswith(stored[citation["start"] - 5 : citation["start"]])
    assert len(passage.before) <= 400
    assert len(passage.after) <= 400
    assert (passage.title, passage.page) == ("long", None)


def test_a_passage_knows_its_headings(service: RagService, tmp_path: Path) -> None:
    text = "# 员工手册\n\n" + "总则若干。" * 60 + "\n\n## 年假\n\n" + "员工每年享有十天带薪年假。" + "其余从略。" * 60
    service.upload([write(tmp_path / "in" / "book.md", text)], quiet)
    citation = next(c for c in answer(service)["citations"] if "十天" in c["quote"])
    assert service.passage(citation).headings == ["员工手册", "年假"]
    assert service.passage(citation).title == "员工手册"


def test_a_text_under_two_names_is_cited_once_with_both(service: RagService, leave: Path, tmp_path: Path) -> None:
    twin = write(tmp_path / "in" / "twin.txt", leave.read_text(encoding="utf-8"))
    service.upload([leave, twin], quiet)
    (citation,) = (c for c in answer(service)["citations"] if "十天" in c["quote"])
    passage = service.passage(citation)
    found = [passage.source, *(entry["source"] for entry in passage.also_in)]
    assert [Path(name).name for name in sorted(found)] == ["leave.txt", "twin.txt"]
    service.remove([passage.source])
    (alone,) = (c for c in answer(service)["citations"] if "十天" in c["quote"])
    assert alone["source"] == found[1]
    assert service.passage(alone).also_in == []


def test_records_of_one_file_are_told_apart(service: RagService, tmp_path: Path) -> None:
    rows = (
        '{"id": "a", "title": "甲", "text": "年假一共有十天。"}\n{"id": "b", "title": "乙", "text": "停车每时五元。"}\n'
    )
    service.upload([write(tmp_path / "in" / "pool.jsonl", rows)], quiet)
    assert service.passage(answer(service)["citations"][0]).title == "甲"
    assert service.passage(answer(service, "停车多少元？")["citations"][0]).title == "乙"


def test_a_passage_of_a_removed_or_changed_document_is_a_clear_error(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    citation = answer(service)["citations"][0]
    write(leave, "前言。员工每年享有二十天带薪年假。")
    service.upload([leave], quiet)
    with pytest.raises(RagProjError, match=r"重新提问 / .*ask again"):
        service.passage(citation)
    fresh = answer(service)["citations"][0]
    service.remove([fresh["source"]])
    with pytest.raises(RagProjError, match=r"leave\.txt"):
        service.passage(fresh)


@pytest.mark.parametrize(
    "change",
    [{"quote": "编造的话"}, {"start": 3}, {"start": -5}, {"end": 10**9}, {"document_id": None}, {"document_id": 99}],
)
def test_a_citation_that_was_tampered_with_opens_nothing(
    service: RagService, leave: Path, change: dict[str, Any]
) -> None:
    service.upload([leave], quiet)
    citation = answer(service)["citations"][0]
    with pytest.raises(RagProjError):
        service.passage(citation | change)


# -- asking --------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_chains(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    pieces = list(service.stream(LEAVE, [], llm=None, top_k=None, stop=threading.Event()))
    assert set(pieces[0]) == {"query", "source_documents"}
    assert set(pieces[-1]) == {"citations", "refused"}


def test_choices_reach_the_chain(service: RagService, leave: Path, tmp_path: Path) -> None:
    service.upload([leave, write(tmp_path / "in" / "b.txt", "年假另有规定。")], quiet)
    assert len(answer(service, top_k=1)["source_documents"]) == 1
    assert len(answer(service)["source_documents"]) == 2
    with pytest.raises(RagProjError, match="gpt"):
        answer(service, llm="gpt")
    with pytest.raises(RagProjError, match="top_k"):
        answer(service, top_k=0)


def test_the_conversation_reaches_the_chain(service: RagService, tmp_path: Path) -> None:
    service.upload([write(tmp_path / "in" / "d.txt", "XR-7 的转速为一万二千转。XR-7 的保修期为三年。")], quiet)
    history = [("XR-7 的转速是多少？", "一万二千转。")]
    assert answer(service, "它呢？")["refused"] is True
    assert answer(service, "它的保修期呢？", history=history)["refused"] is False


def test_an_answer_that_was_stopped_before_it_began_does_not_break_the_conversation(
    service: RagService, leave: Path
) -> None:
    service.upload([leave], quiet)
    assert answer(service, LEAVE, history=[("报销？", "")])["refused"] is False


def test_a_set_stop_yields_nothing_more(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    stop = threading.Event()
    stream = service.stream(LEAVE, [], llm=None, top_k=None, stop=stop)
    next(stream)
    stop.set()
    assert list(stream) == []


@pytest.fixture
def endless(tmp_path: Path, leave: Path) -> Generator[tuple[RagService, EndlessModel], None, None]:
    model = EndlessModel(made=[])
    service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True, llm=model)
    service.upload([leave], quiet)
    yield service, model
    service.close()


@pytest.mark.parametrize("way", ["stop", "close"])
def test_stopping_stops_the_generators_work(endless: tuple[RagService, EndlessModel], way: str) -> None:
    service, model = endless
    stop = threading.Event()
    stream = service.stream(LEAVE, [], llm=None, top_k=None, stop=stop)
    for _ in range(5):
        next(stream)
    if way == "stop":
        stop.set()
        assert list(stream) == []
    else:
        stream.close()  # type: ignore[attr-defined] # it is a generator
    made = len(model.made) + 1  # the token in the making when it was left
    assert made <= 7
    with ThreadPoolExecutor(1) as pool:  # a generator that went on in some thread would show now
        pool.submit(answer, service, LEAVE, llm="extractive").result(20)
    time.sleep(3 * TOKEN_S)
    assert len(model.made) <= made


class SilentModel(EndlessModel):
    """Waits for its first token, as a busy server does."""

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        time.sleep(3)
        yield from super()._stream(*args, **kwargs)


def test_stop_works_while_the_generator_has_not_said_a_word(tmp_path: Path, leave: Path) -> None:
    service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True, llm=SilentModel(made=[]))
    service.upload([leave], quiet)
    stop = threading.Event()
    stream = service.stream(LEAVE, [], llm=None, top_k=None, stop=stop)
    next(stream)
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    assert list(stream) == []
    assert time.monotonic() - started < 2
    service.close()


def test_the_generator_can_be_chosen(endless: tuple[RagService, EndlessModel]) -> None:
    service, model = endless
    assert "十天" in answer(service, llm="extractive")["result"]
    assert model.made == []


def test_several_threads_may_ask_while_one_uploads(service: RagService, leave: Path, tmp_path: Path) -> None:
    service.upload([leave], quiet)
    files = [write(tmp_path / "in" / f"n{n}.txt", f"第{n}号规定内容若干。") for n in range(6)]
    with ThreadPoolExecutor(4) as pool:
        upload = pool.submit(service.upload, files, quiet)
        answers = [pool.submit(answer, service) for _ in range(12)]
        assert all("十天" in asked.result(60)["result"] for asked in answers)
        assert upload.result(60)["added"] == 6
    assert len(names(service)) == 7


class OneWord(BaseHTTPRequestHandler):
    """Streams one piece over a connection that stays open, as vLLM does."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "delta": {"content": "十天。"}, "finish_reason": "stop"}
        data = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
        body = f"data: {json.dumps(data)}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output stays readable."""


@pytest.fixture
def served(tmp_path: Path, leave: Path) -> Generator[RagService, None, None]:
    """A service whose generator is an OpenAI-compatible server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), OneWord) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        base_url = f"http://127.0.0.1:{server.server_port}/v1"
        words = ["llm._type=chat_model", "llm.model=tiny", f"llm.base_url={base_url}", "llm.api_key=x"]
        service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}", *words]), create=True)
        service.upload([leave], quiet)
        yield service
        service.close()
        server.shutdown()


LOOP_CLOSED = "every question has an event loop of its own; the client's open connections belong to a closed one"


def test_a_server_answers_question_after_question(served: RagService) -> None:
    assert [answer(served)["result"] for _ in range(4)] == ["十天。"] * 4


def test_a_server_answers_several_threads_again_and_again(served: RagService) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert [output["result"] for output in pool.map(lambda _: answer(served), range(12))] == ["十天。"] * 12


# -- what the page offers ------------------------------------------------------------------------------------------


def test_generators_are_named_with_the_default_first(tmp_path: Path) -> None:
    llms = "llms={small: {_type: chat_model, model: qwen3-1b}, long: {_type: extractive, max_chars: 400}}"
    config = load_config(None, [f"kb={tmp_path / 'kb'}", llms])
    service = RagService(config, create=True)
    assert service.generators() == [
        ("摘录原文 · Extractive", "extractive"),
        ("small · qwen3-1b", "small"),
        ("long", "long"),
    ]
    service.close()


def test_a_configured_model_is_named_by_its_model(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}", "llm._type=chat_model", "llm.model=qwen3-8b"])
    service = RagService(config, create=True)
    assert service.generators() == [("qwen3-8b", "chat_model"), ("摘录原文 · Extractive", "extractive")]
    service.close()


def test_every_generator_offered_can_be_chosen(tmp_path: Path, leave: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}", "llms={short: {_type: extractive, max_chars: 20}}"])
    service = RagService(config, create=True, llm=FakeListChatModel(responses=["十天带薪年假。[1]"]))
    service.upload([leave], quiet)
    for _, key in service.generators():
        assert "十天" in answer(service, llm=key)["result"]
    service.close()


def test_sources_are_rows_with_sizes(service: RagService, leave: Path) -> None:
    service.upload([leave], quiet)
    (row,) = service.sources()
    assert (row.title, row.chunks) == ("leave", 1)
    assert row.characters == len(leave.read_text(encoding="utf-8"))
    assert row.added.startswith("20")


def test_examples_are_the_manuals_questions_where_it_is_the_knowledge_base(service: RagService, tmp_path: Path) -> None:
    assert example_questions(service.knowledge_base) == []
    service.upload([write(tmp_path / "in" / "getting_started.md", "# 开始\n\n用 ingest 加入文件夹。")], quiet)
    assert example_questions(service.knowledge_base) == list(MANUAL_QUESTIONS)


def test_closing_frees_the_knowledge_base(tmp_path: Path, leave: Path) -> None:
    service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True)
    service.upload([leave], quiet)
    service.close()
    with KnowledgeBase(tmp_path / "kb") as again:
        assert again.source_names() == [str(tmp_path / "kb" / "files" / "leave.txt")]
