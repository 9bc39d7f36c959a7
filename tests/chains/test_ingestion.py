"""Ingestor: files into a knowledge base, each at most once, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from chains import ingestion
from chains.checks import check
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor, IngestReport
from chains.knowledge_base import FingerprintError, KnowledgeBase
from chains.knowledge_base_integrity import integrity_problems, wrong_offsets
from chains.retrievers import DenseRetriever
from chains.vectorstores import FaissVectorStore, identify
from loaders.documents import LoaderConfig
from loaders.splitters import SplitterConfig

ROOT = Path(__file__).resolve().parents[2]


class Counting(Embeddings):
    """Remembers what it embedded; the vector counts a text's characters by code point."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.fail_on = ""

    def embed_query(self, text: str) -> list[float]:
        vector = np.ones(16)
        for character in text:
            vector[ord(character) % 16] += 1
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.fail_on and any(self.fail_on in text for text in texts):
            raise RuntimeError("the embedding server is gone")
        self.texts += texts
        return [self.embed_query(text) for text in texts]

    def taken(self) -> list[str]:
        """Texts embedded since the last call, without the probe."""
        texts, self.texts = [text for text in self.texts if text != ingestion_probe()], []
        return texts


def ingestion_probe() -> str:
    from chains.embeddings import PROBE

    return PROBE


class Bench:
    """A folder of documents, a knowledge base beside it, and an embedder that counts."""

    def __init__(self, folder: Path) -> None:
        self.docs = folder / "docs"
        self.docs.mkdir()
        self.kb = KnowledgeBase(folder / "kb", create=True)
        self.embedder = Counting()
        self.store = FaissVectorStore(self.embedder, self.kb)
        self.fulltext = FullTextIndex(self.kb)

    def write(self, name: str, text: str) -> Path:
        path = self.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def ingestor(self, **options: Any) -> Ingestor:
        return Ingestor(self.store, self.fulltext, **options)

    def ingest(self, *paths: Path, **options: Any) -> IngestReport:
        return self.ingestor().ingest(list(paths) or [self.docs], **options)

    def texts(self) -> list[str]:
        return [chunk.text for chunk in self.kb.chunks(self.kb.chunk_ids().tolist()).values()]

    def rows(self) -> dict[str, int]:
        with sqlite3.connect(self.kb.path / "kb.sqlite") as connection:
            return {
                table: connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
                for table in ("sources", "contents", "documents", "chunks", "vectors")
            }


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.kb.close()


def outcome(report: IngestReport) -> dict[str, int]:
    return {"added": report.added, "updated": report.updated, "unchanged": report.unchanged,
            "failed": len(report.failed)}  # fmt: skip


def touch(path: Path, seconds: int) -> None:
    stamp = path.stat().st_mtime_ns + seconds * 10**9
    os.utime(path, ns=(stamp, stamp))


# -- what is counted ---------------------------------------------------------------------------------------------


def test_new_changed_and_unchanged_files_are_counted(bench: Bench) -> None:
    first, _ = bench.write("a.txt", "第一份文件。"), bench.write("sub/b.md", "# 第二份\n\n文件。")
    assert outcome(bench.ingest()) == {"added": 2, "updated": 0, "unchanged": 0, "failed": 0}
    assert outcome(bench.ingest()) == {"added": 0, "updated": 0, "unchanged": 2, "failed": 0}
    first.write_text("第一份文件，改过了。", encoding="utf-8")
    bench.write("c.txt", "第三份。")
    report = bench.ingest()
    assert outcome(report) == {"added": 1, "updated": 1, "unchanged": 1, "failed": 0}
    assert report.chunks == 2
    assert report.seconds > 0
    assert sorted(bench.texts()) == sorted(["第一份文件，改过了。", "# 第二份\n\n文件。", "第三份。"])


def test_the_report_is_what_ingest_json_prints(bench: Bench) -> None:
    bench.write("a.txt", "文件。")
    report = bench.ingest(bench.docs, bench.docs / "missing.txt").as_dict()
    assert list(report) == ["added", "updated", "unchanged", "removed", "failed", "chunks", "cut", "seconds"]
    assert json.loads(json.dumps(report)) == report
    (failed,) = report["failed"]
    assert failed["path"] == str(bench.docs / "missing.txt")
    assert "missing.txt" in failed["reason"]


def test_an_empty_folder_is_no_error(bench: Bench) -> None:
    assert outcome(bench.ingest()) == {"added": 0, "updated": 0, "unchanged": 0, "failed": 0}
    assert bench.ingest().as_dict()["chunks"] == 0


def test_a_path_given_twice_is_read_once(bench: Bench) -> None:
    path = bench.write("a.txt", "文件。")
    assert outcome(bench.ingest(bench.docs, path, path)) == {"added": 1, "updated": 0, "unchanged": 0, "failed": 0}


def test_sources_are_absolute_wherever_the_command_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.write("a.txt", "文件。")
    monkeypatch.chdir(bench.docs)
    assert bench.ingest(Path("a.txt")).added == 1
    monkeypatch.chdir(bench.docs.parent)
    assert bench.ingest(Path("docs/../docs")).unchanged == 1
    assert bench.kb.source_names() == [str(path)]
    (chunk,) = bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()
    assert chunk.metadata["source"] == chunk.source == str(path)


# -- unchanged ---------------------------------------------------------------------------------------------------


def test_an_unchanged_file_is_not_even_opened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("a.txt", "文件。")
    bench.ingest()
    revision = bench.kb.revision()

    def refuse(*_: object) -> None:
        raise AssertionError("an unchanged file was read")

    monkeypatch.setattr(ingestion, "load_documents", refuse)
    monkeypatch.setattr(ingestion, "_with_hash", refuse)
    assert bench.ingest().unchanged == 1
    assert bench.kb.revision() == revision


