from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import RagProjError
from ui import handlers
from ui.handlers import ChatView, Service, Session
from ui.views import EmbedderState, Turn

EXAMPLES = ["年假有几天？"]


def ask(service: Service, session: Session, question: str, **settings: Any) -> list[ChatView]:
    return list(handlers.ask(service, session, question, examples=EXAMPLES, **{"llm": None, "top_k": 5, **settings}))


def upload(service: Service, session: Session, inside: Path, *files: Path, refused: tuple[str, ...] = ()) -> list[Any]:
    names = [str(path) for path in files]
    return list(handlers.upload(service, session, names, refused, inside=inside, examples=EXAMPLES))


@pytest.fixture
def session() -> Session:
    return Session("zh")


def test_handlers_do_not_import_gradio() -> None:
    code = "import sys, ui.handlers; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- asking


def test_an_answer_ends_with_its_citation_and_an_idle_page(service: Any, session: Session) -> None:
    views = ask(service, session, " 年假有几天？ ", llm="chat", top_k=3)
    assert views[0].running is True
    assert views[0].question == ""
    assert "年假有几天？" in (views[0].live or "")
    assert views[-1].running is False
    assert views[-1].live == ""
    assert 'data-turn="0" data-n="1"' in (views[-1].conversation or "")
    assert session.turns[0].answer == "年假每年十天。 [1]"
    assert service.asked == [{"question": "年假有几天？", "history": [], "llm": "chat", "top_k": 3}]


def test_the_answer_is_painted_while_it_grows(service: Any, session: Session) -> None:
    service.pause = lambda: time.sleep(0.03)
    painted = [view.live or "" for view in ask(service, session, "年假有几天？")]
    growing = [html for html in painted if "growing" in html]
    assert len(growing) >= 2
    assert "年" in growing[0]
    assert "十天" not in growing[0]


def test_a_silent_generator_does_not_hold_back_what_it_has_said(service: Any, session: Session) -> None:
    gate = threading.Event()
    service.pause = lambda: gate.wait(5) if service.pieces_sent == 3 else None
    views = handlers.ask(service, session, "年假有几天？", examples=[], llm=None, top_k=5)
    assert any("年假每" in (view.live or "") for view in (next(views) for _ in range(3)))
    gate.set()
    list(views)


def test_painting_costs_in_proportion_to_time_not_to_the_square_of_the_answer() -> None:
    # an answer that grows by 500 characters a second for ten minutes, painted as often as allowed
    now, painted, paints = 0.0, 0, 0
    while now < 600:
        length = int(now * 500)
        painted, paints = painted + length, paints + 1
        now += handlers.paint_interval(length)
    assert painted / 600 <= handlers.RENDERED_PER_SECOND
    assert paints > 600 / 3.1  # and even the longest is repainted every three seconds


def test_a_long_answer_in_many_pieces_is_joined_in_linear_time() -> None:
    turn = Turn("问")
    started = time.perf_counter()
    for _ in range(200_000):
        turn.take({"result": "字"})
    assert len(turn.answer) == turn.length == 200_000
    assert time.perf_counter() - started < 2


def test_earlier_turns_are_the_history_of_the_next(service: Any, session: Session) -> None:
    ask(service, session, "年假有几天？")
    ask(service, session, "Zebra?")  # refused: nothing to refer to
    ask(service, session, "加班呢，须谁批准？")
    assert service.asked[2]["history"] == [("年假有几天？", "年假每年十天。 [1]")]


def test_a_refusal_is_shown_as_one(service: Any, session: Session) -> None:
    views = ask(service, session, "Zebra?")
    assert session.turns[0].refused
    assert "知识库里没有找到依据" in (views[-1].conversation or "")


@pytest.mark.parametrize(("language", "hint"), [("zh", "请先输入问题。"), ("en", "Type a question first.")])
def test_an_empty_question_gets_a_hint(service: Any, language: Any, hint: str) -> None:
    assert ask(service, Session(language), " \n ") == [ChatView(warning=hint)]
    assert service.asked == []


def test_a_second_question_waits_for_the_first(service: Any, session: Session) -> None:
    first = handlers.ask(service, session, "年假有几天？", examples=[], llm=None, top_k=5)
    next(first)
    assert ask(service, session, "加班呢？")[0].warning == "上一个回答还没有结束，请稍候或先停止。"
    list(first)
    assert len(session.turns) == 1


