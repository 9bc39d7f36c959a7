"""Parse untrusted files in child processes: no file can hang, exhaust or kill the caller.

A worker (`loaders.worker`) is started once, serves one file after another over a pipe in JSON lines, and is killed and
replaced when a file takes too long, too much memory, or takes the worker down. Threads each get a worker of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders.errors import LoadError
from loaders.formats import problems
from loaders.formats.blocks import Parsed

if TYPE_CHECKING:
    from loaders.documents import LoaderConfig

_IDLE_WORKERS = max(1, min(4, os.cpu_count() or 1))  # kept warm; more run while more threads parse
_FILES_PER_WORKER = 500  # then replaced: parsers leak
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "VIRTUAL_ENV")
_ROOT = Path(__file__).resolve().parent.parent


def parse(path: Path, options: LoaderConfig) -> Iterator[Parsed]:
    """The documents of one file, streamed from a worker of the shared pool.

    Raises:
        LoadError: as `loaders.documents.load_documents`.
    """
    return _shared_pool().parse(path, options)


class ParserPool:
    """Warm workers for any number of threads; nothing starts before the first file."""

    def __init__(self, *, idle: int = _IDLE_WORKERS, command: Sequence[str] | None = None) -> None:
        """
        Args:
            idle: workers kept when nothing is being parsed.
            command: what starts a worker, for tests.
        """
        self._idle = idle
        self._command = list(command) if command else [sys.executable, "-P", "-m", "loaders.worker"]
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def parse(self, path: Path, options: LoaderConfig) -> Iterator[Parsed]:
        """The documents of one file; abandoning the iterator frees the worker."""
        worker = self._take()
        try:
            yield from worker.parse(path, options)
        finally:
            self._give_back(worker)

    def close(self) -> None:
        """End the idle workers; those at work end with their file."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def _take(self) -> _Worker:
        with self._lock:
            while self._workers:
                worker = self._workers.pop()
                if worker.is_alive():
                    return worker
        return _Worker(self._command)

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            keep = worker.reusable and not self._closed and len(self._workers) < self._idle
            if keep:
                self._workers.append(worker)
        if not keep:
            worker.kill()


class _Worker:
    """One child process and the clock that kills it."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a full stderr pipe would stop the child
            env=clean_environment(),
            start_new_session=True,  # Ctrl-C in the terminal is the parent's business
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("subprocess.PIPE gives no pipe")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._watchdog = _Watchdog(self._process)
        self._files = 0
        self.reusable = True

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._watchdog.end()
        self._process.kill()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):  # closing flushes into a broken pipe
                pipe.close()
        self._process.wait()

    def parse(self, path: Path, options: LoaderConfig) -> Iterator[Parsed]:
        self.reusable = False  # until the answer is complete
        request = {"path": str(path.absolute()), "source": str(path), "options": options.model_dump()}
        self._watchdog.begin(options)
        for answer in self._answers(request):
            if "documents" in answer:
                for text, metadata in answer["documents"]:
                    yield Parsed(text, metadata)
            elif "error" in answer:
                self._finish()
                raise LoadError(*answer["error"])
            elif "memory" in answer:
                raise problems.too_large(path, f"{options.memory_mb} MB")
            elif "done" in answer:
                self._finish()
                return
        raise self._death(path, options)

    def _answers(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Messages until the worker dies."""
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows in what it answers
            self._stdin.write(json.dumps(request).encode("ascii") + b"\n")
            self._stdin.flush()
        while True:
            with self._watchdog.waiting():
                line = self._stdout.readline()
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)

    def _finish(self) -> None:
        self._files += 1
        self.reusable = self._files < _FILES_PER_WORKER

    def _death(self, path: Path, options: LoaderConfig) -> LoadError:
        if self._watchdog.expired_s is not None:
            return problems.too_slow(path, self._watchdog.expired_s)
        self._process.wait()
        code = self._process.returncode
        if code >= 0:
            return problems.crashed(path, f"exit {code}")
        name = signal.Signals(-code).name
        if name == "SIGXCPU":
            return problems.too_slow(path, options.timeout_s)
        return problems.crashed(path, name)


class _Watchdog:
    """Kills the process when it keeps the caller waiting for too long; the caller's own time does not count.

    Its thread lives as long as the process, and is woken only for a deadline before the one it sleeps to: thousands of
    small files start and wake no thread.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.expired_s: float | None = None
        self._process = process
        self._silence_s = self._total_s = self._left_s = 0.0
        self._deadline: float | None = None
        self._wakes_at = math.inf
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._watch, name="parser-watchdog", daemon=True).start()

    def begin(self, options: LoaderConfig) -> None:
        """A new file, which has all its time before it."""
        self._silence_s, self._total_s, self._left_s = (
            options.timeout_s,
            options.total_timeout_s,
            options.total_timeout_s,
        )

    def end(self) -> None:
        """The process is gone."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The clock runs inside."""
        started = time.monotonic()
        with self._changed:
            self._deadline = started + min(self._silence_s, self._left_s)
            if self._deadline < self._wakes_at:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._deadline = None
                self._left_s -= time.monotonic() - started

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                self._wakes_at = math.inf if self._deadline is None else self._deadline
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self.expired_s = self._silence_s if self._silence_s < self._left_s else self._total_s
                    self._process.kill()
                    return
                self._changed.wait(left)


_pool: ParserPool | None = None
_pool_pid: int | None = None
_pool_lock = threading.Lock()


def _shared_pool() -> ParserPool:
    """The pool of this process; a forked child must not talk to its parent's workers."""
    global _pool, _pool_pid
    with _pool_lock:
        if _pool is None or _pool_pid != os.getpid():
            _pool, _pool_pid = ParserPool(), os.getpid()
            atexit.register(_pool.close)
        return _pool


def clean_environment() -> dict[str, str]:
    """What a child process that handles untrusted files is given of the environment.

    No secrets, no user site, one thread per library, and this package importable from any folder.
    """
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return kept | {
        "PYTHONPATH": str(_ROOT),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
