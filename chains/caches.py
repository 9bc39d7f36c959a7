"""Files derived from the knowledge base: written beside and renamed, checked when read, never trusted when damaged."""

from __future__ import annotations

import json
import logging
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MAGIC = b"RAGPROJ-CACHE-1\n"


def write_cache(path: Path, header: Mapping[str, Any], payload: bytes | memoryview) -> None:
    """Replace a cache file at once; the header gets the payload's size and checksum.

    Layout: magic, one JSON line, payload. A failed write (full disk) leaves the old file.
    """
    line = json.dumps({**header, "size": len(payload), "crc32": zlib.crc32(payload)}).encode() + b"\n"
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            file.write(_MAGIC + line)
            file.write(payload)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_cache(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """(header, payload) of a cache file; None, with a log line, where it is missing or not what was written."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("no cache header")
            header = json.loads(file.readline(65536))
            payload = file.read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("cache %s cannot be read (%s); it will be rebuilt", path.name, error)
        return None
    if not isinstance(header, dict) or header.get("size") != len(payload) or header.get("crc32") != zlib.crc32(payload):
        logger.warning("cache %s is damaged; it will be rebuilt", path.name)
        return None
    return header, payload
