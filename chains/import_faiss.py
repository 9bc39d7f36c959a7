"""import-faiss: the documents of a folder that `langchain_community`'s FAISS wrote, into a knowledge base.

Such a folder holds a pickle, which can run any code when it is read. It is read in a child process, and only when the
caller says that the folder can be trusted; documents come back as JSON. Run as a module, this file is that child.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from langchain_core.documents import Document

from chains.vectorstores import FaissVectorStore
from loaders.errors import RagProjError, UsageError
from loaders.sandbox import clean_environment

_BATCH = 512
_DEEPEST = 20  # of nested metadata; a structure that holds itself ends there


class ImportFaissError(RagProjError):
    """The folder cannot be read."""


def import_faiss(
    store: FaissVectorStore,
    folder: Path,
    *,
    trusted: bool,
    index_name: str = "index",
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Store every document of the folder under its own id, embedded by the store's embedder; how many there were.

    Importing again replaces what was imported before.

    Args:
        store: of the knowledge base.
        folder: with `INDEX_NAME.faiss` and `INDEX_NAME.pkl`.
        trusted: the caller knows where the folder comes from.
        index_name: as given to `save_local`.
        progress: called with the documents stored so far.

    Raises:
        UsageError: the folder is not trusted.
        ImportFaissError: files are missing or cannot be read, or `langchain-community` is not installed.
    """
    if not trusted:
        raise UsageError(
            f"{folder} 中的 {index_name}.pkl 是 pickle 文件，读取时可以执行任意代码；确认来源可信后加 --trust-pickle",
            f"{index_name}.pkl in {folder} is a pickle, which can run any code when read; if you know where it comes"
            " from, add --trust-pickle",
        )
    for name in (f"{index_name}.faiss", f"{index_name}.pkl"):
        if not (folder / name).is_file():
            raise ImportFaissError(f"{folder} 中没有 {name}", f"there is no {name} in {folder}")
    documents = _read_in_child(folder, index_name)
    done = 0
    while batch := list(islice(documents, _BATCH)):
        store.add_documents(batch)
        done += len(batch)
        progress(done)
    store.save_cache()
    return done


def _read_in_child(folder: Path, index_name: str) -> Iterator[Document]:
    command = [sys.executable, "-P", "-m", "chains.import_faiss", str(folder.absolute()), index_name]
    count, expected, nonsense = 0, None, ""
    # a file, not a pipe, for complaints: nobody reads them before the end
    with tempfile.TemporaryFile() as complaints:
        # our own module, in this Python; the folder is an argument, never part of a command line
        child = subprocess.Popen(  # noqa: S603
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=clean_environment(),  # no keys and passwords for what a pickle may run
        )
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                try:
                    document, expected = _parsed(line)
                except (ValueError, KeyError, TypeError) as error:
                    nonsense = str(error)
                    child.kill()
                    break
                if document is not None:
                    count += 1
                    yield document
        complaints.seek(0)
        lines = complaints.read().decode("utf-8", "replace").split("\n")
        complaint = nonsense or next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
    if child.returncode != 0 or count != expected:
        install = '; pip install "ragproj[community]"' if "langchain_community" in complaint else ""
        raise ImportFaissError(
            f"读取 {folder} 失败，已导入 {count} 个文档：{complaint or '子进程意外退出'}{install}",
            f"cannot read {folder}, {count} documents were imported: {complaint or 'the child process died'}{install}",
        )


def _parsed(line: bytes) -> tuple[Document | None, int | None]:
    """(document, None) or, for the last line, (None, how many there were)."""
    message = json.loads(line)
    if "count" in message:
        return None, int(message["count"])
    document = Document(
        id=_text(message["id"]), page_content=_text(message["text"]), metadata=_plain(message["metadata"])
    )
    return document, None


def _documents(folder: str, index_name: str) -> Iterator[dict[str, Any]]:
    """What the child prints: the documents in index order, then how many they were."""
    from langchain_community.vectorstores import FAISS
    from langchain_core.embeddings import DeterministicFakeEmbedding

    # only in this child, and only after the user vouched for the folder
    store = FAISS.load_local(
        folder, DeterministicFakeEmbedding(size=1), index_name, allow_dangerous_deserialization=True
    )
    count = 0
    for _, key in sorted(store.index_to_docstore_id.items()):
        document = store.docstore.search(key)
        if not isinstance(document, Document):
            raise ValueError(f"document {key} is in the index but not in the docstore")
        yield {"id": _text(str(key)), "text": _text(document.page_content), "metadata": _plain(document.metadata)}
        count += 1
    yield {"count": count}


def _plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it; what it cannot becomes text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _DEEPEST and isinstance(value, dict):
        return {_text(str(key)): _plain(entry, depth + 1) for key, entry in value.items()}
    if depth < _DEEPEST and isinstance(value, list | tuple | set):
        return [_plain(entry, depth + 1) for entry in value]
    return _text(str(value))


def _text(text: str) -> str:
    """The text without half surrogate pairs, which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _main(folder: str, index_name: str) -> None:
    # documents leave through a pipe of their own: what unpickled code prints goes to the complaints
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for entry in _documents(folder, index_name):
            out.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:3])