def test_a_touched_file_is_hashed_once_and_not_parsed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.write("a.txt", "文件。")
    bench.ingest()
    bench.embedder.taken()
    touch(path, 60)
    revision, ids = bench.kb.revision(), bench.kb.chunk_ids().tolist()
    assert outcome(bench.ingest()) == {"added": 0, "updated": 0, "unchanged": 1, "failed": 0}
    assert (bench.kb.revision(), bench.kb.chunk_ids().tolist(), bench.embedder.taken()) == (revision, ids, [])
    monkeypatch.setattr(ingestion, "_with_hash", None)
    assert bench.ingest().unchanged == 1


def test_same_size_and_another_time_with_other_content_is_read(bench: Bench) -> None:
    path = bench.write("a.txt", "甲文件。")
    bench.ingest()
    path.write_text("乙文件。", encoding="utf-8")
    touch(path, 60)
    assert bench.ingest().updated == 1
    assert bench.texts() == ["乙文件。"]


def test_other_settings_read_every_file_again(bench: Bench) -> None:
    bench.write("a.txt", "一句话。" * 40)
    bench.ingest()
    small = bench.ingestor(splitter=SplitterConfig(chunk_size=32))
    assert small.ingest([bench.docs]).updated == 1
    assert bench.kb.chunk_count() >= 5
    assert small.ingest([bench.docs]).unchanged == 1
    assert bench.ingestor(loader=LoaderConfig(timeout_s=30)).ingest([bench.docs]).updated == 1


# -- what is embedded --------------------------------------------------------------------------------------------


