"""import-faiss: every document of a langchain_community FAISS folder comes over, and its pickle runs nowhere else."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding

from chains.checks import check
from chains.fulltext import FullTextIndex
from chains.import_faiss import ImportFaissError, import_faiss
from chains.knowledge_base import KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings
from chains.retrievers import HybridRetriever
from chains.vectorstores import FaissVectorStore
from loaders.errors import RagProjError, UsageError
from ui import cli

needs_community = pytest.mark.skipif(
    importlib.util.find_spec("langchain_community") is None,
    reason='needs langchain-community: pip install "ragproj[community]"',
)


class Touch:
    """Unpickled, it makes a file: what a malicious folder would do worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def store(tmp_path: Path) -> FaissVectorStore:
    return FaissVectorStore(DeterministicFakeEmbedding(size=8), KnowledgeBase(tmp_path / "kb", create=True))


def folder_with(tmp_path: Path, pickled: object) -> Path:
    """A folder with a real FAISS file and whatever as its pickle."""
    folder = tmp_path / "old"
    folder.mkdir()
    index = faiss.IndexFlatL2(8)
    index.add(np.eye(2, 8, dtype=np.float32))
    faiss.write_index(index, str(folder / "index.faiss"))
    (folder / "index.pkl").write_bytes(pickled if isinstance(pickled, bytes) else pickle.dumps(pickled))
    return folder


