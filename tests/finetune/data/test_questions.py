"""Questions with known passages as rows, split by passage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.questions import OUTPUTS, QuestionRowsConfig, convert_questions, read_passages, rows_from_questions
from finetune.data.rows import RowsError, read_retrieval_rows
from loaders.errors import RagProjError, UsageError


def written(path: Path, *records: dict[str, Any] | str) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    return written(
        tmp_path / "passages.jsonl",
        {"id": "a", "title": "年假", "text": "十天。"},
        {"id": 2, "title": "", "text": "报销三十天。", "source": "手册.md"},
        {"id": "c", "text": "转速一万二千转。"},
        {"id": "d", "text": "报销 三十天。"},
    )


def test_a_question_names_what_answers_it_and_what_does_not(tmp_path: Path, passages: Path) -> None:
    questions = written(
        tmp_path / "q.jsonl",
        {"id": 1, "question": "报销几天？", "context_id": 2, "pos_ids": [2], "neg_ids": ["a", "c", "d"]},
        {"question": "量子？", "answers": []},
        {"question": "年假几天？", "context_id": "a"},
        {"question": "年假几天？", "context_id": "a"},
    )
    rows, records = rows_from_questions(questions, read_passages([passages]))
    first, second = rows
    assert (first.query, first.pos, first.pos_docs) == ("报销几天？", ("报销三十天。",), ("手册.md",))
    assert first.neg == ("年假\n十天。", "转速一万二千转。")  # "d" equals the positive; a title stands in front
    assert first.neg_docs == ("a", "c")
    assert (second.pos, second.neg, second.line) == (("年假\n十天。",), (), 3)
    assert [record["question"] for record in records] == ["报销几天？", "年假几天？"]


def test_bad_questions_and_passages_are_all_named(tmp_path: Path, passages: Path) -> None:
    questions = written(
        tmp_path / "q.jsonl",
        {"question": "年假？", "context_id": "z"},
        {"question": "年假？", "pos_ids": "a"},
        {"context_id": "a"},
        "oops",
        {"question": "年假？", "context_id": "a"},
    )
    with pytest.raises(RowsError) as caught:
        rows_from_questions(questions, read_passages([passages]))
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]
    assert "no passage file has z" in caught.value.en
    bad = written(tmp_path / "p.jsonl", {"id": "a", "text": ""}, {"text": "文"}, {"id": "a", "text": "另一段"}, "oops")
    with pytest.raises(RowsError) as caught:
        read_passages([passages, bad])
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]
    assert "stands for another text" in caught.value.en


def test_questions_without_passages_make_no_rows(tmp_path: Path, passages: Path) -> None:
    questions = written(tmp_path / "q.jsonl", {"question": "量子？"})
    with pytest.raises(RagProjError, match="context_id"):
        rows_from_questions(questions, read_passages([passages]))


def test_real_questions_are_split_by_passage(shared_data: Path, tmp_path: Path) -> None:
    questions, passages = shared_data / "cmrc2018_trial.jsonl", shared_data / "cmrc2018_trial_passages.jsonl"
    report = convert_questions(questions, [passages], tmp_path / "out")
    # 1,002 questions over 256 passages (README of the data), two of them blank; dev has a fifth at most
    assert sum(report["rows"].values()) == 1000
    assert 180 <= report["rows"]["dev"] <= 200
    assert report["passages"] == 256
    train, dev = (read_retrieval_rows([tmp_path / "out" / name]) for name in OUTPUTS[:2])
    assert not {row.pos[0] for row in train} & {row.pos[0] for row in dev}
    with (tmp_path / "out" / "dev_questions.jsonl").open(encoding="utf-8") as file:
        asked = [json.loads(line) for line in file]
    assert [one["question"] for one in asked] == [row.query for row in dev]
    assert all(one["context_id"] in (row.pos_docs or ()) for one, row in zip(asked, dev, strict=True))


def test_the_seed_decides_and_results_are_not_replaced_unasked(tmp_path: Path, passages: Path) -> None:
    questions = written(tmp_path / "q.jsonl", *({"question": f"问{one}", "context_id": one} for one in ("a", "2", "c")))
    config = QuestionRowsConfig(dev_share=0.4, seed=1)
    assert convert_questions(questions, [passages], tmp_path / "out", config)["rows"] == {"train": 2, "dev": 1}
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="--overwrite"):
        convert_questions(questions, [passages], tmp_path / "out", config)
    convert_questions(questions, [passages], tmp_path / "out", config, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
