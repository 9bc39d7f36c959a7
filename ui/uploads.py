"""Uploads: files on their way into the knowledge base's own folder, one upload of a name at a time."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from loaders.errors import RagProjError

_LOCK = "upload.lock"
_HIDDEN = re.compile(r"\.[0-9a-f]{32}")  # how what is on its way is named
_TICK_S = 0.2  # until somebody who waits for a name looks whether he still should


class NamesInWork:
    """The names of the files that uploads are at; who wants one of them waits until it is free."""

    def __init__(self) -> None:
        self._names: set[Path] = set()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def claimed(self, names: Collection[Path], stop: threading.Event | None = None) -> Iterator[bool]:
        """All the names at once; False where `stop` was set before they were free."""
        with self._changed:
            while taken := bool(self._names.intersection(names)):
                if stop is not None and stop.is_set():
                    break
                self._changed.wait(_TICK_S)
            if not taken:
                self._names.update(names)
        try:
            yield not taken
        finally:
            if not taken:
                with self._changed:
                    self._names.difference_update(names)
                    self._changed.notify_all()


class UploadFolder:
    """Uploaded files on their way in: replaced versions are put aside until it is known that the new ones are read.

    What is on its way is in a hidden folder, which is locked as long as this process is at it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: dict[Path, Path | None] = {}
        self._aside = folder / f".{uuid.uuid4().hex}"
        self._lock = FileLock(self._aside / _LOCK)

    def add(self, path: Path, target: Path) -> None:
        """Copy a file to its place in the folder."""
        beside, aside = (self._aside / uuid.uuid4().hex for _ in range(2))
        try:
            self._aside.mkdir(parents=True, exist_ok=True)
            if not self._lock.is_locked:
                self._lock.acquire()
            shutil.copyfile(path, beside)
            self._before[target] = target.replace(aside) if target.exists() else None
            beside.replace(target)
        except OSError as error:
            raise RagProjError(
                f"无法保存上传的文件 {path.name}：{error.strerror}；请检查磁盘空间",
                f"cannot keep the uploaded file {path.name}: {error.strerror}; check the disk space",
            ) from error

    def settle(self, is_stored: Callable[[Path], bool], is_known: Callable[[Path], bool]) -> list[Path]:
        """Keep the copies that were stored; drop the others, putting back what they replaced; which these are.

        Args:
            is_stored: whether this version of a file is in the knowledge base.
            is_known: whether any version is: of a document removed meanwhile no version is put back.
        """
        dropped = []
        for target, before in self._before.items():
            if target.exists() and is_stored(target):
                continue
            dropped.append(target)
            if before is not None and is_known(target):
                before.replace(target)
            else:
                target.unlink(missing_ok=True)
        self._lock.release()
        shutil.rmtree(self._aside, ignore_errors=True)
        return dropped


def targets(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Where files are kept in a folder, under their names; of those with the same one the later ones get a number."""
    chosen: dict[Path, None] = {}
    for path in paths:
        target, number = folder / path.name, 2
        while target in chosen:
            target = folder / f"{path.stem} ({number}){path.suffix}"
            number += 1
        chosen[target] = None
    return list(chosen)


def clear_leftovers(folder: Path) -> None:
    """Remove what uploads whose process was killed have left hidden in the folder; those in progress are let be."""
    if not folder.is_dir():
        return
    for left in [path for path in folder.glob(".*") if _HIDDEN.fullmatch(path.name)]:
        if not left.is_dir():  # as an earlier version left them
            left.unlink(missing_ok=True)
            continue
        try:
            with FileLock(left / _LOCK, timeout=0):
                pass
        except Timeout:
            continue
        shutil.rmtree(left, ignore_errors=True)
