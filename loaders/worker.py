"""The parsing process of `loaders.sandbox`: reads requests on stdin, writes documents on stdout, JSON lines both ways.

Request: `{"path", "source", "options"}`. Answers: `{"documents": [[text, metadata], ...]}` any number of times,
`{"progress": true}` in between, and at the end `{"done": true}`, `{"error": [zh, en]}` or `{"memory": true}`.
Started by `python -m loaders.worker`; ends when stdin does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loaders.documents import LoaderConfig, read_file
from loaders.errors import LoadError
from loaders.formats import problems
from loaders.formats.blocks import Parsed

try:
    import resource
except ImportError:  # Windows has no such limits; the parent's clock still holds
    resource = None  # type: ignore[assignment]

_BATCH_CHARS = 200_000  # documents travel together up to this size: 20,000 records need few lines
_PROGRESS_S = 0.5  # seconds between signs of life
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "cannot allocate memory")
_CPU_MARGIN_S = 10  # the kernel ends a worker whose parent died in the middle of a hanging file


def main() -> None:
    """Serve requests until stdin ends."""
    answers = _private_stdout()
    _drop_privileges()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        if not _serve(request, answers):
            return


def _serve(request: dict[str, Any], answers: BinaryIO) -> bool:
    """Answer one request; False where the process must not be used again."""
    path, source = Path(request["path"]), Path(request["source"])
    options = LoaderConfig.model_validate(request["options"])
    _limit_memory(options.memory_mb)
    clock = _Clock(answers, options.timeout_s)
    try:
        for batch in _batches(read_file(path, options, on_progress=clock.tick)):
            documents = [[parsed.text, {**parsed.metadata, "source": str(source)}] for parsed in batch]
            _send(answers, {"documents": documents})
            clock.restart()
        _send(answers, {"done": True})
    except LoadError as error:
        named = [message.replace(str(path), str(source)) for message in (error.zh, error.en)]
        _send(answers, {"error": named})
    except Exception as error:  # noqa: BLE001 - parsers raise anything at all on damaged input; it ends here, by name
        if _is_out_of_memory(error):
            _send(answers, {"memory": True})
            return False
        problem = problems.damaged(source, _reason(error))
        _send(answers, {"error": [problem.zh, problem.en]})
    return True


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or a C++ library (which raises errors of its own) got no memory."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def _reason(error: Exception) -> str:
    """The error on one line; libraries put the cause of a nested traceback last."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"


class _Clock:
    """Tells the parent about progress, and the kernel how much more CPU time is allowed until the next of it."""

    def __init__(self, answers: BinaryIO, timeout_s: float) -> None:
        self._answers, self._timeout_s = answers, timeout_s
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()
        if resource is not None:
            used = int(time.process_time())
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (used + int(self._timeout_s) + _CPU_MARGIN_S, hard))

    def tick(self) -> None:
        if time.monotonic() - self._last >= _PROGRESS_S:
            _send(self._answers, {"progress": True})
            self.restart()


def _batches(documents: Iterator[Parsed]) -> Iterator[list[Parsed]]:
    batch: list[Parsed] = []
    size = 0
    try:
        for document in documents:
            batch.append(document)
            size += len(document.text)
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
    except LoadError:
        yield batch  # what was good before the error
        raise
    yield batch


def _send(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")
    answers.flush()


def _read_requests(requests: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on; end the process, whatever it is doing, when the parent is gone."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _private_stdout() -> BinaryIO:
    """The pipe to the parent; what libraries print goes where stderr goes, and they have no stdin."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _drop_privileges() -> None:
    """Give up what parsing does not need: writing files, core dumps, priority."""
    if hasattr(os, "nice"):
        os.nice(5)
    if resource is not None:
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
            resource.setrlimit(limit, (0, 0))


def _limit_memory(megabytes: int) -> None:
    if resource is not None and sys.platform != "darwin":  # macOS accepts the call and ignores it, or fails
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = megabytes << 20
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
