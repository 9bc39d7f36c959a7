"""What the fault tests share: documents, embedders, and a process that forks workers which can be killed.

Run as a script this file is the nursery: everything is imported once, and each worker is a fork of it that starts to
work within a few milliseconds, so that hundreds of kills take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from chains import faiss_index, fulltext, ingestion, reembedding
from chains.checks import check
from chains.embeddings import PROBE
from chains.fulltext import FullTextIndex, query_terms
from chains.ingestion import Ingestor
from chains.knowledge_base import KnowledgeBase
from chains.retrievers import HybridRetriever
from chains.vectorstores import FaissVectorStore
from loaders.documents import LoaderConfig, read_file
from loaders.errors import RagProjError
from loaders.splitters import SplitterConfig
from loaders.text import normalise

DIMENSIONS = 32
SMALL_BATCH = 48  # chunks in a transaction, instead of 512: small documents then have many moments to die in
SPLITTER = SplitterConfig(chunk_size=48, chunk_overlap=8)
GATE_WORD = "绝密"
_WORDS = [
    "工资", "合同", "赔偿", "仲裁", "加班", "休假", "社保", "工伤", "解除", "期限",
    "法院", "证据", "送达", "管辖", "公司", "员工", "协议", "终止", "申请", "裁决",
]  # fmt: skip


class SlowEmbeddings(Embeddings):
    """Vectors that count character pairs, another space for each `model`; writes down what it embeds."""

    def __init__(
        self, model: str = "one", *, log: Path | None = None, delay_s: float = 0.0, gate: tuple[Path, str] | None = None
    ) -> None:
        """
        Args:
            model: part of the fingerprint.
            log: file that gets a line for each embedded text.
            delay_s: seconds a batch takes.
            gate: named pipe and a word; a batch with that word says so in the pipe and never ends.
        """
        self.model, self._log, self._delay_s, self._gate = model, log, delay_s, gate
        self._salt = zlib.crc32(model.encode())
        self.texts: list[str] = []

    @property
    def fingerprint(self) -> str:
        return f"fault-test/{self.model}"

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(DIMENSIONS)
        for start in range(len(text)):
            vector[zlib.crc32(text[start : start + 2].encode(), self._salt) % DIMENSIONS] += 1
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        new = [text for text in texts if text != PROBE]
        if self._gate is not None and any(self._gate[1] in text for text in new):
            self._gate[0].write_text("reached")  # waits for a reader
            signal.pause()
        self.texts += new
        if self._log is not None and new:
            append(self._log, *(str(zlib.crc32(text.encode())) for text in new))
        if self._delay_s and new:
            time.sleep(self._delay_s)
        return [self.embed_query(text) for text in texts]


class Home:
    """An opened knowledge base with its caches."""

    def __init__(self, path: Path, embedder: SlowEmbeddings | None = None, *, create: bool = False) -> None:
        self.kb = KnowledgeBase(path, create=create)
        self.embedder = embedder or SlowEmbeddings()
        self.store = FaissVectorStore(self.embedder, self.kb)
        self.fulltext = FullTextIndex(self.kb)

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        self.kb.close()

    def ingestor(self, splitter: SplitterConfig = SPLITTER) -> Ingestor:
        return Ingestor(self.store, self.fulltext, splitter=splitter)

    def problems(self) -> list[str]:
        return check(self.store, self.fulltext).problems

    def ask(self, question: str, k: int = 5) -> list[Document]:
        return HybridRetriever(store=self.store, fulltext=self.fulltext, top_k=k).invoke(question)

    def both_legs(self, question: str, k: int = 5) -> tuple[list[str], list[str]]:
        """Texts found by vector and by words, which must not hide behind each other."""
        dense = self.store.search_ids(self.store.embed_query(question), k)
        found = [dense, self.fulltext.search(question, k)]
        chunks = self.kb.chunks(i for hits in found for i, _ in hits)
        first, second = ([chunks[i].text for i, _ in hits if i in chunks] for hits in found)
        return first, second

    def texts(self) -> dict[str, list[str]]:
        """Texts of the documents of every source."""
        sql = (
            "SELECT s.source, t.text FROM sources s JOIN documents d ON d.source_id = s.id"
            " JOIN contents t ON t.id = d.content_id WHERE s.active = 1 ORDER BY d.id"
        )
        found: dict[str, list[str]] = {}
        for source, text in self.kb._rows(sql):
            found.setdefault(source, []).append(text)
        return found

    def picture(self) -> dict[str, Any]:
        """Everything that an unbroken run leaves, without row numbers and times."""
        generation = self.kb.generation()
        assert generation is not None
        ids = self.kb.chunk_ids()
        chunks = self.kb.chunks(ids.tolist())
        vectors = {
            chunks[int(i)].key: vector.tobytes()
            for batch, rows in self.kb.vectors(generation.id, ids)
            for i, vector in zip(batch, rows, strict=True)
        }
        tables = ("sources", "documents", "contents", "chunks", "vectors", "generations")
        return {
            "texts": self.texts(),
            "chunks": sorted((c.key, c.source, c.start, c.end, c.text) for c in chunks.values()),
            "vectors": vectors,
            "fingerprint": generation.fingerprint,
            "rows": {table: self.kb._number(f"SELECT COUNT(*) FROM {table}") for table in tables},
        }


def sentence(chance: random.Random, words: int = 12) -> str:
    return "".join(chance.choice(_WORDS) for _ in range(words)) + "。"


def article(seed: int | str, sentences: int = 4) -> str:
    """A text of its own for every seed."""
    chance = random.Random(seed)
    return f"第{seed}号：" + "\n".join(sentence(chance) for _ in range(sentences))


def records(seed: int | str, count: int) -> str:
    """JSON lines: one document a line."""
    lines = ({"id": f"{seed}-{i}", "text": article(f"{seed}-{i}", 1)} for i in range(count))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def append(path: Path, *lines: str) -> None:
    """One write, so that a kill leaves whole lines."""
    with path.open("ab", buffering=0) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


# -- what workers do -----------------------------------------------------------------------------------------------


def load_here(path: Path, options: LoaderConfig | None = None) -> Iterator[Document]:
    """Read in this process: starting a parser for each of hundreds of workers would be most of the time."""
    for text, metadata in read_file(path, options or LoaderConfig()):
        yield Document(page_content=text, metadata=metadata)


def small_steps() -> None:
    """Many small transactions, and files read without a further process."""
    vars(ingestion)["load_documents"] = load_here
    ingestion._BATCH_CHUNKS = reembedding._BATCH_CHUNKS = SMALL_BATCH


def work_ingest(kb: str, docs: str, done: str, gate: str = "", *, sync: bool = False) -> None:
    """Ingest a folder; after each committed file its number goes into `done`."""
    small_steps()
    embedder = SlowEmbeddings(gate=(Path(gate), GATE_WORD) if gate else None)
    with Home(Path(kb), embedder, create=True) as home:
        report = home.ingestor().ingest(
            [Path(docs)], sync=sync, progress=lambda number, total, name: append(Path(done), str(number))
        )
        assert not report.failed, report.failed
    append(Path(done), "end")


def work_remove(kb: str, sources: list[str], done: str) -> None:
    """Remove sources one by one, as `ragproj remove` does; each goes into `done` when it is gone."""
    # as in a big knowledge base: what is removed is marked first and taken out of the files afterwards
    faiss_index._COMPACTED_AT_ONCE = fulltext._REWRITTEN_AT_ONCE = 0
    with Home(Path(kb)) as home:
        for number, source in enumerate(sources):
            home.kb.writer().remove_sources([source])
            append(Path(done), source)
            home.ingestor().save_caches()
            if number % 2:
                home.ingestor().compact_caches()
    append(Path(done), "end")


def work_reembed(
    kb: str,
    done: str,
    model: str = "two",
    log: str = "",
    delay_s: float = 0.0,
    gate: str = "",
    *,
    rollback: bool = False,
) -> None:
    """Change over to another embedder; vectors committed so far go into `done`."""
    small_steps()
    embedder = SlowEmbeddings(
        model, log=Path(log) if log else None, delay_s=delay_s, gate=(Path(gate), GATE_WORD) if gate else None
    )
    with Home(Path(kb), embedder) as home:
        reembedding.reembed(
            home.store, rollback=rollback, progress=lambda number, total: append(Path(done), str(number))
        )
        append(Path(done), "switched")
        home.store.save_cache()
    append(Path(done), "end")


def work_ingest_parsed(kb: str, docs: str) -> None:
    """Ingest a folder the way users do, parsers and all."""
    with Home(Path(kb), create=True) as home:
        report = home.ingestor().ingest([Path(docs)])
        assert not report.failed, report.failed


def work_ask(kb: str, stop: str, asked: str) -> None:
    """Ask until the file `stop` is there; every hit must be a passage of its source as it is on disk."""
    questions = [sentence(random.Random(number), 3) for number in range(50)]
    with Home(Path(kb)) as home:
        number = 0
        while not Path(stop).exists():
            for hit in home.ask(questions[number % len(questions)]):
                text = Path(hit.metadata["source"]).read_text(encoding="utf-8")
                assert hit.page_content in text, hit.metadata["source"]
            number += 1
            time.sleep(0.02)  # as people do; else four readers take the processors from eight writers
    append(Path(asked), str(number))


def work_replace_and_ingest(kb: str, path: str, seed: str, count: int) -> None:
    """Put a version of a file in place, at once, and ingest it."""
    small_steps()
    target = Path(path)
    beside = target.with_name(f".{seed}")
    beside.write_text(records(seed, count), encoding="utf-8")
    with Home(Path(kb)) as home:
        beside.replace(target)
        report = home.ingestor().ingest([target])
        assert not report.failed, report.failed


def work_limited(megabytes: float, limited: str, arguments: Mapping[str, Any]) -> None:
    """Do something under a limit of the size of every file, which fails as a full disk does."""
    import resource

    limit = int(megabytes * (1 << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _WORK[limited](**arguments)


_WORK: dict[str, Callable[..., None]] = {
    name.removeprefix("work_"): value for name, value in list(globals().items()) if name.startswith("work_")
}


# -- the nursery ---------------------------------------------------------------------------------------------------


class Worker:
    """A forked process: killed, or waited for."""

    def __init__(self, pid: int, ended: threading.Event) -> None:
        self.pid, self._ended = pid, ended
        self.status: int | None = None
        self.complaint = ""

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)

    def wait(self, timeout_s: float = 120.0) -> int:
        """0 or 1 as it ended, -9 when it was killed."""
        assert self._ended.wait(timeout_s), f"worker {self.pid} does not end"
        assert self.status is not None
        return self.status

    def succeed(self, timeout_s: float = 120.0) -> None:
        assert self.wait(timeout_s) == 0, self.complaint

    def ended(self, status: int, complaint: str) -> None:
        self.status, self.complaint = status, complaint
        self._ended.set()


class Nursery:
    """Starts workers."""

    def __init__(self) -> None:
        limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | limits,
            text=True,
            encoding="utf-8",
        )
        self._workers: dict[int, Worker] = {}
        self._started: dict[int, threading.Event] = {}
        self._born: Worker | None = None
        self._birth = threading.Condition()
        self._starting = threading.Lock()  # one request at a time, so that each gets its own worker
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, work: str, **arguments: Any) -> Worker:
        """A worker at `work_<work>(**arguments)`; it has begun when this returns."""
        assert self._process.stdin is not None
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
        with self._starting, self._birth:
            self._born = None
            self._process.stdin.write(json.dumps({"work": work, "arguments": plain}) + "\n")
            self._process.stdin.flush()
            assert self._birth.wait_for(lambda: self._born is not None, 60)
            assert self._born is not None
            return self._born

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "born" in message:
                worker = Worker(message["born"], threading.Event())
                self._workers[worker.pid] = worker
                with self._birth:
                    self._born = worker
                    self._birth.notify()
            else:
                self._workers.pop(message["pid"]).ended(message["status"], message["complaint"])


def main() -> None:
    """Fork a worker for each request on stdin; tell on stdout when one is born and how it ended."""
    import faiss
    import langchain_text_splitters
    import tantivy

    faiss.omp_set_num_threads(1)
    # what is imported and cached now costs no worker anything
    assert langchain_text_splitters and tantivy and query_terms("劳动合同") and normalise("劳动合同")
    mute = threading.Lock()

    def tell(**message: Any) -> None:
        with mute:
            print(json.dumps(message), flush=True)

    def attend(pid: int, complaints: int) -> None:
        with os.fdopen(complaints, encoding="utf-8", errors="replace") as pipe:
            complaint = pipe.read()
        _, status = os.waitpid(pid, 0)
        tell(pid=pid, status=os.waitstatus_to_exitcode(status), complaint=complaint)

    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        with mute:  # no other thread holds it, or half a line, at the fork
            pid = os.fork()
        if pid == 0:
            os.close(reading)
            _work(request, writing)
        os.close(writing)
        tell(born=pid)
        threading.Thread(target=attend, args=(pid, reading), daemon=True).start()


def _work(request: dict[str, Any], complaints: int) -> None:
    """In the fork: do it and leave, without the nursery's exit handlers but with those of the parser pool."""
    from loaders import sandbox

    os.dup2(2, 1)
    status = 1
    try:
        _WORK[request["work"]](**request["arguments"])
        status = 0
    except RagProjError as error:
        os.write(complaints, f"{type(error).__name__}: {error}".encode())
    except BaseException:  # noqa: BLE001 - whatever it was, the test wants to read it
        os.write(complaints, f"TRACEBACK {traceback.format_exc()}".encode())
    finally:
        if sandbox._pool is not None:
            sandbox._pool.close()
        os._exit(status)


if __name__ == "__main__":
    main()
