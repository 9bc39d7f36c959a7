"""Files derived from the knowledge base: written beside and renamed, checked when read, never trusted when damaged."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MAGIC = b"RAGPROJ-CACHE-2\n"
_ABANDONED_S = 3600
_CRC_DIGITS = 8  # of the checksum, in hexadecimal, on a line of its own behind the magic


def write_cache(path: Path, header: Mapping[str, Any], payload: bytes) -> None:
    """Replace a cache file at once.

    Layout: magic, checksum of all that follows, one JSON line, payload. A failed write (full disk) leaves the old file.
    """
    body = json.dumps(header).encode() + b"\n"
    checksum = zlib.crc32(payload, zlib.crc32(body))
    with beside(path) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + f"{checksum:0{_CRC_DIGITS}x}\n".encode() + body)
        file.write(payload)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path to write to, that takes the place of `path` when all went well.

    What a killed process left there an hour ago or more is cleared away.
    """
    for left in path.parent.glob(f".{path.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                left.unlink()
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_cache(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """(header, payload) of a cache file; None, with a log line, where it is missing or not what was written."""
    try:
        with path.open("rb") as file:
            intact_start = file.read(len(_MAGIC)) == _MAGIC
            checksum = file.read(_CRC_DIGITS + 1)
            body = file.readline()
            payload = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cache %s cannot be read (%s); it will be rebuilt", path.name, error)
        return None
    if not intact_start or checksum != f"{zlib.crc32(payload, zlib.crc32(body)):0{_CRC_DIGITS}x}\n".encode():
        logger.warning("cache %s is damaged; it will be rebuilt", path.name)
        return None
    header: dict[str, Any] = json.loads(body)
    return header, payload
