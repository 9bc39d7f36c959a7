"""Training rows: what is a row, what is not, and that every bad one is named before any is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.rows import (
    MAX_TEXT_CHARS,
    GenerationRow,
    RetrievalRow,
    RowsError,
    read_generation_rows,
    read_retrieval_rows,
    write_rows,
)
from loaders.errors import RagProjError

GOOD = {"query": "年假有几天？", "pos": ["年假十天。"], "neg": ["报销三十天。"]}


def written(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_row_has_what_the_file_says(tmp_path: Path) -> None:
    full = {
        **GOOD,
        "pos_scores": [1],
        "neg_scores": [-2.5],
        "prompt": "查询：",
        "pos_docs": [7],
        "neg_docs": ["b"],
        "id": 1,
        "type": "normal",
    }
    path = written(tmp_path / "a.jsonl", GOOD, "", full)
    plain, row = read_retrieval_rows([path])
    assert plain == RetrievalRow("年假有几天？", ("年假十天。",), ("报销三十天。",), file=str(path), line=1)
    assert row == RetrievalRow(
        query="年假有几天？",
        pos=("年假十天。",),
        neg=("报销三十天。",),
        pos_scores=(1.0,),
        neg_scores=(-2.5,),
        prompt="查询：",
        pos_docs=("7",),
        neg_docs=("b",),
        file=str(path),
        line=3,
    )


def test_optional_keys_may_be_null_as_hugging_face_writes_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {**GOOD, "prompt": None, "pos_scores": None, "neg_scores": None})
    assert read_retrieval_rows([path])[0].pos_scores is None


def test_a_row_without_negatives_is_a_row_but_the_key_must_be_there(tmp_path: Path) -> None:
    assert read_retrieval_rows([written(tmp_path / "a.jsonl", {**GOOD, "neg": []})])[0].neg == ()
    with pytest.raises(RowsError, match='"neg" is missing'):
        read_retrieval_rows([written(tmp_path / "b.jsonl", {"query": "问", "pos": ["答"]})])


BAD = [
    ({"pos": ["答"], "neg": []}, '"query" is missing'),
    ({"query": "问", "neg": []}, '"pos" is missing'),
    ({**GOOD, "query": "  "}, '"query" must be a non-empty text'),
    ({**GOOD, "query": 5}, '"query" must be a non-empty text, got 5'),
    ({**GOOD, "query": ["问"]}, '"query" must be'),
    ({**GOOD, "pos": "答"}, '"pos" must be a non-empty list'),
    ({**GOOD, "pos": []}, '"pos" must be a non-empty list'),
    ({**GOOD, "pos": ["答", ""]}, '"pos"[1] must be'),
    ({**GOOD, "neg": [None]}, '"neg"[0] must be'),
    ({**GOOD, "neg": {"a": 1}}, '"neg" must be a list'),
    ({**GOOD, "neg": ["别的", "年假十天。"]}, '"neg"[1] equals a positive'),
    ({**GOOD, "neg": [" 年假\n十天。 "]}, '"neg"[0] equals a positive'),
    ({**GOOD, "neg": ["x" * 1_000_000]}, '"neg"[0] has 1000000 characters, 100000 at most'),
    ({**GOOD, "prompt": 1}, '"prompt" must be a text'),
    ({**GOOD, "pos_scores": [1, 2], "neg_scores": [1]}, '"pos_scores" must be a list of 1'),
    ({**GOOD, "pos_scores": [1]}, "only one is there"),
    ({**GOOD, "pos_scores": ["1"], "neg_scores": [1]}, '"pos_scores" must be a list of numbers'),
    ({**GOOD, "pos_scores": [True], "neg_scores": [1]}, '"pos_scores" must be a list of numbers'),
    ({**GOOD, "pos_docs": [[1]]}, '"pos_docs" must be a list of document ids'),
    ({**GOOD, "neg_docs": []}, '"neg_docs" must be a list of 1'),
    ('{"query": "问", "pos": ["答"], "neg": []', "not valid JSON"),
    ('{"query": "问", "pos": ["答"], "neg": [], "pos_scores": [NaN], "neg_scores": []}', "list of numbers"),
    ('["query"]', "must be a JSON object"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_is_named_with_its_line_in_both_languages(
    tmp_path: Path, row: dict[str, Any] | str, said: str
) -> None:
    path = written(tmp_path / "a.jsonl", GOOD, row, GOOD)
    with pytest.raises(RowsError) as caught:
        read_retrieval_rows([path])
    assert caught.value.total == 1
    assert f"{path}:2: " in caught.value.en
    assert said in caught.value.en
    assert f"{path}:2：" in caught.value.zh
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000  # a text of a megabyte is not in its message


def test_every_bad_row_of_every_file_is_in_one_error(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", GOOD, *(row for row, _ in BAD))
    second = written(tmp_path / "b.jsonl", {**GOOD, "pos": 1}, GOOD)
    with pytest.raises(RowsError) as caught:
        read_retrieval_rows([first, second])
    assert caught.value.total == len(BAD) + 1
    assert [problem.line for problem in caught.value.problems] == list(range(2, 22))  # the first twenty
    assert f"and {len(BAD) + 1 - 20} more" in caught.value.en
    assert f"另有 {len(BAD) + 1 - 20} 行" in caught.value.zh


def test_a_broken_line_at_row_400_000_is_found(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    line = json.dumps({"query": "问", "pos": ["答"], "neg": []}) + "\n"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line for _ in range(399_999))
        file.write('{"query": "问", "pos": ["答"\n')
        file.write(line)
    with pytest.raises(RowsError, match=r"big\.jsonl:400000: not valid JSON"):
        read_retrieval_rows([path])


def test_a_text_of_the_greatest_length_is_a_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {**GOOD, "neg": ["长" * MAX_TEXT_CHARS]})
    assert len(read_retrieval_rows([path])[0].neg[0]) == MAX_TEXT_CHARS
    with pytest.raises(RowsError, match="11 characters, 10 at most"):
        read_retrieval_rows([written(path, {**GOOD, "neg": ["长" * 11]})], max_text_chars=10)


def test_a_passage_that_many_rows_share_is_in_memory_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", *({**GOOD, "query": f"问{number}"} for number in range(3)))
    rows = read_retrieval_rows([path])
    assert len({id(row.neg[0]) for row in rows}) == 1


def test_an_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(RagProjError, match=r"a\.jsonl has no row"):
        read_retrieval_rows([tmp_path / "a.jsonl"])
    with pytest.raises(RagProjError, match=r"b\.jsonl"):
        read_retrieval_rows([tmp_path / "b.jsonl"])


def test_rows_are_written_as_they_are_read(tmp_path: Path) -> None:
    rows = [
        RetrievalRow("问\u2028", ("答",), ("非",), (1.0,), (0.5,), "查询：", ("a",), ("b",)),
        RetrievalRow("问", ("答",)),
    ]
    path = tmp_path / "a.jsonl"
    assert write_rows(path, rows) == 2
    assert [row.as_dict() for row in read_retrieval_rows([path])] == [row.as_dict() for row in rows]
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[1]) == {"query": "问", "pos": ["答"], "neg": []}


def test_flagembeddings_own_loader_takes_what_is_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.jsonl"
    write_rows(path, [RetrievalRow(**{**GOOD, "pos": ("答",), "neg": ("非",)}, pos_docs=("a",), neg_docs=("b",))])
    # as FlagEmbedding.abc.finetune.embedder.AbsDataset reads it
    (row,) = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert (row["query"], row["pos"], row["neg"]) == (GOOD["query"], ["答"], ["非"])


def test_generation_rows_are_checked_with_the_same_care(tmp_path: Path) -> None:
    good = {"question": "年假有几天？", "references": ["年假十天。", "报销三十天。"], "answer": "十天。"}
    refusal = {"question": "量子？", "references": [], "answer": "资料中没有。", "refuse": True}
    path = written(tmp_path / "a.jsonl", good, refusal)
    rows = read_generation_rows([path])
    assert rows[0] == GenerationRow("年假有几天？", ("年假十天。", "报销三十天。"), "十天。", file=str(path), line=1)
    assert rows[1].refuse
    assert [row.as_dict() for row in rows] == [good, refusal]
    bad = [{**good, "references": []}, {**good, "answer": ""}, {**good, "refuse": 1}, {"question": "问"}]
    with pytest.raises(RowsError) as caught:
        read_generation_rows([written(path, *bad)])
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]
