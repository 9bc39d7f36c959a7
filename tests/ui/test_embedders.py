"""A service over a knowledge base whose vectors another embedder made: it answers, changes over, goes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel

from chains import LexicalEmbeddings, load_config
from chains.checks import check
from chains.knowledge_base import FingerprintError, KnowledgeBase
from chains.reembedding import reembed
from chains.retrieval_qa import open_vectorstore
from ui.service import RagService
from ui.views import EmbedderState

NEW = "embeddings.dimensions=512"
QUESTION = "年假有几天？"
# what LexicalEmbeddings calls itself with these dimensions
NAME_OLD, NAME_NEW = (LexicalEmbeddings(dimensions=d).fingerprint for d in (1024, 512))


def open_service(kb: Path, *words: str, **options: Any) -> RagService:
    return RagService(load_config(None, [f"kb={kb}", *words]), any_embedder=True, **options)


def answer(service: RagService) -> str:
    pieces = service.stream(QUESTION, [], llm=None, top_k=None, stop=threading.Event())
    return "".join(piece.get("result", "") for piece in pieces)


def change(service: RagService, *, rollback: bool = False) -> EmbedderState:
    service.change_embedder(rollback=rollback)
    assert service._change.wait(60)
    return service.embedder()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def quiet(*_: object) -> None:
    """No progress shown."""


@pytest.fixture
def kb(tmp_path: Path) -> Path:
    """A knowledge base by the embedder of 1,024 dimensions: 700 notes, more than one batch, and the one asked for."""
    folder = tmp_path / "in"
    write(folder / "leave.txt", "入职满一年的员工每年享有十天带薪年假。")
    notes = [f'{{"id": "{n}", "text": "第{n}号仓库存放第{n * 7}批零件。"}}' for n in range(700)]
    write(folder / "notes.jsonl", "\n".join(notes))
    service = open_service(tmp_path / "kb", create=True)
    assert service.ingestor().ingest([folder]).added == 2
    service.close()
    return tmp_path / "kb"


@pytest.fixture
def service(kb: Path) -> Iterator[RagService]:
    """Opened with another embedder configured."""
    service = open_service(kb, NEW)
    yield service
    service.close()


class Gate:
    """Holds embedding back until it is opened; counts the batches that wait or went through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        original = LexicalEmbeddings.embed_documents_array

        def gated(embeddings: LexicalEmbeddings, texts: Any) -> Any:
            if embeddings.dimensions == 512 and len(texts) > 100:
                self.reached.set()
                assert self.open.wait(30)
            return original(embeddings, texts)

        monkeypatch.setattr(LexicalEmbeddings, "embed_documents_array", gated)


class HeavyModel(FakeListChatModel):
    """Has weights to load."""

    times_loaded: int = 0

    def load(self) -> None:
        self.times_loaded += 1


# -- opening -------------------------------------------------------------------------------------------------------


def test_a_service_answers_with_the_embedder_that_made_the_vectors(service: RagService) -> None:
    assert "十天" in answer(service)
    assert service.embedder() == EmbedderState(NAME_NEW, NAME_OLD, differs=True)


def test_a_generator_that_is_loaded_stays_loaded_when_the_embedder_changes(kb: Path) -> None:
    """Its weights would go with the chain of before, and the next question wait for them."""
    model = HeavyModel(responses=["十天。[1]"])
    service = open_service(kb, NEW, llm=model)
    assert change(service).answering == NAME_NEW
    assert model.times_loaded == 0
    service.load()
    assert change(service, rollback=True).answering == NAME_OLD
    assert model.times_loaded == 2
    service.close()


def test_a_service_that_may_not_refuses_as_the_command_line_does(kb: Path) -> None:
    with pytest.raises(FingerprintError, match="ragproj reembed"):
        RagService(load_config(None, [f"kb={kb}", NEW]))


def test_the_configured_embedder_that_made_the_vectors_leaves_nothing_to_change(kb: Path) -> None:
    service = open_service(kb)
    assert service.embedder() == EmbedderState(NAME_OLD, NAME_OLD, differs=False)
    service.close()


def test_an_empty_knowledge_base_is_begun_by_the_configured_embedder(tmp_path: Path) -> None:
    service = open_service(tmp_path / "kb", NEW, create=True)
    assert service.embedder() == EmbedderState(NAME_NEW, NAME_NEW, differs=False)
    store = service.store
    service.upload([write(tmp_path / "in" / "leave.txt", "员工每年享有十天带薪年假。")], quiet)
    assert "十天" in answer(service)
    assert service.store is store  # not opened anew for its own first vectors
    service.close()


def test_vectors_by_an_embedder_from_python_cannot_be_asked_with_another_one(tmp_path: Path) -> None:
    path = tmp_path / "kb"
    maker = open_service(path, create=True, embeddings=DeterministicFakeEmbedding(size=8))
    maker.upload([write(tmp_path / "in" / "leave.txt", "员工每年享有十天带薪年假。")], quiet)
    maker.close()
    with pytest.raises(FingerprintError, match="DeterministicFakeEmbedding"):
        open_service(path)


