"""import-faiss: the documents of a folder that `langchain_community`'s FAISS wrote, into a knowledge base.

Such a folder holds a pickle, which can run any code when it is read. It is read in a child process, and only when the
caller says that the folder can be trusted; documents come back as JSON. Run as a module, this file is that child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from langchain_core.documents import Document

from chains.vectorstores import FaissVectorStore
from loaders.errors import RagProjError, UsageError

_BATCH = 512


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
    command = [sys.executable, "-m", "chains.import_faiss", str(folder), index_name]
    # our own module, in this Python; the folder is an argument, never part of a command line
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        count = 0
        expected = None
        for line in child.stdout:
            message = json.loads(line)
            if "count" in message:
                expected = message["count"]
                continue
            count += 1
            yield Document(id=message["id"], page_content=message["text"], metadata=message["metadata"])
        complaint = " ".join(child.stderr.read().split())[-300:]
        if child.wait() != 0 or count != expected:
            raise ImportFaissError(
                f"读取 {folder} 失败，已导入 {count} 个文档：{complaint or '子进程意外退出'}；"
                '需要 pip install "ragproj[community]"',
                f"cannot read {folder}, {count} documents were imported: {complaint or 'the child process died'};"
                ' it needs pip install "ragproj[community]"',
            )


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
        metadata = json.loads(json.dumps(document.metadata, default=str, ensure_ascii=False))
        yield {"id": str(key), "text": document.page_content, "metadata": metadata}
        count += 1
    yield {"count": count}


if __name__ == "__main__":
    for entry in _documents(*sys.argv[1:3]):
        print(json.dumps(entry, ensure_ascii=True), flush=False)  # noqa: T201 the parent reads it
