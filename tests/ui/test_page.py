"""The page in a real browser, over the real service; a slow stand-in only where the answer must take its time."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import LexicalEmbeddings, load_config
from ui.service import RagService

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HANDBOOK = """# 员工手册

## 第一章 工作时间

公司实行每周五天、每天八小时的工作制，上班时间为九点至十八点，其中午休一小时。
因工作需要加班的，须在事前提交加班申请，由部门主管批准后生效。未经批准的加班不计入加班时长。

## 第二章 休假

入职满一年的员工每年享有十天带薪年假，入职满十年的员工每年享有十五天带薪年假。
年假须在当年用完，确有需要的可以顺延至次年三月三十一日。
病假须在三个工作日内补交医院证明，病假期间按基本工资的百分之八十发放工资。

## 第三章 出差

国内出差的住宿标准为每晚不超过五百元，一线城市每晚不超过七百元，超出部分由本人承担。
出差结束后十个工作日内提交报销单，逾期不予报销。
"""
HOSTILE = """本说明用于测试网页安全。<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">

灭火器的检查周期是每月一次<img src=x onerror="window.hacked = 1">，由安全员<b onclick="window.hacked = 1">签字</b>。
"""
EXAMPLES = ["入职满一年有几天年假？", "加班需要谁批准？", "出差住宿标准是多少？", "病假工资怎么算？"]
# one blank page, written by pypdf 6 with a password to open it (RC4, 40 bits)
ENCRYPTED_PDF = zlib.decompress(
    base64.b64decode(
        "eNqNUstu1EAQvM9X9GWPZN4vydoDSVZCgLJyAheUw3imZ1m0siPvrJTwkxz4A/gRxgaCxXLAsqVRdVV1T7VX26vNC34hyerb9y9fCQcGQ/eJNA2h"
        "23FIp4gjNDpmzpUWGNZkvSbYp4kjFty7pwcEug07PBJ6OZz6ApzQ1/t0hA+gKrGF+4VUnkkvQwmHYUd+esDk3S4E6p+9CG3xOJzGWBW1Uun0LaZ9"
        "eDk81rbsgs2fFdN7P1mPWAf721svvN9PY7cgCH2D/a58BMWqDpTwyhsrfC1s9odSQ6G3JfQpjInQG2hQB5eEcbZLPrGYs1emsyFqnTVnjqeYWeLc"
        "aK2i6nLsWNColMnGY1Cu5krfQdM5K1TkBn3OxjDEKHQnbJYdVnk9Me2k6qyXqGN0WiXPZHKR26Sj8n65nccRM2FgCHt+oLaXGjI8Y7zefa70fzDt"
        "zzDO3Tlm7Bkmltoyhv0BxznW2/1nrKPQdhgKyDl/+qrPA/Bf56u6r0ZLl0VOLngtVBC8k8Kp7C2TAWO99fp/KHXP130cnx4K6N+LPpYwljkQZeuf"
        "vrq+2ZAfpCvDmw=="
    )
)


def serve(service: Any, examples: list[str]) -> tuple[Any, str]:
    """The page on a free port: the app, to be closed, and its address."""
    from ui.app import build_app, launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build_app(service, examples=examples)
    return app, launch(app, port=port, block=False)


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[str]:
    """The address of the page over a small knowledge base of its own, in a folder."""
    (folder / "员工手册.md").write_text(HANDBOOK, encoding="utf-8")
    (folder / "安全 <img src=x onerror=alert(1)>.md").write_text(HOSTILE, encoding="utf-8")
    service = RagService(load_config(None, [f"kb={folder / 'kb'}"]), create=True)
    assert service.ingestor().ingest(sorted(folder.glob("*.md"))).added == 2
    app, address = serve(service, EXAMPLES)
    yield address
    app.close(verbose=False)
    service.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with open_site(tmp_path_factory.mktemp("site")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium. Where CI is set it must be there; elsewhere its absence skips these tests."""
    program = shutil.which("chromium")
    if program is None:
        reason = "needs Chromium: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=ARGUMENTS, headless=True)
        yield chromium
        chromium.close()