def test_the_services_own_words_are_shown_in_the_pages_language(service: Any) -> None:
    for language, words in (("zh", "问题太长"), ("en", "the question is too long")):
        session = Session(language)  # type: ignore[arg-type]
        views = ask(service, session, "长" * 100_000)
        assert words in (views[-1].conversation or "")
        assert views[-1].running is False
        assert not session.turns[0].is_answered


def test_an_unexpected_error_is_logged_and_not_shown(
    service: Any, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    service.fails = ConnectionError("secret-host:9000 refused")
    views = ask(service, session, "年假有几天？")
    assert "程序内部出错" in (views[-1].conversation or "")
    assert "secret-host" not in "".join(view.conversation or "" for view in views)
    assert "secret-host" in caplog.text
    assert session.running is None


def test_stop_ends_the_work_and_keeps_what_was_said(service: Any, session: Session) -> None:
    service.pause = lambda: time.sleep(0.05)
    views = handlers.ask(service, session, "年假有几天？", examples=[], llm=None, top_k=5)
    while "growing" not in (next(views).live or ""):
        pass
    handlers.stop(session)
    last = list(views)[-1]
    assert service.closed.wait(1)
    assert service.pieces_sent < len("年假每年十天。 [1]")
    assert session.turns[0].stopped
    assert session.turns[0].answer.startswith("年")
    assert "已停止" in (last.conversation or "")
    assert last.running is False


def test_stop_does_not_wait_for_a_generator_that_is_stuck(service: Any, session: Session) -> None:
    gate = threading.Event()
    service.pause = lambda: gate.wait(10)
    views = handlers.ask(service, session, "年假有几天？", examples=[], llm=None, top_k=5)
    next(views)
    handlers.stop(session)
    started = time.monotonic()
    list(views)
    assert time.monotonic() - started < 1
    gate.set()
    assert service.closed.wait(1)


def test_a_page_that_goes_away_ends_the_work(service: Any, session: Session) -> None:
    service.pause = lambda: time.sleep(0.05)
    views = handlers.ask(service, session, "年假有几天？", examples=[], llm=None, top_k=5)
    next(views)
    next(views)
    views.close()  # type: ignore[attr-defined]
    assert service.closed.wait(1)
    assert session.running is None


def test_stop_without_an_answer_in_progress_does_nothing(session: Session) -> None:
    handlers.stop(session)
    assert session.running is None


def test_clear_leads_back_to_the_examples(service: Any, session: Session) -> None:
    ask(service, session, "年假有几天？")
    view = handlers.clear(service, session, examples=EXAMPLES)
    assert session.turns == []
    assert EXAMPLES[0] in (view.conversation or "")


def test_an_empty_knowledge_base_is_said_before_anything_is_asked(service: Any, session: Session) -> None:
    assert "知识库还是空的" not in handlers.conversation(service, session, examples=EXAMPLES)
    service.texts.clear()
    assert "知识库还是空的" in handlers.conversation(service, session, examples=EXAMPLES)


# ---------------------------------------------------------------- citations


def test_a_citation_opens_its_passage(service: Any, session: Session) -> None:
    ask(service, session, "加班须谁批准？")
    html = handlers.open_passage(service, session, 0, 1)
    assert "<mark>加班须在事前申请，由部门主管批准后生效。</mark>" in html
    assert "年假每年十天。<mark>" in html
    assert "</mark>出差住宿" in html
    assert "第 2 页" in html


def test_a_closed_passage_is_gone(service: Any, session: Session) -> None:
    ask(service, session, "加班须谁批准？")
    handlers.open_passage(service, session, 0, 1)
    handlers.close_passage(session)
    assert handlers.passage(service, session) == ""


@pytest.mark.parametrize(("turn", "n"), [(0, 9), (7, 1), (-1, 1)])
def test_a_citation_that_does_not_exist_says_so(service: Any, session: Session, turn: int, n: int) -> None:
    ask(service, session, "加班须谁批准？")
    assert "找不到这条出处" in handlers.open_passage(service, session, turn, n)


def test_a_citation_of_a_removed_document_says_why(service: Any, session: Session) -> None:
    ask(service, session, "加班须谁批准？")
    service.texts.clear()
    assert "handbook.txt 已被移除" in handlers.open_passage(service, session, 0, 1)


# ---------------------------------------------------------------- the knowledge base


def test_uploads_are_reported_as_they_go_and_then_listed(service: Any, session: Session, tmp_path: Path) -> None:
    good, bad = tmp_path / "食堂.txt", tmp_path / "锁.pdf"
    good.write_text("周五供应红烧肉。", encoding="utf-8")
    bad.write_bytes(b"%PDF")
    views = upload(service, session, tmp_path, good, bad)
    assert "正在处理 0/2：食堂.txt" in views[0].dropzone
    assert "正在处理 1/2：锁.pdf" in views[1].dropzone
    assert "新增 1 份" in views[-1].dropzone
    assert "<td>锁.pdf</td><td>文件已加密</td>" in views[-1].dropzone
    assert "<progress" not in views[-1].dropzone
    assert "食堂.txt" in views[-1].table


def test_uploaded_files_do_not_stay_where_they_were_received(service: Any, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("内容。", encoding="utf-8")
    upload(service, session, tmp_path, path)
    assert not path.exists()


def test_a_path_outside_the_upload_folder_is_neither_read_nor_deleted(
    service: Any, session: Session, tmp_path: Path
) -> None:
    inside = tmp_path / "received"
    inside.mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("密码。", encoding="utf-8")
    (inside / "link.txt").symlink_to(secret)
    upload(service, session, inside, secret, inside / ".." / "secret.txt", inside / "link.txt")
    assert secret.exists()
    assert list(service.texts) == ["handbook.txt"]


def test_files_that_did_not_arrive_are_listed(service: Any, session: Session, tmp_path: Path) -> None:
    views = upload(service, session, tmp_path, refused=("huge.pdf",))
    assert len(views) == 1
    assert f"<td>huge.pdf</td><td>上传没有成功：文件可能超过 {handlers.MAX_UPLOAD_MB} MB" in views[0].dropzone


def test_an_upload_can_be_stopped_and_keeps_what_is_done(service: Any, session: Session, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.txt" for n in range(4)]
    for path in paths:
        path.write_text("内容。", encoding="utf-8")
    gate = threading.Event()
    service.pause = lambda: gate.wait(10) if "0.txt" in service.texts else None  # the second file takes its time
    names = [str(path) for path in paths]
    views = handlers.upload(service, session, names, (), inside=tmp_path, examples=[])
    while "正在处理 1/4" not in (next(views).dropzone or ""):
        pass
    handlers.stop_upload(session)
    assert "正在停止…" in (next(views).dropzone or "")
    gate.set()
    last = list(views)[-1]
    assert "新增 1 份" in (last.dropzone or "")
    assert "已停止，还有 3 份没有处理" in (last.dropzone or "")
    assert sorted(service.texts) == ["0.txt", "handbook.txt"]
    assert session.uploading is None
    assert not any(path.exists() for path in paths)


def test_stop_without_an_upload_in_progress_does_nothing(session: Session) -> None:
    handlers.stop_upload(session)
    assert session.uploading is None


def test_an_ingest_that_fails_as_a_whole_says_why(service: Any, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("内容。", encoding="utf-8")

    def full(*_: Any) -> dict[str, Any]:
        raise RagProjError("磁盘已满", "the disk is full")

    service.upload = full
    assert "磁盘已满" in upload(service, session, tmp_path, path)[-1].dropzone
    assert not path.exists()


def test_removal_names_what_went_and_ignores_what_is_not_there(service: Any, session: Session) -> None:
    view = handlers.remove(service, session, ["/kb/handbook.txt", "/etc/passwd"], examples=EXAMPLES)
    assert "已移除 1 份：handbook.txt" in (view.table or "")
    assert "还没有文档" in (view.table or "")
    assert "知识库还是空的" in (view.conversation or "")


def test_removing_nothing_says_so(service: Any, session: Session) -> None:
    assert "没有移除任何文档" in (handlers.remove(service, session, [], examples=[]).table or "")


def test_a_removal_that_fails_says_why(service: Any, session: Session) -> None:
    def locked(_: list[str]) -> int:
        raise RagProjError("知识库正忙", "the knowledge base is busy")

    service.remove = locked
    html = handlers.remove(service, session, ["/kb/handbook.txt"], examples=[]).table or ""
    assert "知识库正忙" in html
    assert "handbook.txt" in html


def test_a_knowledge_base_that_cannot_be_read_says_why_and_leaves_the_page_usable(
    service: Any, session: Session
) -> None:
    def broken() -> list[Any]:
        raise RagProjError("知识库已损坏", "the knowledge base is damaged")

    service.sources = broken
    assert "知识库已损坏" in handlers.table(service, session)
    assert "知识库已损坏" in (handlers.remove(service, session, ["/kb/a"], examples=[]).table or "")
    assert EXAMPLES[0] in handlers.conversation(service, session, examples=EXAMPLES)


def test_the_filter_stays_when_the_table_is_shown_again(service: Any, session: Session) -> None:
    service.texts["差旅.txt"] = "报销。"
    assert "handbook" not in handlers.filter_table(service, session, " 差旅 ")
    assert "handbook" not in handlers.table(service, session)


# ---------------------------------------------------------------- the embedder

DIFFERS = EmbedderState("new-512", "old-1024", differs=True)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "WATCH_S", 0.001)


def test_there_is_no_panel_where_the_configured_embedder_answers(service: Any, session: Session) -> None:
    assert handlers.embedder(service, session) == ""


def test_a_change_is_shown_until_the_new_embedder_answers(service: Any, session: Session, fast: None) -> None:
    service.state = DIFFERS
    panels = list(handlers.change_embedder(service, session))
    assert service.changes == [False]
    assert [n for n in (50, 100, 150, 200) if f"{n}/200" in "".join(panels)] == [50, 100, 150, 200]
    assert "<code>new-512</code> 回答" in panels[-1]
    assert "切换回旧模型" in panels[-1]


def test_going_back_is_asked_of_the_service(service: Any, session: Session, fast: None) -> None:
    service.state = EmbedderState("new-512", "new-512", differs=False, kept="old-1024")
    list(handlers.change_embedder(service, session, rollback=True))
    assert service.changes == [True]


def test_a_page_that_is_opened_in_the_middle_of_a_change_follows_it(service: Any, session: Session, fast: None) -> None:
    service.state = DIFFERS
    next(handlers.change_embedder(service, Session("en")))
    panels = list(handlers.watch_embedder(service, session))
    assert "100/200" in panels[0]
    assert "切换回旧模型" in panels[-1]


def test_a_page_that_goes_away_does_not_end_the_change(service: Any, session: Session, fast: None) -> None:
    service.state = DIFFERS
    panels = handlers.change_embedder(service, session)
    next(panels)
    panels.close()  # type: ignore[attr-defined]
    assert service.state.progress == (50, 200)
    assert not service.state.stopping


def test_a_stopped_change_says_so_and_can_be_taken_up_again(service: Any, session: Session, fast: None) -> None:
    service.state = DIFFERS
    panels = handlers.change_embedder(service, session)
    next(panels)
    service.stop_change()
    last = list(panels)[-1]
    assert "已停止，做好的向量已保存" in last
    assert 'data-action="reembed"' in last


def test_a_panel_that_does_not_change_is_not_sent_again(service: Any, session: Session, fast: None) -> None:
    service.state = replace(DIFFERS, progress=(0, 9))
    looks = 0

    def look() -> EmbedderState:
        nonlocal looks
        looks += 1
        return replace(DIFFERS, progress=(0, 9)) if looks < 20 else DIFFERS

    service.embedder = look
    assert len(list(handlers.watch_embedder(service, session))) == 2


def test_an_embedder_that_cannot_be_told_says_why(service: Any, session: Session) -> None:
    def broken() -> EmbedderState:
        raise RagProjError("知识库已损坏", "the knowledge base is damaged")

    service.embedder = broken
    assert "知识库已损坏" in handlers.embedder(service, session)
    assert len(list(handlers.watch_embedder(service, session))) == 1


def test_the_language_switch_reaches_what_is_already_on_the_page(
    service: Any, session: Session, tmp_path: Path
) -> None:
    ask(service, session, "长" * 100_000)
    path = tmp_path / "锁.pdf"
    path.write_bytes(b"%PDF")
    upload(service, session, tmp_path, path)
    assert handlers.switch_language(session) == "en"
    assert "the question is too long" in handlers.conversation(service, session, examples=[])
    assert "the file is encrypted" in handlers.dropzone(session)
    assert handlers.switch_language(session) == "zh"