def speaking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    """Let the child be a program of ours."""
    script = tmp_path / "child.py"
    script.write_text(program, encoding="utf-8")
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, str(script), *command[4:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


def test_an_untrusted_folder_is_refused_and_its_pickle_not_read(store: FaissVectorStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, Touch(tmp_path / "owned"))
    with pytest.raises(UsageError, match="--trust-pickle"):
        import_faiss(store, folder, trusted=False)
    assert not (tmp_path / "owned").exists()


def test_the_command_needs_trust_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, Touch(tmp_path / "owned"))
    assert cli.main(["import-faiss", str(folder), "--kb", str(tmp_path / "kb")]) == 2
    assert "--trust-pickle" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_even_a_trusted_pickle_is_not_read_in_this_process(
    store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("unpickled in this process")

    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(os, "system", never)
    folder = folder_with(tmp_path, b"not needed")
    with pytest.raises(ImportFaissError):
        import_faiss(store, folder, trusted=True)


def test_a_pickle_sees_no_keys_and_no_passwords(
    store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "RAGPROJ_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    program = """
import json, os
print(json.dumps({"id": "1", "text": json.dumps(dict(os.environ)), "metadata": {}}))
print(json.dumps({"count": 1}))
"""
    speaking(monkeypatch, tmp_path, program)
    assert import_faiss(store, folder_with(tmp_path, b""), trusted=True) == 1
    (seen,) = store.get_by_ids(["1"])
    assert "PATH" in seen.page_content
    assert "secret" not in seen.page_content


@pytest.mark.parametrize("content", [b"", b"noise" * 50, pickle.dumps(("only", "two")), pickle.dumps(None)])
def test_a_broken_pickle_is_an_error_on_one_line_that_names_the_folder(
    store: FaissVectorStore, tmp_path: Path, content: bytes
) -> None:
    folder = folder_with(tmp_path, content)
    with pytest.raises(ImportFaissError, match=str(folder)) as raised:
        import_faiss(store, folder, trusted=True)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1500
    assert store.knowledge_base.source_names() == []


@pytest.mark.parametrize("missing", ["index.faiss", "index.pkl"])
def test_a_missing_file_is_named(store: FaissVectorStore, tmp_path: Path, missing: str) -> None:
    folder = folder_with(tmp_path, None)
    (folder / missing).unlink()
    with pytest.raises(ImportFaissError, match=missing):
        import_faiss(store, folder, trusted=True)


# -- a child that misbehaves ---------------------------------------------------------------------------------------

ENTRY = '{"id": "a", "text": "第一", "metadata": {}}'


@pytest.mark.parametrize(
    "program",
    [
        f"print('{ENTRY}'); print('hello from an unpickled object'); print('{{\"count\": 1}}')",
        "print('no json at all')",
        "print('[1, 2]')",
        'print(\'{"id": "a"}\')',
        f"print('{ENTRY}'); import os; os._exit(0)",
        f"print('{ENTRY}', flush=True); import os; os.kill(os.getpid(), 9)",
        "import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\n')",
    ],
    ids=["prints between", "no json", "a list", "no text", "no count", "killed", "not UTF-8"],
)
def test_a_child_that_says_something_else_is_an_error_not_a_traceback(
    store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    folder = folder_with(tmp_path, None)
    speaking(monkeypatch, tmp_path, program)
    with pytest.raises(ImportFaissError):
        import_faiss(store, folder, trusted=True)


def test_a_child_that_complains_at_length_does_not_hang(
    store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, None)
    # more than a pipe holds (64 KB) on stderr before the first document
    speaking(monkeypatch, tmp_path, f"import sys; sys.stderr.write('warning ' * 50_000); print('{ENTRY}');"
             "print('{\"count\": 1}')")  # fmt: skip
    outcome: list[object] = []
    kb = store.knowledge_base

    def run() -> None:
        try:
            outcome.append(import_faiss(store, folder, trusted=True))
        except RagProjError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome == [1]
    assert kb.chunk_count() == 1


def test_metadata_of_any_kind_is_stored_searched_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that mean something to us but come from elsewhere must not break retrieval."""
    odd = [
        {"title": 5, "headings": "abc", "page": "iv", "start": "x", "end": None, "score": "good", "document_id": "d"},
        {"source": 7, "table_header": [1], "sheet": {"a": 1}, "also_in": "no", "slide": -1},
        {"source": "", "nested": {"deep": [1, {"x": None}]}, "unicode": "\u0000 \ud83d\ude00"},
        {"source": "a.txt", "nan": float("nan"), "inf": float("inf"), "big": 10**30},
    ]
    lines = [json.dumps({"id": str(i), "text": f"第{i}条 独特的内容 {i}", "metadata": m}) for i, m in enumerate(odd)]
    lines.append(json.dumps({"count": len(odd)}))
    (tmp_path / "lines").write_text("\n".join(lines) + "\n", encoding="utf-8")
    speaking(monkeypatch, tmp_path, f"print(open({str(tmp_path / 'lines')!r}).read(), end='')")
    folder = folder_with(tmp_path, None)
    store = FaissVectorStore(LexicalEmbeddings(), KnowledgeBase(tmp_path / "kb", create=True))
    assert import_faiss(store, folder, trusted=True) == len(odd)
    fulltext = FullTextIndex(store.knowledge_base)
    assert check(store, fulltext).problems == []
    assert len(HybridRetriever(store=store, fulltext=fulltext, top_k=9).invoke("独特的内容")) == len(odd)
    filtered = HybridRetriever(store=store, fulltext=fulltext, filter={"source": "a.txt"}).invoke("独特的内容")
    assert [document.id for document in filtered] == ["3"]
    assert len(store.knowledge_base.sources()) >= 1


def test_text_that_no_database_holds_is_an_error_or_stored(
    store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"id": "a", "text": "half a pair \ud83d", "metadata": {"x\ud83d": "\ud83d"}})
    (tmp_path / "lines").write_text(f'{line}\n{{"count": 1}}\n', encoding="utf-8")
    speaking(monkeypatch, tmp_path, f"print(open({str(tmp_path / 'lines')!r}).read(), end='')")
    assert import_faiss(store, folder_with(tmp_path, None), trusted=True) == 1
    assert store.get_by_ids(["a"])[0].page_content.startswith("half a pair")


# -- a real folder -------------------------------------------------------------------------------------------------

WRITE_A_FOLDER = """
import datetime, sys
from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import DeterministicFakeEmbedding

texts = [f"第{i}条 内容{i % 700}" for i in range(1200)] + ["", "  "]
metadatas = [{"source": f"文件{i % 5}.txt", "page": i} for i in range(len(texts))]
metadatas[3] = {"date": datetime.date(2020, 1, 2), "set": {1}, "bytes": b"x", "path": sys.path, ("a", 1): 2, None: 3}
store = FAISS.from_texts(texts, DeterministicFakeEmbedding(size=8), metadatas)
store.delete([store.index_to_docstore_id[0]])
store.save_local(sys.argv[1])
"""


@needs_community
def test_a_real_folder_loses_no_document(store: FaissVectorStore, tmp_path: Path) -> None:
    folder = tmp_path / "real"
    subprocess.run([sys.executable, "-c", WRITE_A_FOLDER, str(folder)], check=True)
    assert import_faiss(store, folder, trusted=True) == 1201
    kb = store.knowledge_base
    assert kb.chunk_count() == 1201
    assert sorted(kb.source_names()) == ["(python)", *(f"文件{i}.txt" for i in range(5))]
    assert check(store, FullTextIndex(kb)).problems == []
    assert import_faiss(store, folder, trusted=True) == 1201  # again: replaced, not doubled
    assert kb.chunk_count() == 1201
    chunk = next(c for c in kb.chunks(kb.chunk_ids().tolist()).values() if c.text.startswith("第3条"))
    assert chunk.metadata["date"] == "2020-01-02"
    assert chunk.metadata["bytes"] == "b'x'"


@needs_community
def test_a_malicious_pickle_runs_only_in_the_child(store: FaissVectorStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, Touch(tmp_path / "owned"))
    with pytest.raises(ImportFaissError):
        import_faiss(store, folder, trusted=True)
    assert (tmp_path / "owned").exists()  # the user vouched for it; it did not run here: os.system is another's
