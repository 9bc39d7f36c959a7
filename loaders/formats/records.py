"""JSON and JSON lines: records with a text become documents of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from loaders import encodings
from loaders.errors import LoadError
from loaders.formats import problems
from loaders.formats.blocks import Parsed, choose_title
from loaders.formats.containers import expect, read_text
from loaders.text import normalise

# What the loader, the splitter and the retrievers fill in themselves.
_RESERVED = {
    *("source", "format", "marks", "start", "end", "page", "slide", "sheet", "headings", "table_header"),
    *("document_id", "score", "parts", "also_in", "duplicates"),
}
_MAX_PROBLEMS = 10  # bad lines reported at once
_SAMPLE_BYTES = 64 * 1024

_T = TypeVar("_T")


def read_json_lines(path: Path) -> Iterator[Parsed]:
    """One document per line, streamed; a file that is one JSON array is read as that.

    Raises:
        LoadError: after the good lines, naming each bad one as file:line; at once when most are bad.
    """
    expect(path, "text")
    with _open_text(path) as file:
        if file.read(1) == "[":
            yield from read_json(path)
            return
    yield from _lines(path)


def _lines(path: Path) -> Iterator[Parsed]:
    with _open_text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        yield from _documents(path, lines, _parse_line)


def _documents(
    path: Path, entries: Iterable[tuple[int, _T]], parse: Callable[[_T], dict[str, Any]]
) -> Iterator[Parsed]:
    """One document per entry, which comes with its line or its place in an array.

    Raises:
        LoadError: after the good ones, naming each bad one as file:number; at once when most are bad.
    """
    bad: list[tuple[str, str]] = []
    found = False
    for number, entry in entries:
        try:
            yield _record(parse(entry), path, number)
            found = True
        except _RecordError as problem:
            bad.append((f"{path}:{number}：{problem.zh}", f"{path}:{number}: {problem.en}"))
            if len(bad) >= _MAX_PROBLEMS:
                break
    if bad:
        raise LoadError("；".join(zh for zh, _ in bad), "; ".join(en for _, en in bad))
    if not found:
        raise problems.no_text(path)


def read_json(path: Path) -> Iterator[Parsed]:
    """One document per record of an array, one for a single record; any other JSON is one document, indented.

    Raises:
        LoadError: no JSON; or, after the good records, naming each bad one as file:place in the array.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json
            yield from _lines(path)
            return
        raise LoadError(
            f"{path}:{error.lineno}：不是合法的 JSON（{error.msg}）",
            f"{path}:{error.lineno}: not valid JSON ({error.msg})",
        ) from None
    records = data if isinstance(data, list) else [data]
    if records and all(isinstance(record, dict) and isinstance(record.get("text"), str) for record in records):
        yield from _documents(path, enumerate(records, start=1), lambda record: record)
        return
    pretty = normalise(json.dumps(data, ensure_ascii=False, indent=1)) if data else ""
    if not pretty:
        raise problems.no_text(path)
    yield Parsed(pretty, {"title": choose_title([], path.stem), "marks": []})


class _RecordError(Exception):
    def __init__(self, zh: str, en: str) -> None:
        super().__init__(zh)
        self.zh, self.en = zh, en


def _open_text(path: Path) -> TextIO:
    """The file as a stream of lines that end at \\n only, in its detected encoding."""
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
    name = encodings.bom_encoding(sample) or encodings.detect(sample[: sample.rfind(b"\n") + 1] or sample)
    stream = path.open(encoding=name, errors="replace", newline="\n")
    if stream.read(1) != "\ufeff":
        stream.seek(0)
    return stream


def _parse_line(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _RecordError(
            f"不是合法的 JSON（第 {error.colno} 列：{error.msg}）",
            f"not valid JSON (column {error.colno}: {error.msg})",
        ) from None
    except RecursionError:
        raise _RecordError("JSON 嵌套过深", "JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise _RecordError('应为 {"id","title","text"} 对象', 'must be an object {"id","title","text"}')
    return record


def _record(record: dict[str, Any], path: Path, number: int) -> Parsed:
    text = record.get("text")
    if not isinstance(text, str) or not (text := normalise(text)):
        raise _RecordError('缺少非空的 "text" 字段', 'needs a non-empty "text"')
    metadata: dict[str, Any] = {
        _field(key): value for key, raw in record.items() if key != "text" and (value := _scalar(raw)) is not None
    }
    if "id" in metadata:
        metadata["id"] = str(metadata["id"])
    title = metadata.get("title")
    metadata["title"] = str(title) if title not in (None, "") else choose_title([], f"{path.stem} {number}")
    metadata["marks"] = []
    return Parsed(text, metadata)


def _field(key: str) -> str:
    """The metadata key of a record's field: one that is filled in here or later gets a prefix."""
    key = normalise(key)  # first: "ｐage" is a page, too
    return f"record_{key}" if key in _RESERVED else key


def _scalar(value: object) -> str | int | float | bool | None:
    if isinstance(value, str):
        return normalise(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float) else None
