"""Uploads at the same time, and what a killed one leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from chains import load_config
from chains.ingestion import Ingestor
from chains.knowledge_base import KnowledgeBaseError
from ui.service import RagService
from ui.uploads import NamesInWork, clear_leftovers, targets


def quiet(done: int, total: int, name: str) -> None:
    """No progress shown."""


def sent(folder: Path, text: str, name: str = "leave.txt") -> Path:
    """A file as the browser leaves it, each in a folder of its own."""
    folder.mkdir()
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RagService]:
    service = RagService(load_config(None, [f"kb={tmp_path / 'kb'}"]), create=True)
    yield service
    service.close()


class Held:
    """The first ingest waits, and then fails; the others go through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.calls = threading.Event(), threading.Event(), 0
        original = Ingestor.ingest

        def ingest(ingestor: Ingestor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 1:
                self.begun.set()
                assert self.go.wait(30)
                raise KnowledgeBaseError("磁盘满", "the disk is full")
            return original(ingestor, *args, **kwargs)

        monkeypatch.setattr(Ingestor, "ingest", ingest)


def test_an_upload_that_fails_takes_nothing_from_the_one_after_it(
    service: RagService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.upload([sent(tmp_path / "0", "年假一共有五天。")], quiet)
    held = Held(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        fails = pool.submit(service.upload, [sent(tmp_path / "1", "年假一共有七天。")], quiet)
        assert held.begun.wait(30)
        later = pool.submit(service.upload, [sent(tmp_path / "2", "年假一共有十天。")], quiet)
        other = pool.submit(lambda: service.upload([sent(tmp_path / "3", "报销。", "other.txt")], quiet))
        assert not later.done(), "it waits for the name"
        held.go.set()
        assert later.result(30)["updated"] == 1
        assert other.result(30)["added"] == 1
        with pytest.raises(KnowledgeBaseError):
            fails.result(30)
    files = service.knowledge_base.path / "files"
    assert sorted(path.name for path in files.iterdir()) == ["leave.txt", "other.txt"]
    assert "十天" in (files / "leave.txt").read_text(encoding="utf-8")


def test_waiting_for_a_name_can_be_stopped(
    service: RagService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, stop = Held(monkeypatch), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        fails = pool.submit(service.upload, [sent(tmp_path / "1", "年假一共有七天。")], quiet)
        assert held.begun.wait(30)
        waits = pool.submit(service.upload, [sent(tmp_path / "2", "年假一共有十天。")], quiet, stop)
        stop.set()
        assert waits.result(30)["added"] == 0
        held.go.set()
        assert fails.exception(30) is not None
    assert service.sources() == []


def test_other_names_are_not_waited_for() -> None:
    names = NamesInWork()
    with names.claimed([Path("a"), Path("b")]) as first, names.claimed([Path("c")]) as second:
        assert (first, second) == (True, True)
        stop = threading.Event()
        stop.set()
        with names.claimed([Path("b"), Path("d")], stop) as third, names.claimed([Path("d")]) as fourth:
            assert (third, fourth) == (False, True)
    with names.claimed([Path("a")]) as again:
        assert again


def test_a_document_removed_while_its_new_version_fails_does_not_come_back(
    service: RagService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.upload([sent(tmp_path / "0", "年假一共有五天。")], quiet)
    held = Held(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        fails = pool.submit(service.upload, [sent(tmp_path / "1", "年假一共有七天。")], quiet)
        assert held.begun.wait(30)
        service.remove([row.source for row in service.sources()])
        held.go.set()
        assert fails.exception(30) is not None
    assert list((service.knowledge_base.path / "files").iterdir()) == []


def test_files_of_one_name_get_numbers(tmp_path: Path) -> None:
    paths = [Path("1/a.txt"), Path("2/a.txt"), Path("3/a.txt"), Path("a (2).txt")]
    assert [target.name for target in targets(paths, tmp_path)] == [
        "a.txt", "a (2).txt", "a (3).txt", "a (2) (2).txt",
    ]  # fmt: skip


def test_what_a_killed_upload_left_goes_with_the_next_start_and_what_is_in_progress_stays(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}"])
    RagService(config, create=True).close()
    files = tmp_path / "kb" / "files"
    dead, alive, old = files / f".{'0' * 32}", files / f".{'a' * 32}", files / f".{'b' * 32}"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "upload.lock").touch()
        (folder / ("c" * 32)).write_text("年假", encoding="utf-8")
    old.write_text("年假", encoding="utf-8")
    (files / ".note").write_text("mine", encoding="utf-8")
    with FileLock(alive / "upload.lock"):
        RagService(config).close()
    assert sorted(path.name for path in files.iterdir()) == [alive.name, ".note"]
    clear_leftovers(tmp_path / "nowhere")