def records(*texts: str) -> str:
    return "".join(json.dumps({"id": f"r{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(texts))


def test_only_chunks_whose_text_changed_are_embedded_again(bench: Bench) -> None:
    texts = [f"第{number}条内容。" for number in range(10)]
    path = bench.write("a.jsonl", records(*texts))
    bench.ingest()
    assert len(bench.embedder.taken()) == 10
    before = stored_vectors(bench)
    texts[4] = "改过的一条。"
    path.write_text(records(*texts), encoding="utf-8")
    assert bench.ingest().updated == 1
    (embedded,) = bench.embedder.taken()
    assert embedded.endswith("改过的一条。")
    after = stored_vectors(bench)
    assert all(np.array_equal(before[text], after[text]) for text in before.keys() & after.keys())
    assert len(before.keys() & after.keys()) == 9


def stored_vectors(bench: Bench) -> dict[str, Any]:
    ids = bench.kb.chunk_ids()
    texts = {number: chunk.text for number, chunk in bench.kb.chunks(ids.tolist()).items()}
    return {texts[int(i)]: row for batch, rows in bench.kb.vectors(1, ids) for i, row in zip(batch, rows, strict=True)}


def test_a_changed_record_costs_no_look_at_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"第{number}条内容。" for number in range(300)]
    path = bench.write("a.jsonl", records(*texts))
    bench.ingest()
    texts[4] = "改过的一条。"
    path.write_text(records(*texts), encoding="utf-8")
    read: list[int] = []
    index_texts, vectors = bench.kb.index_texts, bench.kb.vectors

    def counted_texts(ids: Any) -> Any:
        read.extend(ids)
        return index_texts(ids)

    def counted_vectors(generation: int, ids: Any) -> Any:
        read.extend(ids)
        return vectors(generation, ids)

    monkeypatch.setattr(bench.kb, "index_texts", counted_texts)
    monkeypatch.setattr(bench.kb, "vectors", counted_vectors)
    for name in ("save_caches", "compact_caches"):  # indexes of so few chunks are written anew
        monkeypatch.setattr(Ingestor, name, lambda _: None)
    assert bench.ingest().updated == 1
    assert sorted({int(i) for i in read}) == [5, 301]  # the old record and the new one


def test_a_document_of_many_chunks_keeps_its_vectors_batch_by_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 8)
    paragraphs = [f"第{number}段，" + f"讲第{number}件事的办法。" * 20 for number in range(40)]
    path = bench.write("a.txt", "\n\n".join(paragraphs))
    bench.ingestor(splitter=SplitterConfig(chunk_size=160)).ingest([bench.docs])
    assert len(bench.embedder.taken()) >= 40
    path.write_text("\n\n".join([*paragraphs[:20], "新的一段。" * 30, *paragraphs[20:]]), encoding="utf-8")
    bench.ingestor(splitter=SplitterConfig(chunk_size=160)).ingest([bench.docs])
    assert 1 <= len(bench.embedder.taken()) <= 4


def test_a_paragraph_put_in_front_does_not_embed_the_rest_again(bench: Bench) -> None:
    sections = [f"# 第{number}章\n\n" + f"第{number}章的内容有很多。" * 15 for number in range(8)]
    path = bench.write("a.md", "\n\n".join(sections))
    bench.ingestor(splitter=SplitterConfig(chunk_size=160)).ingest([bench.docs])
    total = len(bench.embedder.taken())
    assert total >= 8
    path.write_text("\n\n".join([sections[0], "# 新的一章\n\n" + "新内容。" * 30, *sections[1:]]), encoding="utf-8")
    bench.ingestor(splitter=SplitterConfig(chunk_size=160)).ingest([bench.docs])
    assert 1 <= len(bench.embedder.taken()) <= 3


def test_new_texts_of_small_files_are_embedded_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    embed = bench.embedder.embed_documents

    def counted(texts: list[str]) -> list[list[float]]:
        if texts != [ingestion_probe()]:
            calls.append([text.split("\n")[-1] for text in texts])
        return embed(texts)

    monkeypatch.setattr(bench.embedder, "embed_documents", counted)
    for name in ("a.txt", "b.txt", "copy_of_b.txt", "c.txt"):
        bench.write(name, f"{name[-5]}文件。")
    assert bench.ingest().chunks == 4
    assert calls.pop() == ["a文件。", "b文件。", "c文件。"]
    bench.write("a.txt", "a文件，改了。")
    bench.write("d.jsonl", records("丁一。", "丁二。"))
    bench.write("stored_like_b.txt", "b文件。")
    assert outcome(bench.ingest()) == {"added": 2, "updated": 1, "unchanged": 3, "failed": 0}
    assert calls == [["a文件，改了。", "丁一。", "丁二。"]]
    assert bench.kb.without_vector(1).tolist() == []


def test_vectors_belong_to_their_texts(bench: Bench) -> None:
    for number in range(5):
        bench.write(f"{number}.jsonl", records(*[f"{number}号文件第{n}条" * (n + 1) for n in range(9)]))
    bench.ingest()
    bench.write("3.jsonl", records(*[f"3号文件第{n}条" * (n + 1) for n in range(9, -1, -1)]))
    bench.ingest()
    ids = bench.kb.chunk_ids()
    indexed = dict(bench.kb.index_texts(ids))
    for batch, rows in bench.kb.vectors(1, ids):
        for chunk, row in zip(batch, rows, strict=True):
            wanted = np.array(bench.embedder.embed_query(indexed[int(chunk)]))
            assert row @ wanted / np.linalg.norm(wanted) == pytest.approx(1, abs=1e-3)


def test_a_chunk_is_no_longer_than_the_embedder_sees(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    class Short(Counting):
        max_tokens = 128

        def count_tokens(self, text: str) -> int:
            return len(text)

    bench.write("a.txt", "一句不长不短的话。" * 100)
    store = FaissVectorStore(Short(), bench.kb)
    Ingestor(store, bench.fulltext, splitter=SplitterConfig(chunk_size=500, chunk_overlap=200)).ingest([bench.docs])
    assert max(map(len, bench.texts())) <= 128
    assert "chunk_size 500 reduced to 32: the embedder sees 128 tokens" in caplog.text


# -- records -----------------------------------------------------------------------------------------------------


def test_records_keep_their_ids_and_places(bench: Bench) -> None:
    path = bench.write("pool.jsonl", records("第一条记录。", "第二条记录。"))
    bench.ingest()
    chunks = bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()
    assert [chunk.metadata["id"] for chunk in chunks] == ["r0", "r1"]
    assert len({chunk.document_id for chunk in chunks}) == 2
    (info,) = bench.kb.sources()
    assert (info.source, info.documents, info.chunks) == (str(path), 2, 2)
    for chunk in chunks:
        text = bench.kb.document_text(chunk.document_id)
        assert text is not None
        assert text[chunk.start : chunk.end] == chunk.text


def test_public_ids_last_when_the_file_is_read_again(bench: Bench) -> None:
    path = bench.write("pool.jsonl", records("第一条记录。", "第二条记录。"))
    bench.ingest()
    before = {chunk.text: chunk.key for chunk in bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()}
    path.write_text(records("第一条记录。", "第二条改了。"), encoding="utf-8")
    bench.ingest()
    after = {chunk.text: chunk.key for chunk in bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()}
    assert after["第一条记录。"] == before["第一条记录。"]
    assert after["第二条改了。"] not in before.values()


def test_chunks_have_public_ids_of_their_own(bench: Bench) -> None:
    bench.write(
        "a.jsonl", '{"title": "同", "text": "同样的记录。"}\n' * 3 + '{"title": "异", "text": "同样的记录。"}\n'
    )
    bench.write("b.txt", "同样的记录。")
    bench.ingest()
    chunks = bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()
    assert len({chunk.key for chunk in chunks}) == len(chunks) == 3
    assert sum(1 + len(chunk.duplicates) for chunk in chunks) == bench.rows()["documents"] == 5


def test_fields_of_a_record_cannot_pass_for_the_loaders_own(bench: Bench) -> None:
    row = {"id": 1, "text": "正文。", "source": "evil", "marks": "x", "start": 9, "headings": "h", "table_header": 5,
           "title": 2024, "sheet": 3, "note": "\ud800"}  # fmt: skip
    path = bench.write("a.jsonl", json.dumps(row) + "\n")
    assert outcome(bench.ingest()) == {"added": 1, "updated": 0, "unchanged": 0, "failed": 0}
    (chunk,) = bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()
    assert (chunk.metadata["source"], chunk.metadata["start"], chunk.metadata["end"]) == (str(path), 0, 3)


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_unreadable_files_are_listed_and_the_others_stored(bench: Bench) -> None:
    bench.write("a.txt", "好文件。")
    bench.write("b.pdf", "这不是 PDF")
    bench.write("c.txt", "")
    bench.write("d.xyz", "未知格式")
    bench.write("e.jsonl", '{"id": 1}\n')
    bench.write("f.txt", "也是好文件。")
    report = bench.ingest(bench.docs, bench.docs / "gone.txt")
    assert outcome(report) == {"added": 2, "updated": 0, "unchanged": 0, "failed": 5}
    assert sorted(Path(failed["path"]).name for failed in report.failed) == [
        "b.pdf", "c.txt", "d.xyz", "e.jsonl", "gone.txt",
    ]  # fmt: skip
    assert all(failed["reason"].count(" / ") >= 1 for failed in report.failed)
    assert sorted(bench.texts()) == ["也是好文件。", "好文件。"]


def test_a_file_that_became_unreadable_keeps_its_old_version(bench: Bench) -> None:
    path = bench.write("a.txt", "旧版本。")
    bench.ingest()
    path.write_text("", encoding="utf-8")
    assert outcome(bench.ingest()) == {"added": 0, "updated": 0, "unchanged": 0, "failed": 1}
    assert bench.texts() == ["旧版本。"]


def test_a_broken_record_in_the_middle_keeps_the_old_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    path = bench.write("a.jsonl", records("旧一。", "旧二。"))
    bench.ingest()
    path.write_text(records("新一。", "新二。", "新三。", "新四。") + "{broken\n", encoding="utf-8")
    report = bench.ingest()
    assert outcome(report) == {"added": 0, "updated": 0, "unchanged": 0, "failed": 1}
    assert "a.jsonl:5" in report.failed[0]["reason"]
    assert bench.texts() == ["旧一。", "旧二。"]
    assert bench.rows() == {"sources": 1, "contents": 2, "documents": 2, "chunks": 2, "vectors": 2}


def test_what_an_interrupted_run_left_goes_when_the_file_cannot_be_read_any_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    path = bench.write("a.jsonl", records("一。", "二。", "毒药。"))
    bench.embedder.fail_on = "毒药"
    with pytest.raises(RuntimeError):
        bench.ingest()
    assert bench.kb.staged_sources() == [str(path)]
    path.write_text("{broken", encoding="utf-8")
    assert len(bench.ingest().failed) == 1
    assert set(bench.rows().values()) == {0}


def test_a_path_too_long_for_the_system_is_a_failed_one_and_the_others_are_stored(bench: Bench) -> None:
    bench.write("a.txt", "甲。")
    report = bench.ingest(bench.docs / ("长" * 200 + ".txt"), bench.docs, sync=True)
    assert outcome(report) == {"added": 1, "updated": 0, "unchanged": 0, "failed": 1}


def test_a_file_that_vanishes_meanwhile_is_a_failed_one(bench: Bench) -> None:
    bench.write("a.txt", "甲。")
    gone = bench.write("b.txt", "乙。")
    report = bench.ingest(progress=lambda done, total, name: gone.unlink(missing_ok=True))
    assert outcome(report) == {"added": 1, "updated": 0, "unchanged": 0, "failed": 1}


def test_a_name_that_is_not_utf8_does_not_stop_the_others(bench: Bench) -> None:
    """测试.txt in GBK, as an archive from Windows unpacks on Linux."""
    Path(os.fsdecode(os.fsencode(bench.docs) + b"/\xb2\xe2\xca\xd4.txt")).write_text("甲。", encoding="utf-8")
    bench.write("z.txt", "乙。")
    report = bench.ingest()
    assert "乙。" in bench.texts()
    json.dumps(report.as_dict(), ensure_ascii=False).encode("utf-8")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_failed_one(bench: Bench) -> None:
    bench.write("a.txt", "甲。").chmod(0)
    assert len(bench.ingest().failed) == 1


def test_the_knowledge_bases_own_files_are_not_documents(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write("a.txt", "甲。")
    for _ in range(3):
        report = bench.ingest(tmp_path)
    assert outcome(report) == {"added": 0, "updated": 0, "unchanged": 1, "failed": 0}
    assert len(bench.kb.source_names()) == 1
    bench.kb.close()


def test_they_are_not_where_the_path_goes_up_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("a.txt", "甲。")
    work = bench.docs.parent / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with KnowledgeBase(Path("../docs/kb"), create=True) as kb:
        (bench.docs / "kb" / "notes.txt").write_text("不是文档。", encoding="utf-8")
        ingestor = Ingestor(FaissVectorStore(bench.embedder, kb), FullTextIndex(kb))
        report = ingestor.ingest([bench.docs])
        assert outcome(report) == {"added": 1, "updated": 0, "unchanged": 0, "failed": 0}
        assert kb.source_names() == [str(bench.docs / "a.txt")]


def test_another_embedder_is_refused_and_nothing_is_written(bench: Bench) -> None:
    bench.write("a.txt", "甲。")
    bench.ingest()
    rows = bench.rows()
    bench.write("b.txt", "乙。")
    other = FaissVectorStore(DeterministicFakeEmbedding(size=16), bench.kb)
    with pytest.raises(FingerprintError, match=r"Counting.*DeterministicFakeEmbedding"):
        Ingestor(other, bench.fulltext).ingest([bench.docs])
    assert bench.rows() == rows


def test_an_embedder_that_fails_in_the_middle_leaves_the_old_version(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    path = bench.write("b.jsonl", records("旧一。", "旧二。"))
    bench.write("a.txt", "别的文件。")
    bench.ingest()
    path.write_text(records("新一。", "新二。", "新三。", "毒药。", "新五。"), encoding="utf-8")
    bench.write("a.txt", "别的文件，也改了。")
    bench.embedder.fail_on = "毒药"
    with pytest.raises(RuntimeError, match="the embedding server is gone"):
        bench.ingest()
    assert sorted(bench.texts()) == ["别的文件，也改了。", "旧一。", "旧二。"]
    bench.embedder.fail_on = ""
    bench.embedder.taken()
    assert outcome(bench.ingest()) == {"added": 0, "updated": 1, "unchanged": 1, "failed": 0}
    assert [text.split("\n")[-1] for text in bench.embedder.taken()] == ["新三。", "毒药。", "新五。"]
    assert bench.texts()[-5:] == ["新一。", "新二。", "新三。", "毒药。", "新五。"]
    assert bench.rows() == {"sources": 2, "contents": 6, "documents": 6, "chunks": 6, "vectors": 6}


# -- stop, progress, resume --------------------------------------------------------------------------------------


def test_progress_goes_from_nothing_to_all(bench: Bench) -> None:
    for name in ("b.txt", "a.txt"):
        bench.write(name, "文件。")
    calls: list[tuple[int, int, str]] = []
    bench.ingest(progress=lambda *call: calls.append(call))
    read, written = [(0, 2, "a.txt"), (0, 2, "b.txt")], [(0, 2, "a.txt"), (1, 2, "b.txt")]
    assert calls == [*read, *written, (2, 2, "")]


def test_stopping_keeps_finished_files_and_resumes_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    bench.write("a.txt", "甲。")
    bench.write("b.jsonl", records(*[f"第{number}条。" for number in range(9)]))
    bench.write("c.txt", "丙。")
    stop = threading.Event()
    embed = bench.embedder.embed_documents

    def embed_and_stop(texts: list[str]) -> list[list[float]]:
        if any("第3条" in text for text in texts):
            stop.set()
        return embed(texts)

    monkeypatch.setattr(bench.embedder, "embed_documents", embed_and_stop)
    report = bench.ingest(stop=stop)
    assert outcome(report) == {"added": 1, "updated": 0, "unchanged": 0, "failed": 0}
    assert bench.texts() == ["甲。"]
    bench.embedder.taken()
    assert outcome(bench.ingest()) == {"added": 2, "updated": 0, "unchanged": 1, "failed": 0}
    assert len(bench.embedder.taken()) == 6  # five records left and one file
    assert bench.rows() == {"sources": 3, "contents": 11, "documents": 11, "chunks": 11, "vectors": 11}


def test_a_resumed_file_reports_all_its_chunks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    bench.write("b.jsonl", records("一。", "二。", "三。", "毒药。"))
    bench.embedder.fail_on = "毒药"
    with pytest.raises(RuntimeError):
        bench.ingest()
    bench.embedder.fail_on = ""
    assert bench.ingest().chunks == 4


def test_a_file_changed_since_the_interruption_starts_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    bench.write("b.jsonl", records("旧一。", "旧二。", "毒药。"))
    bench.embedder.fail_on = "毒药"
    with pytest.raises(RuntimeError):
        bench.ingest()
    bench.write("b.jsonl", records("新一。", "新二。", "新三。"))
    assert bench.ingest().added == 1
    assert bench.texts() == ["新一。", "新二。", "新三。"]
    assert bench.rows()["documents"] == 3


def test_one_big_document_can_be_stopped_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 4)
    bench.write("big.txt", "".join(f"第{number}句话，讲的是第{number}件事。\n\n" for number in range(3000)))
    stop = threading.Event()
    embedded: list[int] = []

    def embed_and_stop(texts: list[str]) -> list[list[float]]:
        if ingestion_probe() not in texts:
            embedded.append(len(texts))
            stop.set()
        return [[1.0] * 16 for _ in texts]

    monkeypatch.setattr(bench.embedder, "embed_documents", embed_and_stop)
    bench.ingest(stop=stop)
    assert max(embedded) < 100
    assert bench.kb.chunk_count() == 0


def test_a_file_of_many_records_stops_while_it_is_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("a.jsonl", records(*[f"第{number}条。" for number in range(100)]))
    stop, cut = threading.Event(), []
    split = ingestion.split_document

    def split_and_stop(document: Document, *options: Any) -> list[Document]:
        stop.set()
        cut.append(document)
        return split(document, *options)

    monkeypatch.setattr(ingestion, "split_document", split_and_stop)
    assert bench.ingest(stop=stop).added == 0
    assert len(cut) == 1


INGESTING = """
import sys
from pathlib import Path
from chains import ingestion
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.knowledge_base import KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings
from chains.vectorstores import FaissVectorStore
ingestion._BATCH_CHUNKS = 20
kb = KnowledgeBase(sys.argv[1], create=True)
print("ready", flush=True)
Ingestor(FaissVectorStore(LexicalEmbeddings(dimensions=64), kb), FullTextIndex(kb)).ingest([Path(sys.argv[2])])
print("done", flush=True)
"""


def test_two_processes_ingesting_the_same_folder_store_each_file_once(tmp_path: Path) -> None:
    docs, folder = tmp_path / "docs", tmp_path / "kb"
    docs.mkdir()
    for number in range(10):
        (docs / f"{number}.txt").write_text(f"第{number}号文件。", encoding="utf-8")
    command = [sys.executable, "-c", textwrap.dedent(INGESTING), str(folder), str(docs)]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == "ready\ndone\n"
    with KnowledgeBase(folder) as kb:
        assert len(kb.source_names()) == kb.chunk_count() == 10
        assert len(FullTextIndex(kb).search("文件", 100)) == 10


# -- found afterwards --------------------------------------------------------------------------------------------


def test_caches_are_saved_and_current_after_an_ingest(bench: Bench) -> None:
    bench.write("a.txt", "劳动合同。")
    bench.ingest()
    cache = (bench.kb.path / "faiss-1.index").read_bytes()
    state = (bench.kb.path / "fulltext.state").read_bytes()
    assert len(bench.store.similarity_search("合同", k=5)) == 1
    assert len(FullTextIndex(bench.kb).search("合同", 5)) == 1
    bench.ingest()
    assert (bench.kb.path / "faiss-1.index").read_bytes() == cache
    assert (bench.kb.path / "fulltext.state").read_bytes() == state


# -- equal documents -------------------------------------------------------------------------------------------------

LETTER = "# 通知\n\n各部门应当在月底之前提交年度工作总结。"


def retrieved(bench: Bench, query: str, **options: Any) -> list[Document]:
    return DenseRetriever(store=bench.store, top_k=5, **options).invoke(query)


def test_copies_are_stored_and_embedded_once_and_found_under_each(bench: Bench) -> None:
    paths = [bench.write(name, LETTER) for name in ("a.md", "b/a.md", "c/另一个名字.md")]
    assert outcome(bench.ingest()) == {"added": 3, "updated": 0, "unchanged": 0, "failed": 0}
    assert len(bench.embedder.taken()) == 1
    assert bench.rows() == {"sources": 3, "contents": 1, "documents": 3, "chunks": 1, "vectors": 1}
    (found,) = retrieved(bench, "年度工作总结")
    names = [found.metadata["source"], *(other["source"] for other in found.metadata["also_in"])]
    assert sorted(names) == sorted(str(path) for path in paths)
    for path in paths:
        (found,) = retrieved(bench, "年度工作总结", filter={"source": str(path)})
        assert found.metadata["source"] == str(path)
        assert "also_in" not in found.metadata  # the filter leaves the others out
        (info,) = [info for info in bench.kb.sources() if info.source == str(path)]
        assert (info.documents, info.chunks, info.characters) == (1, 1, len(LETTER))


def test_a_copy_has_the_name_of_its_own_file_as_title(bench: Bench) -> None:
    bench.write("甲.txt", "没有标题的正文。")
    bench.write("乙.txt", "没有标题的正文。")
    bench.ingest()
    assert {Path(info.source).stem: info.title for info in bench.kb.sources()} == {"甲": "甲", "乙": "乙"}
    (found,) = retrieved(bench, "正文")
    assert {found.metadata["title"], *(other["title"] for other in found.metadata["also_in"])} == {"甲", "乙"}


def test_a_copy_outlives_the_file_it_was_first_read_from(bench: Bench) -> None:
    first, second = bench.write("a.md", LETTER), bench.write("b.md", LETTER)
    bench.ingest()
    bench.embedder.taken()
    bench.kb.writer().remove_sources([str(first)])
    (found,) = retrieved(bench, "年度工作总结")
    assert found.metadata["source"] == str(second)
    assert "also_in" not in found.metadata
    assert len(FullTextIndex(bench.kb).search("年度工作总结", 5)) == 1
    second.write_text("改过了，与别的文件不再相同。", encoding="utf-8")
    bench.write("a.md", LETTER)
    bench.ingest()
    assert sorted(bench.texts()) == sorted(["改过了，与别的文件不再相同。", LETTER])
    bench.kb.writer().remove_sources([str(first), str(second)])
    assert set(bench.rows().values()) == {0}
    assert retrieved(bench, "年度工作总结") == []


SECRET = "张三辞退通知"


def everything_stored(kb: KnowledgeBase) -> bytes:
    """The bytes of the database and of its log."""
    return b"".join(path.read_bytes() for path in sorted(kb.path.glob("kb.sqlite*")))


@pytest.mark.parametrize("how", ["removed", "synced", "renamed"])
def test_a_copy_loses_the_name_of_the_file_it_was_first_read_from(bench: Bench, how: str) -> None:
    first, second = bench.write(f"{SECRET}.txt", "没有标题的正文。"), bench.write("范文.txt", "没有标题的正文。")
    bench.ingest()
    assert SECRET.encode() in everything_stored(bench.kb)
    keys = [chunk.key for chunk in bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()]
    if how == "removed":
        bench.ingestor().remove([str(first)])
        bench.ingestor().save_caches()
    else:
        first.rename(bench.docs / "改名.txt") if how == "renamed" else first.unlink()
        assert bench.ingest(sync=True).removed == 1
    assert SECRET.encode() not in everything_stored(bench.kb)
    assert FullTextIndex(bench.kb).search(SECRET, 5) == []
    ((number, chunk),) = bench.kb.chunks(bench.kb.chunk_ids().tolist()).items()
    assert (chunk.source, chunk.title, chunk.key) == (str(second), "范文", keys[0])
    ((_, text),) = bench.kb.index_texts(np.array([number]))
    ((_, vectors),) = bench.kb.vectors(1, np.array([number]))
    wanted = np.array(bench.embedder.embed_query(text))
    assert vectors[0] @ wanted / np.linalg.norm(wanted) == pytest.approx(1, abs=1e-3)
    assert check(bench.store, bench.fulltext).problems == []
    assert len(FullTextIndex(bench.kb).search("范文", 5)) == 1


def test_a_file_that_changes_leaves_its_name_to_no_copy(bench: Bench) -> None:
    first, second = bench.write(f"{SECRET}.txt", "没有标题的正文。"), bench.write("范文.txt", "没有标题的正文。")
    bench.ingest()
    first.write_text("改过的正文。", encoding="utf-8")
    assert bench.ingest().updated == 1
    titles = {chunk.source: chunk.title for chunk in bench.kb.chunks(bench.kb.chunk_ids().tolist()).values()}
    assert titles == {str(first): SECRET, str(second): "范文"}
    assert check(bench.store, bench.fulltext).problems == []


def test_records_that_stay_in_a_changed_file_keep_their_chunks(bench: Bench) -> None:
    path = bench.write("a.jsonl", records("一条。", "二条。"))
    bench.write("b.jsonl", records("一条。"))
    bench.ingest()
    before = bench.kb.chunk_ids_of(str(bench.docs / "b.jsonl")).tolist()
    path.write_text(records("一条。", "二条，改了。"), encoding="utf-8")
    bench.ingest()
    assert bench.kb.chunk_ids_of(str(bench.docs / "b.jsonl")).tolist() == before


def test_changing_one_copy_leaves_the_other_as_it_was(bench: Bench) -> None:
    first, second = bench.write("a.md", LETTER), bench.write("b.md", LETTER)
    bench.ingest()
    first.write_text(LETTER + "新的一句。", encoding="utf-8")
    assert outcome(bench.ingest()) == {"added": 0, "updated": 1, "unchanged": 1, "failed": 0}
    for path, text in ((first, LETTER + "新的一句。"), (second, LETTER)):
        (chunk,) = bench.kb.chunks(bench.kb.chunk_ids_of(str(path)).tolist()).values()
        assert (chunk.text, chunk.duplicates) == (text, ())


def titled(*texts: str) -> str:
    return records(*texts).replace('"title": ""', '"title": "问答"')


def test_equal_records_keep_their_own_ids(bench: Bench) -> None:
    bench.write("pool.jsonl", titled("同样的记录。", "不同的记录。", "同样的记录。"))
    bench.ingest()
    assert bench.rows() == {"sources": 1, "contents": 2, "documents": 3, "chunks": 2, "vectors": 2}
    assert bench.kb.sources()[0].documents == 3
    (found,) = retrieved(bench, "同样的记录", filter={"id": "r2"})
    assert found.metadata["id"] == "r2"
    (found,) = [hit for hit in retrieved(bench, "同样的记录") if hit.page_content == "同样的记录。"]
    assert (found.metadata["id"], [other["id"] for other in found.metadata["also_in"]]) == ("r0", ["r2"])


def test_a_copy_read_while_the_first_is_half_written_becomes_visible_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 2)
    rows = titled("一条。", "二条。", "三条。", "毒药。")
    first, second = bench.write("a.jsonl", rows), bench.write("b.jsonl", titled("一条。", "二条。"))
    bench.embedder.fail_on = "毒药"
    with pytest.raises(RuntimeError):
        bench.ingest(first)
    assert bench.kb.chunk_count() == 0
    bench.embedder.taken()
    assert bench.ingest(second).added == 1
    assert bench.embedder.taken() == []  # the half-written one has their vectors already
    assert sorted(bench.texts()) == ["一条。", "二条。"]
    assert bench.kb.source_names() == [str(second)]
    assert FullTextIndex(bench.kb).ids().tolist() == bench.kb.chunk_ids().tolist()
    assert len(bench.store.similarity_search("三条", k=9)) == 2


def test_equal_records_without_a_title_are_stored_once_too(bench: Bench) -> None:
    bench.write("a.jsonl", records("同样的记录。"))
    bench.write("b.jsonl", records("另一条。", "同样的记录。"))
    bench.ingest()
    assert bench.rows()["contents"] == 2


# -- several at once -------------------------------------------------------------------------------------------------


class Meanwhile(Counting):
    """Does something once, when the named text is about to be embedded."""

    def __init__(self, text: str, act: Callable[[], object]) -> None:
        super().__init__()
        self.text, self.act = text, act

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.text and any(self.text in text for text in texts):
            self.text = ""
            self.act()
        return super().embed_documents(texts)


def test_a_source_removed_while_it_is_ingested_does_not_stop_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "_BATCH_CHUNKS", 1)  # else all three are embedded before anything is written
    bench.write("a.txt", "甲文件。")
    gone = bench.write("b.txt", "乙文件。")
    bench.write("c.txt", "丙文件。")

    def remove() -> None:
        with KnowledgeBase(bench.kb.path) as other:  # as another process does: it waits for nobody
            started = time.monotonic()
            other.writer().remove_sources([str(gone)])
            assert time.monotonic() - started < 2

    store = FaissVectorStore(Meanwhile("乙文件", remove), bench.kb)
    report = Ingestor(store, bench.fulltext).ingest([bench.docs])
    assert outcome(report) == {"added": 2, "updated": 0, "unchanged": 0, "failed": 1}
    assert "removed while it was being ingested" in report.failed[0]["reason"]
    assert sorted(bench.texts()) == ["丙文件。", "甲文件。"]
    assert bench.rows() == {"sources": 2, "contents": 2, "documents": 2, "chunks": 2, "vectors": 2}
    assert Ingestor(store, bench.fulltext).ingest([bench.docs]).added == 1  # wanted again


def test_vectors_follow_when_the_embedder_is_changed_in_the_middle(bench: Bench) -> None:
    """The web page changes the embedder, and changes back, while the command line ingests."""
    bench.write("a.txt", "甲文件。")
    bench.ingest()
    bench.write("b.txt", "乙文件。")
    kb = bench.kb

    def switch() -> None:
        name, probe = identify(bench.embedder)
        generation = kb.writer().add_generation(name, probe, None)
        ids = kb.chunk_ids()
        kb.writer().add_vectors(generation.id, ids, np.full((len(ids), 16), 0.25, np.float32))
        staged = kb.without_vector(generation.id)
        kb.writer().add_vectors(generation.id, staged, np.full((len(staged), 16), 0.25, np.float32))
        kb.writer().switch_generation(generation.id)

    real = bench.embedder.embed_documents
    done: list[bool] = []

    def embed(texts: list[str]) -> list[list[float]]:
        if any("乙文件" in text for text in texts) and not done:
            done.append(True)
            switch()
        return real(texts)

    bench.embedder.embed_documents = embed  # type: ignore[method-assign]
    assert bench.ingest().added == 1
    answering = kb.generation()
    assert answering is not None
    assert answering.id == 2
    assert kb.without_vector(2).tolist() == []
    assert len(bench.store.similarity_search("文件", k=5)) == 2


COUNTED = """
import os, signal, sys
from pathlib import Path
from langchain_core.embeddings import Embeddings
from chains import ingestion
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.knowledge_base import KnowledgeBase
from chains.vectorstores import FaissVectorStore
class Logging(Embeddings):
    fingerprint = "logging-1"
    def embed_query(self, text):
        return [1.0, 0.0]
    def embed_documents(self, texts):
        known = Path(sys.argv[3]).read_text(encoding="utf-8").count("\\n") if Path(sys.argv[3]).exists() else 0
        if known >= int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        with open(sys.argv[3], "a", encoding="utf-8") as file:
            file.writelines(text.replace("\\n", " ") + "\\n" for text in texts if "Which model" not in text)
        return [[1.0, 0.0] for _ in texts]
ingestion._BATCH_CHUNKS = 10
kb = KnowledgeBase(sys.argv[1], create=True)
report = Ingestor(FaissVectorStore(Logging(), kb), FullTextIndex(kb)).ingest([Path(sys.argv[2])])
assert not report.failed, report
"""


def test_a_killed_ingest_goes_on_in_the_middle_of_a_document_and_embeds_nothing_twice(tmp_path: Path) -> None:
    """One big document and one of many records; killed in the middle of each, then left to finish."""
    docs, log = tmp_path / "docs", tmp_path / "embedded.txt"
    docs.mkdir()
    paragraphs = [f"第{number}条规定，讲的是第{number}件事情的办理办法和期限。" * 8 for number in range(50)]
    (docs / "big.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (docs / "pool.jsonl").write_text(records(*[f"第{number}条记录。" for number in range(45)]), encoding="utf-8")
    kills = 0
    for limit in (30, 70, 10**9):
        command = [sys.executable, "-c", COUNTED, str(tmp_path / "kb"), str(docs), str(log), str(limit)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        kills += result.returncode == -signal.SIGKILL
    assert (kills, result.returncode) == (2, 0)
    embedded = log.read_text(encoding="utf-8").splitlines()
    assert len(embedded) == len(set(embedded)) >= 95
    with KnowledgeBase(tmp_path / "kb") as kb:
        assert kb.chunk_count() == len(embedded)
        assert kb.without_vector(1).tolist() == []
        assert (integrity_problems(kb), wrong_offsets(kb)) == ([], [])


@pytest.mark.parametrize("same", [True, False], ids=["the same file", "different files"])
def test_two_processes_ingest_big_files_at_once(tmp_path: Path, same: bool) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in "ab":
        rows = records(*[f"{name}文件的第{number}条规定。" for number in range(150)])
        (docs / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    code = textwrap.dedent(INGESTING)
    targets = ["a.jsonl", "a.jsonl"] if same else ["a.jsonl", "b.jsonl"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "kb"), str(docs / target)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for target in targets
    ]  # fmt: skip
    for process in running:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "ready\ndone\n"), err
    with KnowledgeBase(tmp_path / "kb") as kb:
        assert kb.source_names() == sorted({str(docs / target) for target in targets})
        assert [(info.documents, info.chunks) for info in kb.sources()] == [(150, 150)] * len(set(targets))
        assert len(FullTextIndex(kb).search("规定", 1000)) == kb.chunk_count() == 150 * len(set(targets))
        assert (integrity_problems(kb), wrong_offsets(kb)) == ([], [])


# -- sync ------------------------------------------------------------------------------------------------------------


def test_sync_removes_what_disappeared_from_the_folder_and_nothing_else(bench: Bench, tmp_path: Path) -> None:
    gone, stays = bench.write("sub/a.txt", "甲文件。"), bench.write("b.txt", "乙文件。")
    elsewhere = tmp_path / "docs2"
    elsewhere.mkdir()
    (elsewhere / "c.txt").write_text("丙文件。", encoding="utf-8")
    bench.ingest(bench.docs, elsewhere)
    bench.store.add_texts(["来自 Python"], [{"source": str(bench.docs / "python")}])
    gone.unlink()
    assert bench.ingest().removed == 0  # only when asked for
    report = bench.ingest(sync=True)
    assert (report.removed, report.unchanged) == (1, 1)
    assert set(bench.kb.source_names()) == {str(stays), str(elsewhere / "c.txt"), str(bench.docs / "python")}
    assert bench.ingest(sync=True).removed == 0


def test_sync_keeps_a_file_that_is_there_and_became_unreadable(bench: Bench) -> None:
    path = bench.write("a.txt", "甲文件。")
    bench.ingest()
    path.write_text("", encoding="utf-8")
    report = bench.ingest(sync=True)
    assert (report.removed, len(report.failed)) == (0, 1)
    assert bench.texts() == ["甲文件。"]


def test_sync_of_a_single_file_or_a_missing_folder_removes_nothing(bench: Bench) -> None:
    path = bench.write("a.txt", "甲文件。")
    bench.write("b.txt", "乙文件。")
    bench.ingest()
    assert bench.ingest(path, sync=True).removed == 0
    report = bench.ingest(bench.docs.parent / "gone", sync=True)
    assert (report.removed, len(report.failed)) == (0, 1)
    assert len(bench.kb.source_names()) == 2


def test_sync_keeps_what_others_add_and_ingest_meanwhile(bench: Bench) -> None:
    bench.write("a.txt", "甲文件。")

    def another_run(done: int, total: int, name: str) -> None:
        if name == "a.txt" and not (bench.docs / "b.txt").exists():
            added = bench.write("b.txt", "乙文件。")
            with KnowledgeBase(bench.kb.path) as kb:  # as another process does
                Ingestor(FaissVectorStore(bench.embedder, kb), FullTextIndex(kb)).ingest([added])

    report = bench.ingest(sync=True, progress=another_run)
    assert (report.added, report.removed) == (1, 0)
    assert bench.kb.source_names() == [str(bench.docs / "a.txt"), str(bench.docs / "b.txt")]


def test_sync_keeps_files_that_are_there_and_only_found_by_name(bench: Bench, tmp_path: Path) -> None:
    """Hidden ones, and those below a link to a folder."""
    bench.write("a.txt", "甲文件。")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("丙文件。", encoding="utf-8")
    (bench.docs / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    hidden, linked = bench.write(".b.txt", "乙文件。"), bench.docs / "link" / "c.txt"
    bench.ingest(hidden, linked)
    assert bench.ingest(sync=True).removed == 0
    hidden.unlink()
    (tmp_path / "elsewhere" / "c.txt").unlink()
    assert bench.ingest(sync=True).removed == 2


def test_sync_of_an_emptied_folder_is_no_empty_report(bench: Bench) -> None:
    bench.write("a.txt", "甲文件。").unlink()
    assert bench.ingest(sync=True).is_empty
    path = bench.write("a.txt", "甲文件。")
    bench.ingest()
    path.unlink()
    report = bench.ingest(sync=True)
    assert (report.removed, report.is_empty) == (1, False)


def test_sync_that_is_stopped_removes_nothing(bench: Bench) -> None:
    path = bench.write("a.txt", "甲文件。")
    bench.write("b.txt", "乙文件。")
    bench.ingest()
    path.unlink()
    stop = threading.Event()
    stop.set()
    assert bench.ingest(sync=True, stop=stop).removed == 0
    assert len(bench.kb.source_names()) == 2


def test_what_a_reader_kept_in_the_log_goes_with_the_next_compaction(bench: Bench) -> None:
    path = bench.write(f"{SECRET}.txt", "正文。")
    bench.ingest()
    reader = sqlite3.connect(bench.kb.path / "kb.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT COUNT(*) FROM sources").fetchone() == (1,)
    bench.ingestor().remove([str(path)])
    assert SECRET.encode() in everything_stored(bench.kb)  # he may still look at it
    reader.close()
    bench.ingestor().compact_caches()
    assert SECRET.encode() not in everything_stored(bench.kb)
