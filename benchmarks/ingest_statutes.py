"""20,030 articles of law into a knowledge base, against the plain LangChain way: wall time and memory.

    python -m benchmarks.ingest_statutes --peer /tmp/peer/bin/python   # about five minutes

The peer is JSONLoader or TextLoader + RecursiveCharacterTextSplitter + FAISS.from_documents + save_local, with our
LexicalEmbeddings; chunks of 256 characters. It runs in an environment of its own, because langchain-community is no
dependency of ours:

    python -m venv /tmp/peer && /tmp/peer/bin/pip install -c constraints.txt -e '.[cpu]' langchain-community jq

Each run is a process of its own: seconds from its start to its end, imports included, and the peak of the resident
memory of it and its children.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, Report
from benchmarks.material import DATA
from benchmarks.measuring import folder_bytes, run_child, serve_child

STATUTES = DATA / "statutes_core_passages.jsonl"
ARTICLES = 20_030
TEXT_FILES = 2_000
INGEST_BAR_S, INGEST_BAR_MB, AGAIN_BAR_S = 60.0, 1000.0, 3.0
MODULE = "benchmarks.ingest_statutes"


def ours(path: str, target: str) -> dict[str, Any]:
    """Ingest a file or folder."""
    from benchmarks.stores import opened

    started = time.perf_counter()
    with opened(Path(target)) as kb:
        report = kb.ingest([Path(path)])
        return {
            "chunks": kb.knowledge_base.chunk_count(),
            "unchanged_files": report.unchanged,
            "work_s": time.perf_counter() - started,
        }


def langchain_json(path: str, target: str) -> dict[str, Any]:
    """The plain LangChain way with one JSON-lines file."""
    from langchain_community.document_loaders import JSONLoader

    started = time.perf_counter()

    def metadata(record: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        return found | {"title": record["title"]}

    loader = JSONLoader(path, jq_schema=".", content_key="text", json_lines=True, metadata_func=metadata)
    return _into_faiss(loader.load(), target, started)


def langchain_files(path: str, target: str) -> dict[str, Any]:
    """The plain LangChain way with a folder of text files."""
    from langchain_community.document_loaders import TextLoader

    started = time.perf_counter()
    files = sorted(Path(path).glob("*.txt"))
    documents = [document for file in files for document in TextLoader(str(file), encoding="utf-8").load()]
    return _into_faiss(documents, target, started)


def _into_faiss(documents: list[Any], target: str, started: float) -> dict[str, Any]:
    from langchain_community.vectorstores import FAISS
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    from chains.lexical_embeddings import LexicalEmbeddings

    chunks = RecursiveCharacterTextSplitter(chunk_size=256, chunk_overlap=0).split_documents(documents)
    FAISS.from_documents(chunks, LexicalEmbeddings()).save_local(target)
    return {"chunks": len(chunks), "work_s": time.perf_counter() - started}


def compare(report: Report, what: str, source: Path, peer_task: str, scratch: Path, peer: str) -> None:
    """Us and the peer in turn, and us once more with nothing changed."""
    targets = {name: scratch / f"{name}-{source.stem}" for name in ("ours", "peer")}
    first = run_child(MODULE, "ours", path=source, target=targets["ours"])
    again = run_child(MODULE, "ours", path=source, target=targets["ours"])
    runs = {"ours": first, "ours, nothing changed": again}
    if peer:
        runs["LangChain"] = run_child(MODULE, peer_task, python=peer, path=source, target=targets["peer"])
    for who, run in runs.items():
        size = folder_bytes(targets["peer" if who == "LangChain" else "ours"]) / 1e6
        ratio = run.seconds / first.seconds
        cpu = {"cpu_s": run.cpu_s, "cpu_to_ours": run.cpu_s / first.cpu_s}
        memory = {"peak_mb": run.peak_mb, "memory_to_ours": run.peak_mb / first.peak_mb}
        row = {
            "chunks": run.result["chunks"],
            "seconds": run.seconds,
            "to_ours": ratio,
            **cpu,
            **memory,
            "disk_mb": size,
        }
        report.add(what, who=who, **row, without_imports_s=run.result["work_s"])
    if source == STATUTES:
        report.bar(f"ingest of {ARTICLES} articles", first.seconds, INGEST_BAR_S, "s")
        report.bar("its memory", first.peak_mb, INGEST_BAR_MB, "MB")
    if source == STATUTES or again.result["unchanged_files"] >= ARTICLES:
        files = again.result["unchanged_files"]
        report.bar(f"unchanged again, {files} file(s)", again.result["work_s"], AGAIN_BAR_S, "s")


def write_files(folder: Path, count: int) -> Path:
    """One text file for each of the first articles."""
    folder.mkdir()
    with STATUTES.open(encoding="utf-8") as lines:
        for number, line in enumerate(islice(lines, count)):
            article = json.loads(line)
            text = f"{article['title']}\n\n{article['text']}\n"
            (folder / f"{number:05}.txt").write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    """Compare on one file of records and on many text files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="Python of an environment with langchain-community")
    parser.add_argument("--files", type=int, nargs="*", default=[TEXT_FILES, ARTICLES], help="text files; none: skip")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        with Report("ingest_statutes", {"files": options.files, "peer": bool(options.peer)}, options.results) as report:
            compare(report, f"one file of {ARTICLES} records", STATUTES, "langchain_json", scratch, options.peer)
            for count in options.files:
                folder = write_files(scratch / f"files-{count}", count)
                compare(report, f"{count} text files", folder, "langchain_files", scratch, options.peer)


TASKS = {"ours": ours, "langchain_json": langchain_json, "langchain_files": langchain_files}

if __name__ == "__main__" and not serve_child(sys.argv[1:], TASKS):
    main()
