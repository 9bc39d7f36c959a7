"""The knowledge base's SQLite schema: how it is made, and how older versions are brought up to it."""

from __future__ import annotations

import sqlite3

SCHEMA_VERSION = 3
APPLICATION_ID = 0x52414750  # "RAGP"

# vectors.key is generation << 40 | chunk id: a rowid table keeps a vector within its page, a composite key would not.
GENERATION_SHIFT = 40

_INCREMENTAL = 2  # what `PRAGMA auto_vacuum` says for INCREMENTAL
# Caches of version 1, which nothing reads any more; they hold vectors of documents that may be removed by now.
OLD_FILES = ("faiss.index", "write.lock")

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE revisions (id INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL, shown BLOB, hidden BLOB);
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL, dimensions INTEGER NOT NULL, probe BLOB NOT NULL,
    created TEXT NOT NULL, embedder TEXT
);
CREATE TABLE sources (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, active INTEGER NOT NULL, size INTEGER, mtime_ns INTEGER,
    sha256 TEXT, settings TEXT, added TEXT NOT NULL
);
CREATE UNIQUE INDEX sources_active ON sources (source) WHERE active = 1;
CREATE INDEX sources_name ON sources (source);
CREATE INDEX sources_staged ON sources (active) WHERE active = 0;
CREATE TABLE contents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL
);
CREATE UNIQUE INDEX contents_hash ON contents (hash);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source_id INTEGER NOT NULL, content_id INTEGER NOT NULL, title TEXT NOT NULL,
    metadata TEXT NOT NULL, characters INTEGER NOT NULL
);
CREATE INDEX documents_source ON documents (source_id);
CREATE INDEX documents_content ON documents (content_id);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, content_id INTEGER NOT NULL, start INTEGER NOT NULL,
    end INTEGER NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX chunks_key ON chunks (key);
CREATE INDEX chunks_content ON chunks (content_id);
CREATE TABLE vectors (key INTEGER PRIMARY KEY, vector BLOB NOT NULL);
"""

# From version n to n + 1, each in one transaction.
_MIGRATIONS = {
    # Version 1 kept the text with the document and the whole metadata with each chunk. Contents are not merged here:
    # equal ones become one when their files are read again.
    1: """
ALTER TABLE generations ADD COLUMN embedder TEXT;
ALTER TABLE documents RENAME TO documents_1;
ALTER TABLE chunks RENAME TO chunks_1;
DROP INDEX documents_source;
DROP INDEX chunks_key;
DROP INDEX chunks_source;
DROP INDEX chunks_document;
CREATE TABLE contents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL
);
CREATE UNIQUE INDEX contents_hash ON contents (hash);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source_id INTEGER NOT NULL, content_id INTEGER NOT NULL, title TEXT NOT NULL,
    metadata TEXT NOT NULL, characters INTEGER NOT NULL
);
CREATE INDEX documents_source ON documents (source_id);
CREATE INDEX documents_content ON documents (content_id);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, content_id INTEGER NOT NULL, start INTEGER NOT NULL,
    end INTEGER NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX chunks_key ON chunks (key);
CREATE INDEX chunks_content ON chunks (content_id);
INSERT INTO contents SELECT id, 'version-1:' || id, COALESCE(title, ''), text FROM documents_1;
INSERT INTO documents SELECT id, source_id, id, COALESCE(title, ''), '{}', characters FROM documents_1;
INSERT INTO chunks SELECT id, key, document_id, start, end, text, metadata FROM chunks_1;
DROP TABLE documents_1;
DELETE FROM sqlite_sequence WHERE name = 'chunks';
INSERT INTO sqlite_sequence SELECT 'chunks', seq FROM sqlite_sequence WHERE name = 'chunks_1';
DROP TABLE chunks_1;
""",
    # Version 2 kept no list of the chunks that a revision showed and hid; NULL says so. Every query asked all sources
    # whether one is in the making.
    2: """
ALTER TABLE revisions ADD COLUMN shown BLOB;
ALTER TABLE revisions ADD COLUMN hidden BLOB;
CREATE INDEX sources_staged ON sources (active) WHERE active = 0;
""",
}


def create(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty database."""
    connection.executescript(
        # auto_vacuum gives removed space back to the file system, step by step; it must come before the first table
        "PRAGMA page_size = 16384; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; BEGIN IMMEDIATE;"
        f"{_TABLES} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def is_current(connection: sqlite3.Connection) -> bool:
    """Whether there is nothing for `migrate` to do."""
    return _number(connection, "user_version") == SCHEMA_VERSION and _number(connection, "auto_vacuum") == _INCREMENTAL


def migrate(connection: sqlite3.Connection) -> None:
    """Bring an older database up to this version; a crash or an error leaves the version before."""
    for step in range(_number(connection, "user_version"), SCHEMA_VERSION):
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {_MIGRATIONS[step]} PRAGMA user_version = {step + 1}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    if _number(connection, "auto_vacuum") != _INCREMENTAL:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("VACUUM")


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])
