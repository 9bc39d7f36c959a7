"""A folder of results: written aside and moved in at the end, the report last; nothing is replaced unasked."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loaders.errors import RagProjError, UsageError

REPORT = "report.json"
_STAGING = ".partial-"
_ABANDONED_S = 3600


def refuse_existing(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Nothing, where none of the files exists or they may be replaced.

    Raises:
        UsageError: names those that exist.
    """
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        listed = ", ".join(existing)
        raise UsageError(
            f"已经存在：{listed}；换一个位置，或加 --overwrite 替换",
            f"exists already: {listed}; choose another place, or replace it with --overwrite",
        )


@contextlib.contextmanager
def staged(out: Path, names: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """A folder to write files into; when all went well, `names` of them and then the report move to `out`.

    A run that fails leaves `out` as it was. What a killed run left there an hour ago or more is cleared away.

    Raises:
        UsageError: a result is there already, and `overwrite` is not set.
        RagProjError: `out` cannot be made or written.
    """
    refuse_existing([out / name for name in (*names, REPORT)], overwrite=overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{_STAGING}*"):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=out) as folder:
            yield Path(folder)
            (out / REPORT).unlink(missing_ok=True)  # a folder with a report is whole
            for name in (*names, REPORT):
                (Path(folder) / name).replace(out / name)
    except OSError as error:
        raise RagProjError(
            f"无法写入 {out}：{error.strerror or error}", f"cannot write to {out}: {error.strerror or error}"
        ) from error


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report into a staged folder."""
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
