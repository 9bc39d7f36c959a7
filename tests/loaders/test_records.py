"""JSON and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.documents import LoaderConfig, read_file
from loaders.errors import LoadError
from loaders.formats.blocks import Parsed

Write = Callable[[str, str | bytes], Path]


def read(path: Path) -> list[Parsed]:
    return list(read_file(path, LoaderConfig()))


def lines(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_each_record_is_a_document_with_its_id_and_fields(write: Write) -> None:
    record = {
        "id": "law-1",
        "title": "刑法",
        "text": "第一条　为了惩罚犯罪",
        "article": "第一条",
        "year": 1997,
        "valid": True,
    }
    (document,) = read(write("a.jsonl", lines(record)))
    assert document.text == "第一条 为了惩罚犯罪"
    assert {key: document.metadata[key] for key in ("id", "title", "article", "year", "valid", "format", "marks")} == {
        "id": "law-1",
        "title": "刑法",
        "article": "第一条",
        "year": 1997,
        "valid": True,
        "format": "jsonl",
        "marks": [],
    }


def test_lists_objects_and_nulls_are_no_metadata(write: Write) -> None:
    (document,) = read(write("a.jsonl", lines({"text": "甲", "tags": ["x"], "more": {"a": 1}, "none": None})))
    assert set(document.metadata) == {"title", "marks", "source", "format"}


def test_numbers_that_json_does_not_know_are_left_out(write: Write) -> None:
    (document,) = read(write("a.jsonl", '{"text": "甲", "x": NaN, "y": Infinity}\n'))
    assert not {"x", "y"} & set(document.metadata)


def test_numeric_ids_become_strings(write: Write) -> None:
    assert read(write("a.jsonl", lines({"id": 7, "text": "甲"})))[0].metadata["id"] == "7"


def test_a_record_without_id_has_none(write: Write) -> None:
    assert "id" not in read(write("a.jsonl", lines({"text": "甲"})))[0].metadata


def test_fields_that_the_loader_fills_in_keep_their_record_value_under_another_name(write: Write) -> None:
    path = write("a.jsonl", lines({"text": "甲", "source": "原书", "page": 12, "marks": "x"}))
    (document,) = read(path)
    assert document.metadata["source"] == str(path)
    assert document.metadata["record_source"] == "原书"
    assert document.metadata["record_page"] == 12
    assert document.metadata["marks"] == []


def test_a_record_without_title_is_named_after_file_and_line(write: Write) -> None:
    documents = read(write("问答.jsonl", lines({"text": "甲"}, {"text": "乙", "title": ""})))
    assert [document.metadata["title"] for document in documents] == ["问答 1", "问答 2"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(write: Write) -> None:
    """U+2028 stands in two rows of the project's data; `str.splitlines` would cut there."""
    documents = read(write("a.jsonl", '{"text": "甲\u2028乙\x85丙"}\n{"text": "丁"}\n'))
    assert [document.text for document in documents] == ["甲\n乙\n丙", "丁"]


def test_blank_lines_a_byte_order_mark_and_crlf_are_no_problem(write: Write) -> None:
    data = b"\xef\xbb\xbf" + '{"text": "甲"}\r\n\r\n  \r\n{"text": "乙"}'.encode()
    assert [document.text for document in read(write("a.jsonl", data))] == ["甲", "乙"]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8-sig"])
