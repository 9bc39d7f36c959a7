"""reembed: the old vectors answer until the new ones are complete; killed, it goes on; the last ones are kept."""

from __future__ import annotations

import contextlib
import json
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from langchain_core.embeddings import Embeddings

from chains import reembedding
from chains.checks import check
from chains.embeddings import PROBE
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor, StoppedError
from chains.knowledge_base import FingerprintError, KnowledgeBase, KnowledgeBaseError
from chains.knowledge_base_writer import Writer
from chains.reembedding import discard, reembed
from chains.retrievers import HybridRetriever
from chains.vectorstores import FaissVectorStore
from ui import cli

BATCH = 8


class Model(Embeddings):
    """Vectors of its own for every name; calls `during` before each batch."""

    def __init__(self, name: str, dimensions: int = 16) -> None:
        self.fingerprint = f"test/{name}"
        self._salt, self._dimensions = zlib.crc32(name.encode()), dimensions
        self.texts: list[str] = []
        self.during: Callable[[], object] = lambda: None

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(self._dimensions)
        for start in range(len(text)):
            vector[zlib.crc32(text[start : start + 2].encode(), self._salt) % self._dimensions] += 1
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        new = [text for text in texts if text != PROBE]
        if new:
            self.during()
        self.texts += new
        return [self.embed_query(text) for text in texts]


class Bench:
    """A knowledge base of 30 documents by the model "old"."""

    def __init__(self, folder: Path) -> None:
        self.docs = folder / "docs"
        self.docs.mkdir()
        for number in range(30):
            self.write(f"{number:02}.txt", f"第{number}条 规定{number * 7}")
        self.kb = KnowledgeBase(folder / "kb", create=True)
        self.old, self.new = Model("old"), Model("new", 24)
        self.ingest(self.old)
        self.old.texts.clear()

    def write(self, name: str, text: str) -> Path:
        path = self.docs / name
        path.write_text(text, encoding="utf-8")
        return path

    def store(self, model: Model) -> FaissVectorStore:
        return FaissVectorStore(model, self.kb)

    def ingest(self, model: Model) -> None:
        Ingestor(self.store(model), FullTextIndex(self.kb)).ingest([self.docs], sync=True)

    def problems(self, model: Model) -> list[str]:
        return check(self.store(model), FullTextIndex(self.kb)).problems

    def answering(self) -> str:
        generation = self.kb.generation()
        assert generation is not None
        return generation.fingerprint

    def files(self) -> set[str]:
        return {path.name for path in self.kb.path.glob("faiss-*")}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(reembedding, "_BATCH_CHUNKS", BATCH)
    return Bench(tmp_path)


# -- the change ----------------------------------------------------------------------------------------------------


