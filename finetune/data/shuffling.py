"""More records than memory holds, in an order that a seed decides: dealt to files on disk, each sorted when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

_BUCKET_BYTES = 32 * 1024 * 1024
_MOST_BUCKETS = 256  # files that are open at once
_KEY_BYTES = 8


class ShuffledRecords:
    """Takes records one at a time and gives them back shuffled; one bucket of them is in memory at once.

    The order depends on the seed and on how many records were added before each, on nothing else: the same records in
    the same order come back in the same order, however many buckets there are.
    """

    def __init__(self, folder: Path, *, seed: int, expected_bytes: int) -> None:
        """Args are a folder for the buckets, the seed, and about how many bytes of JSON will be added."""
        self._paths = [folder / f"bucket-{number}" for number in range(_buckets(expected_bytes))]
        self._seed = seed
        self._added = 0
        self._stack = contextlib.ExitStack()
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._files = [self._stack.enter_context(path.open("wb")) for path in self._paths]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return self._added

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record."""
        key = hashlib.blake2b(f"{self._seed}:{self._added}".encode(), digest_size=_KEY_BYTES).hexdigest()
        # the leading digits choose the bucket, so that the buckets one after the other are in order of the keys
        bucket = int(key, 16) * len(self._files) >> (8 * _KEY_BYTES)
        self._files[bucket].write(f"{key}\t{json.dumps(record, ensure_ascii=False)}\n".encode())
        self._added += 1

    def read(self) -> Iterator[dict[str, Any]]:
        """The records in their new order; a bucket is deleted when it has been read."""
        self._stack.close()
        for path in self._paths:
            with path.open("rb") as file:
                lines = sorted(file)
            path.unlink()
            for line in lines:
                record: dict[str, Any] = json.loads(line.partition(b"\t")[2])
                yield record


def _buckets(expected_bytes: int) -> int:
    return min(_MOST_BUCKETS, 1 + expected_bytes // _BUCKET_BYTES)