def test_other_encodings_are_detected(encoding: str, write: Write) -> None:
    content = lines({"text": "劳动合同应当以书面形式订立"}, {"text": "试用期最长不得超过六个月"})
    documents = read(write("a.jsonl", content.encode(encoding)))
    assert [document.text for document in documents] == ["劳动合同应当以书面形式订立", "试用期最长不得超过六个月"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": "x"', "不是合法的 JSON"),
        ("[1, 2]", "应为"),
        ('"text"', "应为"),
        ('{"title": "只有标题"}', '缺少非空的 "text"'),
        ('{"text": "  "}', '缺少非空的 "text"'),
        ('{"text": 5}', '缺少非空的 "text"'),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(bad: str, reason: str, write: Write) -> None:
    path = write("a.jsonl", f'{{"text": "甲"}}\n{bad}\n{{"text": "乙"}}\n')
    documents = read_file(path, LoaderConfig())
    assert next(documents).text == "甲"
    assert next(documents).text == "乙"
    with pytest.raises(LoadError, match=reason) as caught:
        next(documents)
    assert f"{path}:2" in caught.value.zh
    assert f"{path}:2" in caught.value.en


def test_bad_lines_are_reported_together_up_to_ten(write: Write) -> None:
    path = write("a.jsonl", '{"text": "甲"}\n' + "坏\n" * 50)
    with pytest.raises(LoadError) as caught:
        read(path)
    assert caught.value.en.count("not valid JSON") == 10


def test_an_array_of_records_is_read_from_either_suffix(write: Write) -> None:
    content = json.dumps([{"id": "1", "text": "甲"}, {"id": "2", "text": "乙"}], ensure_ascii=False, indent=1)
    for name in ("a.json", "a.jsonl"):
        assert [document.metadata["id"] for document in read(write(name, content))] == ["1", "2"]


def test_json_lines_under_the_name_json_are_read(write: Write) -> None:
    assert [document.text for document in read(write("a.json", lines({"text": "甲"}, {"text": "乙"})))] == ["甲", "乙"]


def test_a_single_record_is_one_document(write: Write) -> None:
    assert read(write("a.json", '{"id": "x", "text": "甲"}'))[0].metadata["id"] == "x"


def test_any_other_json_is_one_readable_document(write: Write) -> None:
    (document,) = read(write("配置.json", '{"名称": "测试", "列表": [1, 2]}'))
    assert '"名称": "测试"' in document.text
    assert document.metadata["title"] == "配置"


@pytest.mark.parametrize(("content", "place"), [('{"a": }', ":1"), ('{\n"a": 1,\n}', ":")])
def test_broken_json_is_reported_with_its_line(content: str, place: str, write: Write) -> None:
    path = write("a.json", content)
    with pytest.raises(LoadError, match="不是合法的 JSON") as caught:
        read(path)
    assert f"{path}{place}" in caught.value.en


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.json", "{}"), ("a.jsonl", "\n\n"), ("a.json", "")])
def test_no_records_are_no_text(name: str, content: str, write: Write) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        read(write(name, content))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_arrays_one_after_another_are_named_line_by_line(name: str, write: Write) -> None:
    path = write(name, '[{"text": "甲"}]\n[{"text": "乙"}]\n')
    with pytest.raises(LoadError) as raised:
        read(path)
    assert f"{path}:1: must be an object" in raised.value.en
    assert f"{path}:2: must be an object" in raised.value.en


def test_a_blank_record_of_an_array_is_named_by_its_place_after_the_good_ones(write: Write) -> None:
    path = write("a.json", '[{"text": "甲"}, {"text": " "}, {"text": "丙"}]')
    documents = []
    with pytest.raises(LoadError) as raised:
        for document in read_file(path, LoaderConfig()):
            documents.append(document.text)
    assert documents == ["甲", "丙"]
    assert f'{path}:2: needs a non-empty "text"' in raised.value.en


def test_lone_surrogates_do_not_reach_the_store(write: Write) -> None:
    (document,) = read(write("a.jsonl", '{"text": "甲\\ud800乙", "title": "\\udfff题", "note": "\\ud83d"}\n'))
    assert document.text == "甲乙"
    assert json.dumps(document.metadata, ensure_ascii=False).encode()


def test_lines_are_streamed(write: Write) -> None:
    """The first record is there although the file never becomes valid after it."""
    documents = read_file(write("a.jsonl", lines({"text": "甲"}) + "坏" * 10), LoaderConfig())
    assert next(documents).text == "甲"


@pytest.mark.parametrize(
    "field", ["parts", "also_in", "document_id", "score", "duplicates", "headings", "ｐage", "ｈeadings"]
)
def test_a_field_that_is_filled_in_by_the_program_gets_a_prefix_however_wide_it_is_written(
    write: Write, field: str
) -> None:
    (document,) = read(write("a.jsonl", lines({"text": "甲", field: 12})))
    plain = {"ｐage": "page", "ｈeadings": "headings"}.get(field, field)
    assert document.metadata[f"record_{plain}"] == 12
    assert plain not in document.metadata