def test_every_chunk_gets_one_new_vector_and_the_new_ones_answer(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    report = reembed(bench.store(bench.new), progress=lambda done, total: seen.append((done, total)))
    assert (report.embedded, report.switched, report.fingerprint) == (30, True, "test/new")
    assert sorted(bench.new.texts) == sorted({*bench.new.texts})
    assert len(bench.new.texts) == 30
    assert bench.old.texts == []
    assert seen == [(0, 30), (8, 30), (16, 30), (24, 30), (30, 30)]
    assert bench.answering() == "test/new"
    assert bench.problems(bench.new) == []


def test_the_embedder_in_use_changes_nothing(bench: Bench) -> None:
    revision = bench.kb.revision()
    report = reembed(bench.store(bench.old))
    assert (report.switched, report.embedded) == (False, 0)
    assert bench.kb.revision() == revision
    assert bench.old.texts == []


def test_an_empty_knowledge_base_says_ingest(tmp_path: Path) -> None:
    kb = KnowledgeBase(tmp_path / "kb", create=True)
    with pytest.raises(KnowledgeBaseError, match="ragproj ingest"):
        reembed(FaissVectorStore(Model("any"), kb))


def test_the_old_vectors_answer_while_the_new_ones_are_made(bench: Bench) -> None:
    old = bench.store(bench.old)
    fulltext = FullTextIndex(bench.kb)
    hits = []

    def ask() -> None:
        hits.append(old.search_ids(old.embed_query("第7条 规定49"), 1))
        assert HybridRetriever(store=old, fulltext=fulltext).invoke("第7条 规定49")
        assert bench.answering() == "test/old"
        with pytest.raises(FingerprintError):
            bench.store(bench.new).check_embedder()

    bench.new.during = ask
    reembed(bench.store(bench.new))
    assert len(hits) == 4
    assert all(hit == hits[0] for hit in hits)


def test_a_query_store_of_the_old_embedder_still_answers_after_the_switch_but_a_new_one_is_refused(
    bench: Bench,
) -> None:
    old = bench.store(bench.old)
    before = old.search_ids(old.embed_query("第7条"), 3)
    reembed(bench.store(bench.new))
    assert old.search_ids(old.embed_query("第7条"), 3) == before  # its generation is kept
    with pytest.raises(FingerprintError, match="test/new"):
        bench.store(bench.old).search_ids(old.embed_query("第7条"), 3)


def test_a_process_with_the_old_embedder_refuses_to_write_after_the_switch_by_name(bench: Bench) -> None:
    store, fulltext = bench.store(bench.old), FullTextIndex(bench.kb)
    ingestor = Ingestor(store, fulltext)
    bench.write("early.txt", "切换以前")
    ingestor.ingest([bench.docs])
    reembed(bench.store(bench.new))
    bench.write("late.txt", "切换以后")
    with pytest.raises(FingerprintError, match=r"test/new.*test/old"):
        ingestor.ingest([bench.docs])
    with pytest.raises(FingerprintError):
        store.add_texts(["切换以后"])
    assert bench.kb._number("SELECT COUNT(*) FROM sources WHERE source LIKE '%late%' AND active = 1") == 0
    bench.ingest(bench.new)
    assert bench.problems(bench.new) == []
    assert any(name.endswith("late.txt") for name in bench.kb.source_names())


# -- changes meanwhile ---------------------------------------------------------------------------------------------


def test_what_is_ingested_and_removed_meanwhile_is_in_the_new_vectors(bench: Bench) -> None:
    batches = 0

    def change() -> None:
        nonlocal batches
        batches += 1
        bench.write(f"new{batches}.txt", f"新的第{batches}份")
        bench.write("03.txt", f"改过{batches}次")
        (bench.docs / f"{batches + 10}.txt").unlink(missing_ok=True)
        if batches < 8:
            bench.ingest(bench.old)

    bench.new.during = change
    reembed(bench.store(bench.new))
    assert bench.answering() == "test/new"
    assert bench.problems(bench.new) == []
    bench.new.during = lambda: None
    bench.ingest(bench.new)
    assert bench.problems(bench.new) == []
    stored = {Path(name).name for name in bench.kb.source_names()}
    assert stored == {path.name for path in bench.docs.iterdir()}


@pytest.mark.parametrize("moment", ["begin_source", "add_documents", "add_vectors", "activate"])
def test_a_switch_at_any_step_of_an_ingest_leaves_no_chunk_without_a_vector(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The ingest runs with the old embedder; the switch comes right before the step."""
    from chains.knowledge_base_writer import Writer

    step = getattr(Writer, moment)
    switched = threading.Event()

    def switch_first(writer: Writer, *arguments: object) -> object:
        if not switched.is_set():
            switched.set()
            thread = threading.Thread(target=reembed, args=(bench.store(bench.new),))
            thread.start()
            thread.join()
        return step(writer, *arguments)

    bench.write("late.txt", "正在导入的时候切换了")
    monkeypatch.setattr(Writer, moment, switch_first)
    with contextlib.suppress(FingerprintError):
        bench.ingest(bench.old)
    assert switched.is_set()
    assert bench.answering() == "test/new"
    assert bench.problems(bench.new) == []
    monkeypatch.undo()
    bench.ingest(bench.new)
    assert bench.problems(bench.new) == []
    assert bench.kb._number("SELECT COUNT(*) FROM sources WHERE active = 0") == 0
    assert any(name.endswith("late.txt") for name in bench.kb.source_names())


def test_vectors_written_for_a_dropped_generation_do_not_stay(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ingest by the first embedder goes on while two further ones take over and the first generation is dropped."""
    from chains.knowledge_base_writer import Writer

    add, third, switched = Writer.add_vectors, Model("third"), threading.Event()

    def switch_twice(writer: Writer, *arguments: object) -> object:
        if not switched.is_set():
            switched.set()
            for model in (bench.new, third):
                thread = threading.Thread(target=reembed, args=(bench.store(model),))
                thread.start()
                thread.join()
        return add(writer, *arguments)  # type: ignore[arg-type]

    bench.write("late.txt", "正在导入的时候切换了两次")
    monkeypatch.setattr(Writer, "add_vectors", switch_twice)
    with contextlib.suppress(FingerprintError, KnowledgeBaseError):
        bench.ingest(bench.old)
    monkeypatch.undo()
    bench.ingest(third)
    assert bench.problems(third) == []
    generations = {generation.id for generation in bench.kb.generations()}
    assert {key >> 40 for (key,) in bench.kb._rows("SELECT key FROM vectors")} <= generations


# -- stopped, killed, at the same time -----------------------------------------------------------------------------


def test_stopped_it_keeps_what_it_had_and_goes_on_there(bench: Bench) -> None:
    stop = threading.Event()
    bench.new.during = lambda: stop.set() if len(bench.new.texts) >= BATCH else None
    with pytest.raises(StoppedError):
        reembed(bench.store(bench.new), stop=stop)
    assert bench.answering() == "test/old"
    assert bench.problems(bench.old) == []
    assert len(bench.new.texts) == 2 * BATCH
    bench.new.during = lambda: None
    report = reembed(bench.store(bench.new))
    assert report.embedded == 30 - 2 * BATCH
    assert len(bench.new.texts) == len(set(bench.new.texts)) == 30
    assert len(bench.kb.generations()) == 2


def test_a_failing_embedder_leaves_the_old_vectors(bench: Bench) -> None:
    def fail() -> None:
        raise RuntimeError("the embedding server is gone")

    bench.new.during = fail
    with pytest.raises(RuntimeError):
        reembed(bench.store(bench.new))
    assert bench.answering() == "test/old"
    assert bench.problems(bench.old) == []


def test_two_at_a_time_are_refused(bench: Bench) -> None:
    with (
        FileLock(bench.kb.path / "reembed.lock"),
        pytest.raises(KnowledgeBaseError, match=r"另一个进程.*another process"),
    ):
        reembed(bench.store(bench.new))
    assert len(bench.kb.generations()) == 1


def test_an_abandoned_half_made_generation_goes_with_the_next_switch(bench: Bench) -> None:
    stop = threading.Event()
    abandoned = Model("abandoned")
    abandoned.during = stop.set
    with pytest.raises(StoppedError):
        reembed(bench.store(abandoned), stop=stop)
    reembed(bench.store(bench.new))
    assert [generation.fingerprint for generation in bench.kb.generations()] == ["test/old", "test/new"]
    assert bench.kb._number("SELECT COUNT(*) FROM vectors") == 60
    assert bench.problems(bench.new) == []


# -- going back ----------------------------------------------------------------------------------------------------


def test_rollback_embeds_nothing_and_answers_as_before(bench: Bench) -> None:
    old = bench.store(bench.old)
    before = old.search_ids(old.embed_query("第7条"), 5)
    reembed(bench.store(bench.new))
    report = reembed(bench.store(bench.old), rollback=True)
    assert (report.switched, report.embedded, report.fingerprint) == (True, 0, "test/old")
    assert bench.old.texts == []
    again = bench.store(bench.old)
    assert again.search_ids(again.embed_query("第7条"), 5) == before
    assert bench.problems(bench.old) == []


def test_rollback_embeds_only_what_came_since(bench: Bench) -> None:
    reembed(bench.store(bench.new))
    bench.write("since.txt", "以后才有的")
    (bench.docs / "05.txt").unlink()
    bench.ingest(bench.new)
    report = reembed(bench.store(bench.old), rollback=True)
    assert report.embedded == 1
    assert bench.old.texts == ["since\n以后才有的"]  # title and text
    assert bench.problems(bench.old) == []


def test_forth_and_back_and_forth_keeps_both(bench: Bench) -> None:
    reembed(bench.store(bench.new))
    reembed(bench.store(bench.old), rollback=True)
    report = reembed(bench.store(bench.new))
    assert (report.embedded, len(bench.new.texts)) == (0, 30)
    assert bench.problems(bench.new) == []
    assert len(bench.kb.generations()) == 2


def test_rollback_without_an_older_generation_says_so(bench: Bench) -> None:
    with pytest.raises(KnowledgeBaseError, match="no older vectors"):
        reembed(bench.store(bench.new), rollback=True)
    assert len(bench.kb.generations()) == 1


def test_rolling_back_with_the_new_embedder_configured_says_what_to_do(bench: Bench) -> None:
    reembed(bench.store(bench.new))
    with pytest.raises(KnowledgeBaseError, match="test/old"):
        reembed(bench.store(bench.new), rollback=True)


def test_rolling_back_with_a_third_embedder_says_what_to_do(bench: Bench) -> None:
    reembed(bench.store(bench.new))
    with pytest.raises(KnowledgeBaseError, match="test/old"):
        reembed(bench.store(Model("third")), rollback=True)
    assert len(bench.kb.generations()) == 2


def test_a_third_embedder_drops_the_first_generation_with_its_files_and_space(bench: Bench) -> None:
    bench.store(bench.old).save_cache()
    reembed(bench.store(bench.new))
    bench.store(bench.new).save_cache()
    assert {name.split(".")[0] for name in bench.files()} == {"faiss-1", "faiss-2"}
    third = Model("third")
    reembed(bench.store(third))
    bench.store(third).save_cache()
    assert [generation.fingerprint for generation in bench.kb.generations()] == ["test/new", "test/third"]
    assert {name.split(".")[0] for name in bench.files()} == {"faiss-2", "faiss-3"}
    assert bench.kb._number("SELECT COUNT(*) FROM vectors") == 60
    assert bench.kb._number("PRAGMA freelist_count") == 0
    with pytest.raises(KnowledgeBaseError, match="test/new"):
        reembed(bench.store(bench.old), rollback=True)


def test_a_store_whose_generation_was_dropped_refuses_by_name(bench: Bench) -> None:
    old = bench.store(bench.old)
    assert old.search_ids(old.embed_query("第7条"), 1)
    reembed(bench.store(bench.new))
    third = Model("third")
    reembed(bench.store(third))
    bench.write("later.txt", "再后来")
    bench.ingest(third)
    with pytest.raises(FingerprintError, match="test/third"):
        old.search_ids(old.embed_query("第7条"), 1)


def test_a_model_of_the_same_name_with_other_weights_is_another_embedder(bench: Bench) -> None:
    impostor = Model("other weights")
    impostor.fingerprint = "test/old"
    with pytest.raises(FingerprintError):
        bench.store(impostor).check_embedder()
    assert reembed(bench.store(impostor)).switched
    assert bench.problems(impostor) == []


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_changes_over_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("劳动合同期满终止。", encoding="utf-8")
    kb = str(tmp_path / "kb")
    assert cli.main(["ingest", str(tmp_path / "a.txt"), "--kb", kb]) == 0
    assert cli.main(["reembed", "--kb", kb]) == 0
    assert "无需更换" in capsys.readouterr().out
    other = "embeddings.dimensions=512"
    assert cli.main(["search", "合同", "--kb", kb, other]) == 1
    assert "ragproj reembed" in capsys.readouterr().err
    assert cli.main(["reembed", "--kb", kb, other, "--json"]) == 0
    assert '"switched": true' in capsys.readouterr().out
    assert cli.main(["search", "合同", "--kb", kb, other]) == 0
    assert cli.main(["check", "--kb", kb, other]) == 0
    assert cli.main(["reembed", "--rollback", "--kb", kb]) == 0
    assert cli.main(["check", "--kb", kb]) == 0


def test_what_is_ingested_between_the_last_vector_and_the_switch_gets_its_vectors_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch, times = Writer.switch_generation, []

    def ingest_first(writer: Writer, generation: int) -> None:
        if len(times) < 3:
            times.append(generation)
            bench.write(f"new{len(times)}.txt", f"赶来的第{len(times)}条")
            bench.ingest(bench.old)
        switch(writer, generation)

    monkeypatch.setattr(Writer, "switch_generation", ingest_first)
    report = reembed(bench.store(bench.new))
    assert (report.embedded, report.switched, len(times)) == (33, True, 3)
    assert bench.answering() == "test/new"
    assert bench.problems(bench.new) == []


def test_chunks_that_are_too_long_for_the_new_embedder_are_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    class Short(Model):
        max_tokens = 24

        def count_tokens(self, text: str) -> int:
            return len(text)

    bench.write("long.txt", "一个比新模型能看到的更长的片段，它的结尾不在任何向量里。")
    bench.ingest(bench.old)
    reembed(bench.store(Short("short")))
    assert "1 of 31 chunks are longer than the 24 tokens this embedder sees" in caplog.text


def test_discarding_drops_what_a_stopped_change_has_made_and_nothing_else(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    reembed(bench.store(bench.new))
    stop = threading.Event()
    abandoned = Model("abandoned")
    abandoned.during = stop.set
    with pytest.raises(StoppedError):
        reembed(bench.store(abandoned), stop=stop)
    assert len(bench.kb.generations()) == 3
    assert cli.main(["reembed", "--discard", "--json", "--kb", str(bench.kb.path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"discarded": ["test/abandoned"]}
    assert [generation.fingerprint for generation in bench.kb.generations()] == ["test/old", "test/new"]
    assert bench.answering() == "test/new"
    assert bench.problems(bench.new) == []
    reembed(bench.store(bench.old), rollback=True)
    assert discard(bench.kb) == [], "what is kept to go back to stays"


def test_discarding_waits_for_no_change_in_progress(bench: Bench) -> None:
    with FileLock(bench.kb.path / "reembed.lock"), pytest.raises(KnowledgeBaseError, match=r"另一个进程"):
        discard(bench.kb)
