"""Connections: one to a SQLite database for every thread, in every process."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

_BUSY_S = 60  # to wait for other writers


class Connections:
    """Connections to one database, each used by the thread it was made for; safe to share between threads."""

    def __init__(self, database: Path) -> None:
        """Nothing is opened yet, and no file made."""
        self._database = database
        self._inherited: list[object] = []
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._local = threading.local()
        self._by_thread: dict[threading.Thread, sqlite3.Connection] = {}
        self._lock = threading.Lock()

    def current(self) -> sqlite3.Connection:
        """This thread's connection, opened where there is none; in autocommit mode.

        Raises:
            sqlite3.Error: the file cannot be opened.
        """
        if self._pid != os.getpid():
            # SQLite forbids to use a connection in a forked process, and to close one is to use it: it stays open
            self._inherited.append((self._local, self._by_thread))
            self._start()
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._opened()
            with self._lock:
                for thread in [thread for thread in self._by_thread if not thread.is_alive()]:
                    self._by_thread.pop(thread).close()
                self._by_thread[threading.current_thread()] = connection
        return connection

    def close(self) -> None:
        """Close every thread's connection of this process."""
        if self._pid == os.getpid():
            with self._lock:
                while self._by_thread:
                    self._by_thread.popitem()[1].close()
                self._local = threading.local()

    def _opened(self) -> sqlite3.Connection:
        # used by one thread; closed by whichever thread closes the knowledge base
        connection = sqlite3.connect(self._database, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = NORMAL")  # WAL: a crash loses nothing committed
        connection.execute("PRAGMA secure_delete = ON")  # removed text is overwritten, not only unlinked
        connection.execute("PRAGMA cache_size = -32768")  # KiB, filled by what is read
        return connection
