"""Connections: one a thread and a process, closed together."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from chains.connections import Connections

ROOT = Path(__file__).resolve().parents[2]


def test_every_thread_has_its_own_and_keeps_it(tmp_path: Path) -> None:
    connections = Connections(tmp_path / "a.sqlite")
    assert list(tmp_path.iterdir()) == []
    here, there = connections.current(), []
    thread = threading.Thread(target=lambda: there.append(connections.current()))
    thread.start()
    thread.join()
    assert connections.current() is here
    assert there[0] is not here
    connections.close()


def test_those_of_threads_that_ended_are_closed_when_another_is_opened(tmp_path: Path) -> None:
    connections = Connections(tmp_path / "a.sqlite")
    made: list[sqlite3.Connection] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: made.append(connections.current()))
        thread.start()
        thread.join()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        made[0].execute("SELECT 1")
    assert made[2].execute("SELECT 1").fetchone() == (1,)
    connections.close()


def test_after_closing_all_a_new_one_is_opened(tmp_path: Path) -> None:
    connections = Connections(tmp_path / "a.sqlite")
    before = connections.current()
    connections.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        before.execute("SELECT 1")
    assert connections.current().execute("SELECT 1").fetchone() == (1,)
    connections.close()


FORKING = """
import os, sys
from pathlib import Path
from chains.connections import Connections
connections = Connections(Path(sys.argv[1]))
parent = connections.current()
parent.execute("CREATE TABLE t (x)")
parent.execute("BEGIN IMMEDIATE")
parent.execute("INSERT INTO t VALUES (1)")
if os.fork() == 0:
    child = connections.current()
    rows = child.execute("SELECT COUNT(*) FROM t").fetchone()
    connections.close()  # its own, not the parent's
    os._exit(child is parent or rows != (0,))
status = os.waitstatus_to_exitcode(os.wait()[1])
parent.execute("COMMIT")
print(status, connections.current() is parent, parent.execute("SELECT COUNT(*) FROM t").fetchone()[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_opens_its_own_and_leaves_its_parents_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FORKING), str(tmp_path / "a.sqlite")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "0 True 1\n"), result.stderr
