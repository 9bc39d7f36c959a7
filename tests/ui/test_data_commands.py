"""`ragproj data …` as its users have it: exit codes, one JSON object, files that fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ui.cli import build_parser, main

ACTIONS = ["data multi-doc-qa", "data rows", "data mine", "finetune bge", "finetune reranker"]


def record(number: int) -> dict[str, Any]:
    return {
        "QA": [{"question": f"第{number}条规定了什么？", "answer": f"规定了事项{number}。"}],
        "positive_doc": [{"text": f"第{number}条\n\n" + f"事项{number}按规定{number * 7}办理。" * 3}],
        "negative_doc": [{"text": f"附件{number}之{place}：表格{place * 31 + number}。"} for place in range(12)],
    }


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    lines = [json.dumps(record(number), ensure_ascii=False) for number in range(20)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "法律-001.json").write_text("\n".join([*lines, "oops"]), encoding="utf-8")
    return tmp_path / "raw"


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_help_and_the_common_options(capsys: pytest.CaptureFixture[str], action: str) -> None:
    status, out, _ = run(capsys, *action.split(), "--help")
    assert status == 0
    assert all(option in out for option in ("--config", "--json", "KEY=VALUE"))


@pytest.mark.parametrize(
    "words",
    [["data"], ["finetune"], ["data", "none"], ["data", "mine"], ["data", "multi-doc-qa", "x"], ["finetune", "bge"]],
)
def test_wrong_use_exits_with_2_and_the_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert "usage: ragproj" in err


def test_the_raw_files_become_rows_that_mining_and_evaluate_take(
    capsys: pytest.CaptureFixture[str], raw: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows"
    status, printed, _ = run(capsys, "data", "multi-doc-qa", raw, "seed=3", "--out", out, "--json", "dev_share=0.2")
    report = json.loads(printed)
    assert status == 0
    assert report["rows"] == {"train": 16, "dev": 4}
    assert (report["config"]["seed"], report["bad_records"]["count"]) == (3, 1)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report

    mined = tmp_path / "mined.jsonl"
    words = ["data", "mine", "--rows", out / "retrieval_train.jsonl", "negatives=10", "--out", mined, "--json"]
    status, printed, _ = run(capsys, *words, "choose=hardest")
    assert status == 0
    assert json.loads(printed)["rows"] == 16

    kb = tmp_path / "kb"
    assert run(capsys, "ingest", out / "dev_passages.jsonl", "--kb", kb)[0] == 0
    questions = out / "dev_questions.jsonl"
    status, printed, _ = run(capsys, "evaluate", "--kb", kb, "--questions", questions, "--retrieval-only", "--json")
    assert status == 0
    assert json.loads(printed)["retrieval"]["recall@5"] == 1.0  # the number of the article stands in each question


def test_without_json_the_report_is_lines_and_bad_records_are_on_stderr(
    capsys: pytest.CaptureFixture[str], raw: Path, tmp_path: Path
) -> None:
    status, out, err = run(capsys, "data", "multi-doc-qa", raw, "--out", tmp_path / "rows")
    assert status == 0
    assert "rows: train 19, dev 1" in out
    assert "法律-001.json:21：" in err
    status, out, err = run(capsys, "data", "multi-doc-qa", raw, "--out", tmp_path / "rows")
    assert (status, out) == (2, "")
    assert "--overwrite" in err
    assert err.startswith("ragproj data multi-doc-qa: ")


def test_labelled_questions_become_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    passages, questions = tmp_path / "p.jsonl", tmp_path / "q.jsonl"
    passages.write_text('{"id": "a", "text": "十天。"}\n{"id": "b", "text": "三十天。"}\n', encoding="utf-8")
    questions.write_text(
        '{"question": "年假？", "context_id": "a"}\n{"question": "报销？", "context_id": "b"}\n', encoding="utf-8"
    )
    words = ["data", "rows", "--questions", questions, "--out", tmp_path / "out", "--json"]
    status, out, _ = run(capsys, *words, "--passages", passages, "dev_share=0.5")
    assert status == 0
    assert json.loads(out)["rows"] == {"train": 1, "dev": 1}
    questions.write_text('{"question": "年假？", "context_id": "z"}\n', encoding="utf-8")
    status, out, err = run(capsys, *words, "--overwrite", "--passages", passages)
    assert (status, out) == (1, "")
    assert "q.jsonl:1" in err


def test_a_wrong_setting_is_named(capsys: pytest.CaptureFixture[str], raw: Path, tmp_path: Path) -> None:
    status, _, err = run(capsys, "data", "multi-doc-qa", raw, "--out", tmp_path / "rows", "negative=3")
    assert status == 2
    assert "negatives" in err
    assert not (tmp_path / "rows").exists()


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys, ui.cli; ui.cli.build_parser();"
        " print([m for m in sys.modules if m in {'numpy','yaml','pydantic','tqdm'} or m.startswith('finetune')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("action", ACTIONS[:3])
def test_every_action_of_the_parser_is_a_function(action: str) -> None:
    from ui import data_commands

    need = {
        "data multi-doc-qa": ["x", "--out", "o"],
        "data rows": ["--questions", "q", "--passages", "p", "--out", "o"],
        "data mine": ["--rows", "r", "--out", "o"],
    }
    arguments = build_parser().parse_args([*action.split(), *need[action]])
    assert arguments.module == "ui.data_commands"
    assert callable(getattr(data_commands, arguments.function))