def test_an_embedder_that_only_a_newer_program_knows_is_refused_by_name(
    kb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = KnowledgeBase.generations
    section = {"_type": "telepathy", "dimensions": 1024}
    monkeypatch.setattr(
        KnowledgeBase,
        "generations",
        lambda self: [type(g)(**{**vars(g), "embedder": section}) for g in original(self)],
    )
    with pytest.raises(FingerprintError, match=NAME_OLD):
        open_service(kb, NEW)


# -- changing over -------------------------------------------------------------------------------------------------


def test_the_configured_embedder_takes_over_when_all_vectors_are_made(service: RagService) -> None:
    assert change(service) == EmbedderState(NAME_NEW, NAME_NEW, differs=False, kept=NAME_OLD)
    assert "十天" in answer(service)
    assert check(service.store, service.fulltext).problems == []


def test_after_the_change_the_next_start_finds_it_done(service: RagService, kb: Path) -> None:
    change(service)
    service.close()
    again = RagService(load_config(None, [f"kb={kb}", NEW]))  # also without leave to use any embedder
    assert "十天" in answer(again)
    again.close()


def test_it_can_be_gone_back_and_forth(service: RagService) -> None:
    change(service)
    assert change(service, rollback=True) == EmbedderState(NAME_NEW, NAME_OLD, differs=True, kept=NAME_NEW)
    assert "十天" in answer(service)
    assert change(service) == EmbedderState(NAME_NEW, NAME_NEW, differs=False, kept=NAME_OLD)
    assert "十天" in answer(service)


def test_going_back_with_nothing_kept_says_so(service: RagService) -> None:
    state = change(service, rollback=True)
    assert state.problem is not None
    assert "没有可以切换回去的旧向量" in state.problem.zh
    assert state.differs


def test_questions_are_answered_by_the_old_one_while_the_new_vectors_are_made(
    service: RagService, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    service.change_embedder()
    assert gate.reached.wait(30)
    assert service.embedder().progress == (0, 701)
    with ThreadPoolExecutor(4) as pool:
        assert all("十天" in text for text in pool.map(lambda _: answer(service), range(8)))
    assert service.embedder().answering == NAME_OLD
    gate.open.set()
    assert service._change.wait(60)
    assert service.embedder().answering == NAME_NEW


def test_a_question_that_was_asked_before_the_switch_ends_with_the_chain_it_began_with(service: RagService) -> None:
    stream = service.stream(QUESTION, [], llm=None, top_k=None, stop=threading.Event())
    first = next(stream)
    change(service)
    assert "十天" in "".join(piece.get("result", "") for piece in [first, *stream])


def test_questions_never_fail_around_the_switch(service: RagService) -> None:
    done = threading.Event()

    def keep_asking() -> int:
        count = 0
        while not done.is_set():
            assert "十天" in answer(service)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        for rollback in (False, True, False):
            assert change(service, rollback=rollback).problem is None
        done.set()
        assert all(asked.result(60) > 0 for asked in asking)


def test_a_stopped_change_goes_on_where_it_was(service: RagService, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    service.change_embedder()
    assert gate.reached.wait(30)
    service.stop_change()
    assert service.embedder().stopping
    gate.open.set()
    assert service._change.wait(60)
    stopped = service.embedder()
    assert (stopped.stopped, stopped.answering, stopped.progress) == (True, NAME_OLD, None)
    assert "十天" in answer(service)

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(service._change, "_report", lambda done, total: seen.append((done, total)))
    assert change(service).answering == NAME_NEW
    assert seen[0] == (512, 701)  # one batch of 512 was done


def test_what_is_uploaded_meanwhile_gets_its_vectors_too(
    service: RagService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    service.change_embedder()
    assert gate.reached.wait(30)
    assert service.upload([write(tmp_path / "in" / "new.txt", "停车费每小时五元。")], quiet)["added"] == 1
    gate.open.set()
    assert service._change.wait(60)
    assert service.embedder().answering == NAME_NEW
    assert check(service.store, service.fulltext).problems == []


def test_an_upload_that_the_switch_overtakes_is_finished_by_the_new_embedder(
    service: RagService, tmp_path: Path
) -> None:
    files = [write(tmp_path / "up" / f"{n}.txt", f"第{n}条规定的内容。") for n in range(4)]
    changed = False

    def progress(done: int, total: int, name: str) -> None:
        nonlocal changed
        if done == 2 and not changed:
            changed = True
            change(service)

    report = service.upload(files, progress)
    assert (report["added"] + report["unchanged"], report["failed"]) == (4, [])
    assert len(service.sources()) == 6
    assert check(service.store, service.fulltext).problems == []


# -- changed by another process ------------------------------------------------------------------------------------


def test_a_change_by_the_command_line_is_followed(service: RagService, kb: Path) -> None:
    assert "十天" in answer(service)
    other = open_vectorstore(load_config(None, [f"kb={kb}", NEW]))
    reembed(other)
    other.knowledge_base.close()
    assert service.embedder() == EmbedderState(NAME_NEW, NAME_NEW, differs=False, kept=NAME_OLD)
    assert "十天" in answer(service)


def test_closing_ends_a_change_that_can_be_taken_up_later(kb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    service = open_service(kb, NEW)
    service.change_embedder()
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.open.set).start()
    service.close()
    again = open_service(kb, NEW)
    assert again.embedder().answering == NAME_OLD
    assert change(again).answering == NAME_NEW
    again.close()
