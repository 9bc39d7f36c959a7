"""Child processes: time, memory, crashes, threads, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loaders.documents import LoaderConfig
from loaders.errors import LoadError
from loaders.sandbox import ParserPool

Write = Callable[[str, str | bytes], Path]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def pool() -> Iterator[ParserPool]:
    made = ParserPool(idle=2)
    yield made
    made.close()


def pool_of(script: str) -> ParserPool:
    """Workers that run `script` for each request line instead of parsing."""
    return ParserPool(command=[sys.executable, "-c", textwrap.dedent(script)])


def worker_pids(pool: ParserPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_a_worker_serves_one_file_after_another(pool: ParserPool, write: Write) -> None:
    list(pool.parse(write("a.txt", "甲"), LoaderConfig()))
    first = worker_pids(pool)
    list(pool.parse(write("b.txt", "乙"), LoaderConfig()))
    assert worker_pids(pool) == first


def test_a_bad_file_does_not_cost_the_worker(pool: ParserPool, write: Write) -> None:
    list(pool.parse(write("a.txt", "甲"), LoaderConfig()))
    first = worker_pids(pool)
    with pytest.raises(LoadError):
        list(pool.parse(write("b.pdf", b"%PDF-1.7 broken"), LoaderConfig()))
    assert worker_pids(pool) == first


def test_a_warm_worker_takes_a_few_milliseconds_a_file(pool: ParserPool, write: Write) -> None:
    """2.2 ms measured on the development machine; the bar leaves room for a busy one."""
    path = write("a.txt", "文字")
    list(pool.parse(path, LoaderConfig()))
    started = time.perf_counter()
    for _ in range(50):
        list(pool.parse(path, LoaderConfig()))
    assert (time.perf_counter() - started) / 50 < 0.05


def test_a_hanging_parser_is_stopped_and_replaced(write: Write) -> None:
    pool = pool_of("import sys, time\nfor line in sys.stdin: time.sleep(1000)")
    started = time.monotonic()
    with pytest.raises(LoadError, match=r"超过 0\.5 秒"):
        list(pool.parse(write("a.txt", "甲"), LoaderConfig(timeout_s=0.5)))
    assert time.monotonic() - started < 10
    assert worker_pids(pool) == []


def test_a_worker_that_ignores_signals_is_stopped_all_the_same(write: Write) -> None:
    pool = pool_of(
        """
        import signal, time
        for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
        while True: time.sleep(1)
        """
    )
    with pytest.raises(LoadError, match="超过"):
        list(pool.parse(write("a.txt", "甲"), LoaderConfig(timeout_s=0.5)))


def test_progress_buys_time_up_to_the_total(write: Write) -> None:
    pool = pool_of(
        """
        import sys, time
        for line in sys.stdin:
            for _ in range(1000):
                print('{"progress": true}', flush=True)
                time.sleep(0.1)
        """
    )
    started = time.monotonic()
    with pytest.raises(LoadError, match=r"超过 1\.5 秒"):
        list(pool.parse(write("a.txt", "甲"), LoaderConfig(timeout_s=0.8, total_timeout_s=1.5)))
    assert 1 < time.monotonic() - started < 10


def test_the_callers_own_time_does_not_count(pool: ParserPool, write: Write) -> None:
    content = "".join(json.dumps({"text": "字" * 1000}) + "\n" for _ in range(2000))
    documents = pool.parse(write("a.jsonl", content), LoaderConfig(timeout_s=2))
    next(documents)
    time.sleep(2.5)
    assert sum(1 for _ in documents) == 1999


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_dying_parser_is_reported_with_its_signal(number: signal.Signals, write: Write) -> None:
    pool = pool_of(f"import os, sys\nsys.stdin.readline()\nos.kill(os.getpid(), {int(number)})")
    with pytest.raises(LoadError, match=f"意外退出（{number.name}）"):
        list(pool.parse(write("a.txt", "甲"), LoaderConfig()))


def test_a_parser_that_exits_is_reported_with_its_code(write: Write) -> None:
    pool = pool_of("import sys\nsys.stdin.readline()\nsys.exit(3)")
    with pytest.raises(LoadError, match="exit 3"):
        list(pool.parse(write("a.txt", "甲"), LoaderConfig()))


def test_a_parser_that_cannot_start_is_an_error_not_a_hang(write: Write) -> None:
    pool = pool_of("raise SystemExit(7)")
    with pytest.raises(LoadError, match="exit 7"):
        list(pool.parse(write("a.txt", "甲"), LoaderConfig()))


def test_a_flood_on_stderr_does_not_block(write: Write) -> None:
    pool = pool_of(
        """
        import sys
        for line in sys.stdin:
            sys.stderr.write("x" * 10_000_000)
            print('{"done": true}', flush=True)
        """
    )
    assert list(pool.parse(write("a.txt", "甲"), LoaderConfig(timeout_s=20))) == []


@linux_only
def test_a_killed_worker_is_replaced_before_the_next_file(pool: ParserPool, write: Write) -> None:
    path = write("a.txt", "甲")
    list(pool.parse(path, LoaderConfig()))
    (pid,) = worker_pids(pool)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not pool._workers[0].is_alive())
    assert next(iter(pool.parse(path, LoaderConfig()))).text == "甲"


@linux_only
def test_memory_is_limited(pool: ParserPool, write: Write) -> None:
    """100 MB of text need more than twice that: decoded, normalised, as JSON."""
    path = write("a.txt", ("知识库问答" * 10 + "\n") * 700_000)
    with pytest.raises(LoadError, match="上限 300 MB"):
        list(pool.parse(path, LoaderConfig(memory_mb=300)))
    assert next(iter(pool.parse(write("b.txt", "乙"), LoaderConfig()))).text == "乙"


@linux_only
def test_a_large_record_file_is_streamed_in_flat_memory(pool: ParserPool, write: Write) -> None:
    row = json.dumps({"id": "x", "text": "为了惩罚犯罪，保护人民" * 20}, ensure_ascii=False) + "\n"
    path = write("a.jsonl", row * 60_000)  # 42 MB
    assert sum(1 for _ in pool.parse(path, LoaderConfig())) == 60_000
    status = Path(f"/proc/{worker_pids(pool)[0]}/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kb < 150_000


def test_an_abandoned_file_frees_its_worker(pool: ParserPool, write: Write) -> None:
    content = "".join(json.dumps({"text": "字" * 1000}) + "\n" for _ in range(2000))
    documents = pool.parse(write("a.jsonl", content), LoaderConfig())
    next(documents)
    documents.close()  # type: ignore[attr-defined]
    assert next(iter(pool.parse(write("b.txt", "乙"), LoaderConfig()))).text == "乙"


def test_several_files_may_be_open_in_one_thread(pool: ParserPool, write: Write) -> None:
    """A pool that waited for a free worker would wait for ever here."""
    paths = [write(f"{name}.txt", name) for name in "甲乙丙丁"]
    assert [parsed.text for parsed, *_ in [tuple(pool.parse(path, LoaderConfig())) for path in paths]] == list(
        "甲乙丙丁"
    )
    opened = [pool.parse(path, LoaderConfig()) for path in paths]
    assert [next(documents).text for documents in opened] == list("甲乙丙丁")


def test_threads_parse_at_once(pool: ParserPool, write: Write) -> None:
    paths = [write(f"{number}.txt", f"第{number}个文件") for number in range(24)]
    results: dict[int, str] = {}

    def work(start: int) -> None:
        for number in range(start, 24, 4):
            results[number] = next(iter(pool.parse(paths[number], LoaderConfig()))).text

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: f"第{number}个文件" for number in range(24)}
    assert len(worker_pids(pool)) <= 2


@linux_only
def test_closing_the_pool_ends_its_workers(write: Write) -> None:
    pool = ParserPool()
    list(pool.parse(write("a.txt", "甲"), LoaderConfig()))
    pids = worker_pids(pool)
    pool.close()
    assert wait_until(lambda: not any(map(is_running, pids)))


PARENT = """
import sys, time
from pathlib import Path
from loaders import sandbox
from loaders.documents import load_documents
list(load_documents(Path(sys.argv[1])))
print(sandbox._pool._workers[0]._process.pid, flush=True)
{then}
"""


@linux_only
@pytest.mark.parametrize("then", ["time.sleep(100)", "pass"])
def test_workers_end_with_their_parent(then: str, write: Write) -> None:
    """Killed with -9, or ended in good order."""
    command = [sys.executable, "-c", PARENT.format(then=then), str(write("a.txt", "甲"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if then != "pass":
            assert is_running(pid)
            parent.kill()
    assert wait_until(lambda: not is_running(pid))


@linux_only
def test_a_worker_has_no_secrets_and_cannot_write(
    pool: ParserPool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    list(pool.parse(write("a.txt", "甲"), LoaderConfig()))
    (pid,) = worker_pids(pool)
    assert b"OPENAI_API_KEY" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name in ("Max file size", "Max core file size"):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert line.removeprefix(name).split()[:2] == ["0", "0"]


@linux_only
def test_the_cpu_time_of_a_file_is_limited_by_the_kernel_too(pool: ParserPool, write: Write) -> None:
    list(pool.parse(write("a.txt", "甲"), LoaderConfig(timeout_s=30)))
    limits = Path(f"/proc/{worker_pids(pool)[0]}/limits").read_text()
    seconds = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max cpu time"))
    assert 30 <= int(seconds) <= 60


def test_a_module_in_the_working_folder_is_not_imported(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("json.py", "raise SystemExit('hijacked')")
    write("docx.py", "raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    pool = ParserPool()
    assert next(iter(pool.parse(write("a.txt", "甲"), LoaderConfig()))).text == "甲"
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_gets_workers_of_its_own(write: Write) -> None:
    from loaders.sandbox import parse

    path = write("a.txt", "甲")
    list(parse(path, LoaderConfig()))
    child = os.fork()
    if child == 0:
        os._exit(0 if next(iter(parse(path, LoaderConfig()))).text == "甲" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert next(iter(parse(path, LoaderConfig()))).text == "甲"
