"""The worker's side of the protocol, spoken over real pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders.documents import LoaderConfig
from loaders.worker import _is_out_of_memory, _reason

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def ask() -> Iterator[Callable[..., list[dict[str, Any]]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "loaders.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def asker(path: Path, source: str = "") -> list[dict[str, Any]]:
        request = {"path": str(path), "source": source or str(path), "options": LoaderConfig().model_dump()}
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        answers = []
        while not answers or not {"done", "error", "memory"} & set(answers[-1]):
            answers.append(json.loads(stdout.readline()))
        return answers

    yield asker
    process.kill()
    process.communicate()


Ask = Callable[..., list[dict[str, Any]]]


def test_documents_come_before_done(ask: Ask, write: Write) -> None:
    documents, done = ask(write("a.txt", "甲"), source="a.txt")
    assert documents["documents"][0][0] == "甲"
    assert documents["documents"][0][1]["source"] == "a.txt"
    assert done == {"done": True}


def test_small_records_travel_together(ask: Ask, write: Write) -> None:
    answers = ask(write("a.jsonl", '{"text": "甲"}\n' * 500))
    assert [len(answer.get("documents", [])) for answer in answers] == [500, 0]


def test_records_before_a_bad_line_come_before_the_error(ask: Ask, write: Write) -> None:
    documents, error = ask(write("a.jsonl", '{"text": "甲"}\n坏\n'), source="a.jsonl")
    assert len(documents["documents"]) == 1
    zh, en = error["error"]
    assert zh.startswith("a.jsonl:2")
    assert en.startswith("a.jsonl:2")


def test_any_error_of_a_parser_is_a_damaged_file(ask: Ask, make_zip: Callable[..., Path]) -> None:
    path = make_zip("a.docx", {"word/document.xml": "<broken", "[Content_Types].xml": "<also"})
    (error,) = ask(path)
    assert "损坏" in error["error"][0]
    assert "\n" not in error["error"][0]


def test_what_libraries_print_does_not_reach_the_pipe() -> None:
    """By Python or straight to the descriptor, as C libraries do."""
    script = (
        "import os\nfrom loaders import worker\nanswers = worker._private_stdout()\n"
        "print('noise', flush=True)\nos.write(1, b'noise')\nanswers.write(b'answer')\nanswers.flush()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"answer"
    assert done.stderr == b"noise\nnoise"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for requested buffer"), True),
        (ValueError("bad value"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error: Exception, memory: bool) -> None:
    assert _is_out_of_memory(error) is memory


def test_the_reason_is_one_line() -> None:
    assert _reason(ValueError("first\nsecond\n  the cause")) == "ValueError: the cause"
    assert _reason(KeyError()) == "KeyError: "