class Visit:
    """One open page, with what it requested and which errors it met."""

    def __init__(self, browser: Any, address: str, width: int = 1280, height: int = 800) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, locale="zh-CN")
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(address)
        self.page.wait_for_selector(".welcome")

    def ask(self, question: str) -> Any:
        """Ask and wait for the whole answer; the turn's element."""
        page = self.page
        asked = page.locator("#conversation-html .turn").count()
        page.locator("#question textarea").fill(question)
        page.keyboard.press("Enter")
        turn = page.locator("#conversation-html .turn").nth(asked)
        turn.wait_for()
        return turn

    def open_sources(self) -> None:
        """Go to the knowledge base's tab."""
        self.page.get_by_role("tab").nth(1).click()
        self.page.wait_for_selector(".drop", state="visible")

    def upload(self, *files: dict[str, Any]) -> Any:
        """Choose files to upload, wait for the report."""
        self.page.set_input_files(".drop input", list(files))
        self.page.wait_for_selector(".report .done, .report .failures")
        return self.page.locator(".report")

    def hacked(self) -> bool:
        """Whether any script of a document ran."""
        return bool(self.page.evaluate("'hacked' in window"))

    def end(self) -> None:
        """Close, after checking what holds for every visit."""
        self.context.close()
        assert [url for url in self.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
        assert self.errors == []


@pytest.fixture
def visit(browser: Any, site: str) -> Iterator[Visit]:
    opened = Visit(browser, site)
    yield opened
    opened.end()


def text_file(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "mimeType": "text/plain", "buffer": text.encode()}


# ---------------------------------------------------------------- asking


def test_a_question_is_answered_and_the_box_is_ready_for_the_next(visit: Visit) -> None:
    turn = visit.ask("加班需要谁批准？")
    assert "部门主管" in turn.locator(".answer").inner_text()
    assert visit.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    assert visit.page.locator("#question textarea").input_value() == ""
    assert visit.page.locator("#send").is_visible()
    assert not visit.page.locator("#stop").is_visible()


def test_an_example_is_asked_by_a_click(visit: Visit) -> None:
    visit.page.get_by_role("button", name=EXAMPLES[0]).click()
    answer = visit.page.locator("#conversation-html .turn .answer")
    answer.wait_for()
    assert "十天" in answer.inner_text()


def test_a_citation_opens_the_right_place_in_its_document(visit: Visit) -> None:
    turn = visit.ask("病假工资怎么算？")
    turn.locator("button.cite").first.click()
    visit.page.wait_for_selector(".passage mark")
    passage = visit.page.locator(".passage")
    quote = passage.locator("mark").inner_text()
    assert "百分之八十" in quote
    # the quote stands where the document has it: what surrounds it is what surrounds it there
    flat = re.sub(r"\s+", "", HANDBOOK)
    shown = re.sub(r"\s+", "", passage.locator(".text").inner_text())
    assert re.sub(r"\s+", "", quote) in flat
    assert "顺延至次年" in shown
    assert "员工手册" in passage.locator(".where").inner_text()
    assert "员工手册.md" in passage.locator(".path").inner_text()
    assert passage.locator("mark").is_visible()
    passage.get_by_role("button", name="关闭").click()
    passage.wait_for(state="detached")


def test_an_answer_is_copied_with_its_sources(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    turn = visit.ask("加班需要谁批准？")
    turn.get_by_role("button", name="复制").click()
    turn.get_by_role("button", name="已复制").wait_for()
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert "部门主管批准" in copied
    assert "[1]" in copied.splitlines()[0]
    assert re.search(r"^\[1\] .*员工手册\.md", copied, re.MULTILINE)


def test_the_conversation_stays_and_can_be_cleared(visit: Visit) -> None:
    visit.ask("加班需要谁批准？")
    visit.ask("出差住宿标准是多少？")
    assert visit.page.locator(".turn .question").all_inner_texts() == ["加班需要谁批准？", "出差住宿标准是多少？"]
    visit.page.get_by_role("button", name="清空对话").click()
    visit.page.wait_for_selector(".welcome")
    assert visit.page.locator(".turn").count() == 0


def test_what_the_documents_do_not_say_is_refused(visit: Visit) -> None:
    turn = visit.ask("Zyxwv qponm?")
    assert turn.locator(".answer.refused").is_visible()
    assert turn.locator("button.cite").count() == 0


def test_an_empty_question_gets_a_hint(visit: Visit) -> None:
    visit.page.get_by_role("button", name="发送").click()
    visit.page.get_by_text("请先输入问题。").wait_for()


def test_a_question_of_100_000_characters_gets_a_clear_message(visit: Visit) -> None:
    turn = visit.ask("长" * 100_000)
    assert "100000" in turn.locator(".answer.failed").inner_text().replace(",", "")


# ---------------------------------------------------------------- the knowledge base


def test_an_uploaded_document_answers_until_it_is_removed(visit: Visit) -> None:
    page, question = visit.page, "食堂哪一天供应红烧肉？"
    visit.open_sources()
    report = visit.upload(text_file("食堂（2026）.txt", "公司食堂每周五供应红烧肉，每份十八元，需要提前一天预订。"))
    assert "新增 1 份" in report.inner_text()
    row = page.locator("table.sources tr", has_text="食堂（2026）")
    assert row.is_visible()

    page.get_by_role("tab").first.click()
    assert "周五" in visit.ask(question).locator(".answer").inner_text()

    visit.open_sources()
    row.get_by_role("checkbox").check()
    page.get_by_role("button", name="移除所选").click()
    page.get_by_role("button", name="确认移除 1 份？").click()
    page.get_by_text(re.compile("已移除 1 份：.*食堂（2026）")).wait_for()
    assert row.count() == 0

    page.get_by_role("tab").first.click()
    assert "红烧肉" not in visit.ask(question).locator(".answer").inner_text()


def test_removing_can_be_called_off(visit: Visit) -> None:
    visit.open_sources()
    page, rows = visit.page, visit.page.locator("table.sources tbody tr")
    before = rows.all_inner_texts()
    page.locator("table.sources tbody [type=checkbox]").first.check()
    page.get_by_role("button", name="移除所选").click()
    page.get_by_role("button", name="取消").click()
    assert page.get_by_role("button", name="移除所选").is_disabled()
    assert rows.all_inner_texts() == before != []


def test_an_encrypted_pdf_shows_its_error_and_the_rest_is_stored(visit: Visit) -> None:
    visit.open_sources()
    locked = {"name": "合同.pdf", "mimeType": "application/pdf", "buffer": ENCRYPTED_PDF}
    report = visit.upload(locked, text_file("说明.txt", "合同由法务部统一保管。"))
    failure = report.locator(".failures tbody tr")
    assert failure.locator("td").nth(0).inner_text() == "合同.pdf"
    assert re.search("加密|密码", failure.locator("td").nth(1).inner_text())
    assert "新增 1 份" in report.inner_text()


def test_files_can_be_dropped(visit: Visit) -> None:
    visit.open_sources()
    drop = """([zone, name, text]) => {
        const data = new DataTransfer();
        data.items.add(new File([text], name, { type: "text/plain" }));
        for (const kind of ["dragover", "drop"])
            zone.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    zone = visit.page.locator(".drop").element_handle()
    visit.page.evaluate(drop, [zone, "拖放.txt", "拖放上传的文件也会入库。"])
    visit.page.locator("table.sources tr", has_text="拖放").wait_for()


def test_the_table_can_be_filtered_and_a_tick_does_not_pass_to_another_row(visit: Visit) -> None:
    visit.open_sources()
    visit.page.locator("table.sources tr", has_text="安全").get_by_role("checkbox").check()
    visit.page.get_by_label("筛选文档").fill("手册")
    visit.page.wait_for_function("document.querySelectorAll('table.sources tbody tr').length === 1")
    assert "员工手册" in visit.page.locator("table.sources tbody").inner_text()
    assert not visit.page.locator("table.sources tbody [type=checkbox]").is_checked()
    assert visit.page.get_by_role("button", name="移除所选").is_disabled()


# ---------------------------------------------------------------- the whole page


def test_markup_in_documents_is_text(visit: Visit) -> None:
    turn = visit.ask("灭火器的检查周期是多久？")
    assert "<img src=x" in turn.locator(".answer").inner_text()
    turn.locator("button.cite").first.click()
    visit.page.wait_for_selector(".passage mark")
    assert "<img src=x" in visit.page.locator(".passage .text").inner_text()
    visit.open_sources()
    assert "<img src=x" in visit.page.locator("table.sources").inner_text()
    assert visit.page.locator("gradio-app img").count() == 0
    assert not visit.hacked()


def test_the_language_switch_changes_every_visible_string(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="回答设置").click()
    page.get_by_role("button", name="English").click()
    page.get_by_role("tab", name="Knowledge base").wait_for()
    own = re.compile("|".join(map(re.escape, [*EXAMPLES, "中文", "知"])))
    for tab in (0, 1):
        page.get_by_role("tab").nth(tab).click()
        page.wait_for_timeout(200)
        page.evaluate("document.querySelectorAll('table.sources tbody').forEach((body) => body.remove())")
        assert re.findall("[一-鿿]+", own.sub("", page.locator("body").inner_text())) == []
    labels = page.evaluate(
        "[...document.querySelectorAll('[aria-label],[placeholder],[title]')].flatMap((e) =>"
        " ['aria-label','placeholder','title'].map((name) => e.getAttribute(name) ?? ''))"
    )
    assert re.findall("[一-鿿]+", " ".join(labels)) == []
    assert page.title() == "RagProj: ask your documents"
    assert page.evaluate("document.documentElement.lang") == "en"
    page.get_by_role("button", name="中文").click()
    page.get_by_role("tab", name="知识库").wait_for()
    assert page.title() == "知识库问答 RagProj"


def test_a_phone_scrolls_only_downwards(browser: Any, site: str) -> None:
    phone = Visit(browser, site, width=390, height=844)
    page = phone.page

    def widest() -> int:
        return int(page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"))

    assert widest() <= 390
    turn = phone.ask("出差住宿标准是多少？" + "很长的英文单词" + "w" * 120)
    turn.locator(".citations .source, .answer").first.wait_for()
    assert widest() <= 390
    phone.ask("出差住宿标准是多少？").locator("button.cite").first.click()
    page.wait_for_selector(".passage mark")
    page.wait_for_function(
        "document.querySelector('.passage mark').getBoundingClientRect().top < innerHeight", timeout=3000
    )
    assert widest() <= 390
    # below the conversation, not beside it
    assert page.locator(".passage").bounding_box()["y"] > page.locator("#composer").bounding_box()["y"]
    phone.open_sources()
    assert widest() <= 390
    page.locator("#language").click()
    page.get_by_role("tab", name="Knowledge base").wait_for()
    assert widest() <= 390
    phone.end()


def test_nothing_of_gradio_itself_is_shown(visit: Visit) -> None:
    text = visit.page.locator("body").inner_text().lower()
    assert "gradio" not in text
    assert "api" not in text


# ---------------------------------------------------------------- an answer that takes its time


@pytest.fixture
def slow(browser: Any, service: Any) -> Iterator[tuple[Visit, Any]]:
    service.pause = lambda: time.sleep(0.1)
    app, address = serve(service, EXAMPLES)
    yield Visit(browser, address), service
    app.close(verbose=False)


def test_stop_ends_the_work(slow: tuple[Visit, Any]) -> None:
    visit, service = slow
    page = visit.page
    service.texts["长文.txt"] = "关于流程的说明" * 200 + "。"
    assert not page.locator("#stop").is_visible()
    page.locator("#question textarea").fill("流程的说明是什么")
    page.keyboard.press("Enter")
    page.wait_for_selector(".growing")
    page.get_by_role("button", name="停止").click()
    page.get_by_text("已停止").wait_for()
    assert service.closed.wait(1)
    assert 0 < service.pieces_sent < 100
    assert page.locator("#send").is_visible()
    assert not page.locator("#stop").is_visible()
    visit.end()


def test_an_upload_is_stopped_by_its_button(slow: tuple[Visit, Any]) -> None:
    visit, service = slow
    service.pause = lambda: time.sleep(0.3)
    visit.open_sources()
    visit.page.set_input_files(".drop input", [text_file(f"{n}.txt", "内容。") for n in range(40)])
    visit.page.locator(".report").get_by_role("button", name="停止").click()
    visit.page.get_by_text(re.compile(r"已停止，还有 \d+ 份没有处理")).wait_for()
    assert visit.page.locator("table.sources tbody tr").count() == len(service.texts) < 40
    assert visit.page.locator(".report progress").count() == 0
    visit.end()


def test_closing_the_page_ends_the_work(slow: tuple[Visit, Any]) -> None:
    visit, service = slow
    service.texts["长文.txt"] = "关于流程的说明" * 200 + "。"
    visit.page.locator("#question textarea").fill("流程的说明是什么")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector(".growing")
    visit.end()
    assert service.closed.wait(10)
    assert service.pieces_sent < 150


# ---------------------------------------------------------------- another embedder


@pytest.fixture
def changed(browser: Any, tmp_path: Path) -> Iterator[tuple[Visit, RagService]]:
    """The page over a knowledge base by the embedder of 1,024 dimensions, with one of 512 configured."""
    (tmp_path / "员工手册.md").write_text(HANDBOOK, encoding="utf-8")
    notes = [f'{{"id": "{n}", "text": "第{n}号仓库存放第{n * 7}批零件。"}}' for n in range(3000)]
    (tmp_path / "零件.jsonl").write_text("\n".join(notes), encoding="utf-8")
    words = [f"kb={tmp_path / 'kb'}"]
    service = RagService(load_config(None, words), create=True)
    assert service.ingestor().ingest(sorted(tmp_path.glob("*.*"))).added == 2
    service.close()
    service = RagService(load_config(None, [*words, "embeddings.dimensions=512"]), any_embedder=True)
    app, address = serve(service, EXAMPLES)
    visit = Visit(browser, address)
    yield visit, service
    visit.end()
    app.close(verbose=False)
    service.close()


def test_the_embedder_is_changed_from_the_page_while_questions_are_answered(
    changed: tuple[Visit, RagService], monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, _ = changed
    page, panel = visit.page, visit.page.locator(".embedder")
    before_each_batch(monkeypatch, lambda: time.sleep(0.7))
    visit.open_sources()
    panel.wait_for()
    assert re.search("lexical-1024.*回答，配置的是.*lexical-512", panel.inner_text(), re.DOTALL)

    panel.get_by_role("button", name="重新生成向量").click()
    page.get_by_text(re.compile(r"正在生成向量 [1-9][\d,]*/3,\d+")).wait_for()
    page.get_by_role("tab").first.click()
    assert "部门主管" in visit.ask("加班需要谁批准？").locator(".answer").inner_text()
    visit.open_sources()
    panel.get_by_role("button", name="停止").click()
    page.get_by_text("已停止，做好的向量已保存。").wait_for()

    panel.get_by_role("button", name="重新生成向量").click()
    panel.get_by_role("button", name="切换回旧模型").wait_for()
    assert re.search("lexical-512.*回答", panel.inner_text(), re.DOTALL)
    page.get_by_role("tab").first.click()
    assert "十天" in visit.ask("入职满一年有几天年假？").locator(".answer").inner_text()

    visit.open_sources()
    panel.get_by_role("button", name="切换回旧模型").click()
    panel.get_by_role("button", name="切换", exact=True).wait_for()
    assert re.search("lexical-1024.*回答，配置的是.*lexical-512", panel.inner_text(), re.DOTALL)


def test_a_second_page_follows_the_change(
    changed: tuple[Visit, RagService], browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, _ = changed
    gate = threading.Event()
    before_each_batch(monkeypatch, lambda: gate.wait(30))
    visit.open_sources()
    visit.page.get_by_role("button", name="重新生成向量").click()
    visit.page.wait_for_selector(".embedder progress")
    other = Visit(browser, visit.page.url, width=390, height=844)
    other.open_sources()
    other.page.wait_for_selector(".embedder progress")
    assert other.page.evaluate("document.documentElement.scrollWidth") <= 390
    gate.set()
    for page in (visit.page, other.page):
        page.get_by_role("button", name="切换回旧模型").wait_for()
    other.end()


def before_each_batch(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Have something done before each batch of a change."""
    original = LexicalEmbeddings.embed_documents_array

    def embed(embeddings: LexicalEmbeddings, texts: Any) -> Any:
        if len(texts) > 100:
            do()
        return original(embeddings, texts)

    monkeypatch.setattr(LexicalEmbeddings, "embed_documents_array", embed)


def test_the_same_text_under_two_names_is_cited_under_both(browser: Any, service: Any) -> None:
    service.also_in = [{"source": "/kb/旧版/handbook.txt", "title": "旧版手册"}]
    app, address = serve(service, EXAMPLES)
    visit = Visit(browser, address)
    turn = visit.ask("加班须谁批准？")
    assert "另见 1 处" in turn.locator(".citations").inner_text()
    turn.locator("button.cite").first.click()
    visit.page.wait_for_selector(".passage mark")
    assert "/kb/旧版/handbook.txt" in visit.page.locator(".passage .also").inner_text()
    visit.end()
    app.close(verbose=False)


# ---------------------------------------------------------------- the README's picture


@pytest.mark.skipif(
    not os.environ.get("RAGPROJ_SCREENSHOT"), reason="writes docs/images/chat.png: RAGPROJ_SCREENSHOT=1"
)
def test_the_readme_shows_this_page(browser: Any) -> None:
    folder = Path("/tmp/公司文档")  # the picture shows it
    folder.mkdir()
    try:
        with open_site(folder) as address:
            visit = Visit(browser, address)
            visit.ask("加班需要谁批准？")
            visit.ask("入职满一年有几天年假？").locator("button.cite").first.click()
            visit.page.wait_for_selector(".passage mark")
            visit.page.wait_for_timeout(600)
            target = ROOT / "docs" / "images" / "chat.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            visit.page.screenshot(path=target)
            visit.end()
    finally:
        shutil.rmtree(folder)
