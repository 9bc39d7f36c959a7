"""JSON records of a file one at a time, in bounded memory; what cannot be read is named by its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TextIO

from chains.caches import beside
from loaders.errors import RagProjError

MAX_RECORD_BYTES = 64 * 1024 * 1024  # of one line; a hundred references of a record have about 0.5 MB
_READ_CHARS = 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_FIRST = re.compile(rb"\s*(\S)")
# JSON's way to write half a character, which no text file can hold
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_TOKEN = 32  # characters of JSON that may be cut at the end of what was read, but for strings
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Problem:
    """A place in a file that cannot be used, and why."""

    file: str
    line: int
    zh: str
    en: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}：{self.zh} / {self.file}:{self.line}: {self.en}"


class BadRecordError(Exception):
    """Why a record cannot be used; its place is known to who reads the file."""

    def __init__(self, zh: str, en: str) -> None:
        super().__init__(en)
        self.zh, self.en = zh, en

    def at(self, path: Path, line: int) -> Problem:
        """The problem with its place."""
        return Problem(str(path), line, self.zh, self.en)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    r"""(line number from 1, record) of every object in a file of JSON lines or one JSON array, whatever its suffix.

    Lines end at `\n` alone (a text may contain U+2028); blank ones are passed over. A line that is no JSON object is a
    `Problem` in its place, and reading goes on behind it.

    Raises:
        RagProjError: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_BOM)) != _BOM:
                file.seek(0)
            first = _FIRST.match(file.peek(4096))
            if first is None or first[1] != b"[":
                yield from _read_lines(file, path)
                return
        with path.open(encoding="utf-8-sig", newline="\n") as text:
            yield from _read_array(text, path)
    except OSError as error:
        raise RagProjError(
            f"无法读取文件 {path}：{error.strerror or error}，请检查路径",
            f"cannot read file {path}: {error.strerror or error}; check the path",
        ) from error


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """How many records were written, one JSON object a line; the file is there when all of them are."""
    written = 0
    with beside(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json_line(record))
            written += 1
    return written


def json_line(record: Mapping[str, Any]) -> str:
    """The record as a line of a file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _read_lines(file: BufferedReader, path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    number = 0
    while line := file.readline(MAX_RECORD_BYTES):
        number += 1
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, _too_long().at(path, number)
        elif line.strip():
            try:
                yield number, parse_object(line.decode().rstrip())
            except UnicodeDecodeError as error:
                bad = BadRecordError(
                    f"不是 UTF-8 编码（第 {error.start + 1} 个字节）", f"not UTF-8 (byte {error.start + 1})"
                )
                yield number, bad.at(path, number)
            except BadRecordError as error:
                yield number, error.at(path, number)


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        BadRecordError: it is not JSON, not an object, nested too deeply, or holds half a character.
    """
    try:
        value = json.loads(text)
    except ValueError as error:  # JSONDecodeError, or a number with thousands of digits
        raise _not_json(error) from None
    except RecursionError:
        raise BadRecordError("JSON 嵌套过深", "JSON is nested too deeply") from None
    return _checked(value, text)


def _checked(value: object, text: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BadRecordError(f"应为 JSON 对象 {{…}}，实际是 {kind}", f"must be a JSON object {{…}}, got {kind}")
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecordError(
                "含有不成对的代理字符（\\ud800 之类），不是合法的文字",
                "holds an unpaired surrogate such as \\ud800, which is no text",
            ) from None
    return value


def _read_array(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """The records of one JSON array; behind one that cannot be read, from the next line that begins like the first."""
    reader = _ArrayReader(file)
    try:
        yield from reader.records(path)
    except UnicodeDecodeError:
        bad = BadRecordError("不是 UTF-8 编码，其后的内容没有读取", "not UTF-8; what stands behind it was not read")
        yield reader.line, bad.at(path, reader.line)


class _ArrayReader:
    """A window on a file that holds one array: it grows until a record fits, and moves on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._position = 0
        self._ended = False
        self._decoder = json.JSONDecoder()
        self.line = 1

    def records(self, path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
        self._read_more()
        self._move(self._text.index("[") + 1)
        start: re.Pattern[str] | None = None
        while self._skip_separators():
            if self._text[self._position] == "]":
                return
            if start is None:  # how a line begins on which a record begins
                indent = self._text[self._text.rfind("\n", 0, self._position) + 1 : self._position]
                start = re.compile(rf"\n{indent if indent.isspace() else ''}(?=\{{)")
            line = self.line
            try:
                yield line, self._next_record()
            except BadRecordError as error:
                yield line, error.at(path, line)
                if not self._skip_to(start):
                    return
        yield self.line, BadRecordError("数组没有结尾的 ]", "the array has no closing ]").at(path, self.line)

    def _next_record(self) -> dict[str, Any]:
        """The record at the position, which moves behind it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except RecursionError:
                raise BadRecordError("JSON 嵌套过深", "JSON is nested too deeply") from None
            except ValueError as error:
                if self._ended or not self._may_be_cut(error):
                    raise _not_json(error, column=False) from None
                if len(self._text) - self._position >= MAX_RECORD_BYTES:
                    raise _too_long() from None
                self._read_more()
                continue
            text = self._text[self._position : end]
            self._move(end)
            return _checked(value, text)

    def _may_be_cut(self, error: ValueError) -> bool:
        """Whether the record may be fine, its rest not yet read: the error stands at the end, or in an open string."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_TOKEN

    def _skip_separators(self) -> bool:
        """Whether anything stands behind white space and commas."""
        while True:
            match = _BETWEEN.match(self._text, self._position)
            self._move(match.end() if match else self._position)
            if self._position < len(self._text):
                return True
            if self._ended:
                return False
            self._read_more()

    def _skip_to(self, start: re.Pattern[str]) -> bool:
        while not (match := start.search(self._text, self._position + 1)):
            if self._ended:
                return False
            self._move(max(self._position, len(self._text) - 256))  # a line end may be cut in two
            self._read_more()
        self._move(match.end())
        return True

    def _read_more(self) -> None:
        """As much again as is unread, so that a long record is tried few times."""
        rest = self._text[self._position :]
        more = self._file.read(max(_READ_CHARS, len(rest)))
        self._ended = not more
        self._text, self._position = rest + more, 0

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position


def _not_json(error: ValueError, *, column: bool = True) -> BadRecordError:
    if not isinstance(error, json.JSONDecodeError):
        return BadRecordError(f"不是合法的 JSON（{error}）", f"not valid JSON ({error})")
    zh, en = (f"第 {error.colno} 列：", f"column {error.colno}: ") if column else ("", "")
    return BadRecordError(f"不是合法的 JSON（{zh}{error.msg}）", f"not valid JSON ({en}{error.msg})")


def _too_long() -> BadRecordError:
    megabytes = MAX_RECORD_BYTES // 1024 // 1024
    return BadRecordError(f"一条记录超过 {megabytes} MB", f"a record of more than {megabytes} MB")
