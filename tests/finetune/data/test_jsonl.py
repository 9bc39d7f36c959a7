"""Records of a file one at a time: both layouts, odd line ends, and every kind of damage by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data import jsonl
from finetune.data.jsonl import Problem, read_records, write_records
from loaders.errors import RagProjError


def records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return [(line, record) for line, record in read_records(path) if isinstance(record, dict)]


def problems(path: Path) -> list[Problem]:
    return [record for _, record in read_records(path) if isinstance(record, Problem)]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "上一行\u2028下一行\u0085\u000b\x0c"
    path.write_text(f'{{"a":"{text[:-2]}"}}\n\n{{"a":"二"}}\n', encoding="utf-8", newline="")
    assert records(path) == [(1, {"a": text[:-2]}), (3, {"a": "二"})]


def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_the_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a":1}\r\n{"a":2}\r\n')
    assert records(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_reads_like_lines_with_the_line_each_record_begins_on(
    tmp_path: Path, indent: int | None, mark: str
) -> None:
    path = tmp_path / "a.json"
    wanted = [{"a": "】], {", "b": [{"c": 1}]}, {"a": "二\u2028"}, {}]
    path.write_text(mark + json.dumps(wanted, ensure_ascii=False, indent=indent), encoding="utf-8")
    assert [record for _, record in records(path)] == wanted
    # counted by hand: with an indent the first record begins on line 2 and takes 8 lines, the second 3
    assert [line for line, _ in records(path)] == ([1, 1, 1] if indent is None else [2, 10, 13])


def test_an_array_is_read_in_pieces_however_they_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    wanted = [{"text": "知识库" * size, "n": 123456789, "e": '\n\\"'} for size in range(40)]
    path.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    for characters in (1, 7, 64, 1000):
        monkeypatch.setattr(jsonl, "_READ_CHARS", characters)
        assert [record for _, record in records(path)] == wanted


def test_an_array_goes_on_behind_a_record_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n {"a": oops, "b": [\n  {"a": 9}]},\n {"a": 3}\n]', encoding="utf-8")
    assert records(path) == [(2, {"a": 1}), (5, {"a": 3})]
    assert [problem.line for problem in problems(path)] == [3]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},', '[{"a": 1}, {"a": '])
def test_an_array_that_breaks_off_is_a_problem_behind_its_good_records(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert records(path) == [(1, {"a": 1})]
    assert len(problems(path)) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": ', "JSON"),
        (b"[1]", "list"),
        (b"null", "NoneType"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "ud800"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "4300"),
    ],
)
def test_a_bad_line_is_named_and_the_lines_behind_it_are_read(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert records(path) == [(1, {"a": 1}), (3, {"a": 3})]
    (problem,) = problems(path)
    assert (problem.file, problem.line) == (str(path), 2)
    assert said in problem.zh
    assert said in problem.en


def test_a_whole_pair_of_surrogates_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "😀"}) + "\n", encoding="utf-8")
    assert "\\ud83d" in path.read_text(encoding="utf-8")
    assert records(path) == [(1, {"a": "😀"})]


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": "%s"}\n{"a": 3}\n', '[{"a": 1},\n{"a": "%s"},\n{"a": 3}]'])
def test_a_record_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 2_000)
    monkeypatch.setattr(jsonl, "_READ_CHARS", 500)
    path = tmp_path / "a.json"
    path.write_text(text % ("x" * 9_000), encoding="utf-8")
    assert records(path) == [(1, {"a": 1}), (3, {"a": 3})]
    assert [problem.line for problem in problems(path)] == [2]


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_file_has_no_records(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    assert list(read_records(path)) == []


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RagProjError, match=r"none\.jsonl"):
        list(read_records(tmp_path / "none.jsonl"))


def test_what_is_written_reads_back_and_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    wanted = [{"a": "行\u2028尾\n"}, {"b": [1.5, None]}]
    assert write_records(path, wanted) == 2
    assert [record for _, record in records(path)] == wanted
    with pytest.raises(ValueError, match="float"):
        write_records(path, [{"a": 1}, {"a": float("nan")}])
    assert [record for _, record in records(path)] == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
