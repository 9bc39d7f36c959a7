"""The `ragproj` command as its users have it: real processes, exit codes, one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ui.cli import build_parser, main, split_overrides

HANDBOOK = """# 员工手册

## 年假

入职满一年的员工每年享有十天带薪年假。年假须在当年十二月三十一日前休完。

## 报销

差旅费用应在返回后三十天内报销，逾期不予受理。报销由财务部的李雷负责审批。
"""
DEVICE = "XR-7 型离心机的最高转速是每分钟一万二千转。XR-7 的保修期为三年。\n"
SPEED = "XR-7 的最高转速是多少？"
NONSENSE = "量子色动力学的渐近自由是谁发现的？"
VERBS = [
    *("serve", "ingest", "ask", "search", "evaluate", "sources", "remove", "check", "reembed", "import-faiss"),
    "validate",
]
# PYTHONUNBUFFERED hides what happens at exit to output that nobody reads any more
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in {"PYTHONUNBUFFERED", "RAGPROJ_PASSWORD"}
}


@dataclass
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"not one line: {self.out!r}"
        value = json.loads(lines[0])
        assert isinstance(value, dict)
        return value

    def assert_failed(self, status: int, *named: str) -> None:
        """One clear line in both languages, nothing on stdout, no traceback."""
        assert self.status == status, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        message = next(line for line in self.err.splitlines() if line.startswith("ragproj "))
        zh, slash, en = message.partition(" / ")
        assert slash
        assert re.search("[一-鿿]", zh)
        assert re.search("[A-Za-z]{3}", en)
        for name in named:
            assert name in message


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "ui.cli", *map(str, words)]


def ragproj(*words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Result:
    """The command in a process of its own."""
    done = subprocess.run(
        command(*words), capture_output=True, cwd=cwd, env=ENVIRONMENT | (env or {}), timeout=120, check=False
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: the same function the console script calls, without a second's start."""

    def call(*words: str | Path) -> Result:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "handbook.md").write_text(HANDBOOK, encoding="utf-8")
    (folder / "device.txt").write_text(DEVICE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def kb(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A knowledge base of two files, made by the command; tests that change one take a copy."""
    path = tmp_path_factory.mktemp("cli") / "kb"
    result = ragproj("ingest", documents, "--kb", path, "--json")
    assert result.status == 0, result.err
    assert list(result.json) == ["added", "updated", "unchanged", "removed", "failed", "chunks", "cut", "seconds"]
    assert {key: result.json[key] for key in ("added", "updated", "unchanged", "removed", "failed")} == {
        "added": 2, "updated": 0, "unchanged": 0, "removed": 0, "failed": [],
    }  # fmt: skip
    assert result.json["chunks"] >= 2
    assert result.json["seconds"] > 0
    return path


@pytest.fixture
def copy(kb: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kb, tmp_path / "copy"))


def source_names(run: Run, kb: Path) -> list[str]:
    return [Path(row["source"]).name for row in run("sources", "--kb", kb, "--json").json["sources"]]


# -- the command itself --------------------------------------------------------------------------------------------


def test_help_lists_every_verb_in_half_a_second() -> None:
    times = []
    for _ in range(3):  # the machine may be busy; the command may not be slow three times
        started = time.perf_counter()
        result = ragproj("--help")
        times.append(time.perf_counter() - started)
    assert result.status == 0
    assert all(verb in result.out for verb in VERBS)
    assert "知识库" in result.out
    assert min(times) < 0.5


def test_help_and_parsing_import_nothing_heavy() -> None:
    code = (
        "import sys, ui.cli; ui.cli.build_parser();"
        " print([m for m in sys.modules if m in {'langchain_core','gradio','numpy','yaml','pydantic','torch','tqdm'}])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_the_common_options(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.status == 0
    for option in ("--kb", "--config", "--json", "KEY=VALUE"):
        assert option in result.out


def test_the_console_script_is_the_same_command() -> None:
    script = Path(sys.executable).parent / "ragproj"
    if not script.exists():
        pytest.skip("ragproj is not installed as a console script here")
    assert subprocess.check_output([script, "--help"]).decode() == ragproj("--help").out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["ask"],
        ["search"],
        ["remove"],
        ["ingest"],
        ["evaluate"],
        ["ask", "年假？", "--nonsense"],
        ["ask", "年假？", "extra"],
        ["search", "年假", "--top-k", "many"],
        ["serve", "--port", "http"],
        ["sources", "unexpected"],
    ],
)
def test_wrong_use_exits_with_2_and_the_usage(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert result.status == 2
    assert result.out == ""
    assert "usage: ragproj" in result.err


def test_only_names_like_config_keys_are_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "top_k=3").touch()
    words = [
        "a.txt",
        "top_k=3",
        "top_k=4",
        "llm._type=x",
        "/x/y=z.txt",
        "我=你",
        "a b=c",
        "=x",
        "a..b=c",
        "--x=1",
        "k=",
    ]
    assert split_overrides(words) == (
        ["a.txt", "top_k=3", "/x/y=z.txt", "我=你", "a b=c", "=x", "a..b=c", "--x=1"],
        ["top_k=4", "llm._type=x", "k="],
    )


def test_every_verb_of_the_parser_is_a_function() -> None:
    from ui import commands

    parser = build_parser()
    assert all(callable(getattr(commands, verb.replace("-", "_"))) for verb in VERBS)
    assert parser.parse_args(["ask", "年假？"]).verb == "ask"


# -- ingest --------------------------------------------------------------------------------------------------------


def test_ingest_again_changes_nothing(run: Run, documents: Path, copy: Path) -> None:
    result = run("ingest", documents, "--kb", copy, "--json")
    assert result.status == 0
    assert (result.json["added"], result.json["updated"], result.json["unchanged"]) == (0, 0, 2)
    assert result.json["chunks"] == 0


def test_ingest_takes_a_changed_file_as_a_new_version(run: Run, tmp_path: Path) -> None:
    document, kb = tmp_path / "a.txt", tmp_path / "kb"
    document.write_text("年假有十天。", encoding="utf-8")
    assert run("ingest", document, "--kb", kb, "--json").json["added"] == 1
    document.write_text("年假有二十天。", encoding="utf-8")
    assert run("ingest", document, "--kb", kb, "--json").json["updated"] == 1
    assert "二十天" in run("ask", "年假有几天？", "--kb", kb, "--json").json["result"]


def test_ingest_stores_the_good_files_and_names_every_bad_one(run: Run, tmp_path: Path) -> None:
    folder, kb = tmp_path / "mixed", tmp_path / "kb"
    folder.mkdir()
    (folder / "good.txt").write_text("年假有十天。", encoding="utf-8")
    (folder / "zero.txt").touch()
    (folder / "blank.md").write_text(" \n\n", encoding="utf-8")
    (folder / "odd.xyz").write_text("x", encoding="utf-8")
    (folder / "lie.pdf").write_text("not a pdf", encoding="utf-8")
    (folder / "broken.docx").write_bytes(b"PK\x03\x04 broken")
    missing = tmp_path / "missing.txt"
    result = run("ingest", folder, missing, "--kb", kb, "--json")
    assert result.status == 1
    assert result.json["added"] == 1
    failed = {Path(failure["path"]).name: failure["reason"] for failure in result.json["failed"]}
    assert set(failed) == {"zero.txt", "blank.md", "odd.xyz", "lie.pdf", "broken.docx", "missing.txt"}
    assert all(" / " in reason and name in reason for name, reason in failed.items())
    assert ".pdf" in failed["odd.xyz"]  # what is supported
    assert source_names(run, kb) == ["good.txt"]


def test_ingest_without_json_tells_the_failures_on_stderr_and_a_summary(run: Run, tmp_path: Path) -> None:
    (tmp_path / "zero.txt").touch()
    result = run("ingest", tmp_path / "zero.txt", "--kb", tmp_path / "kb")
    assert result.status == 1
    assert "zero.txt" in result.err
    assert result.out.startswith("新增 0，")
    assert "失败 1" in result.out


def test_a_missing_path_fails_with_its_name(run: Run, tmp_path: Path) -> None:
    result = run("ingest", tmp_path / "nope", "--kb", tmp_path / "kb", "--json")
    assert result.status == 1
    assert [failure["path"] for failure in result.json["failed"]] == [str(tmp_path / "nope")]


def test_an_empty_folder_fails_with_a_message(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("ingest", tmp_path / "empty", "--kb", tmp_path / "kb", "--json")
    assert result.status == 1
    assert result.json["added"] == 0
    assert re.search("没有.* / .*no file", result.err)


def test_sync_of_an_emptied_folder_removes_and_succeeds(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "docs" / "a.txt"
    file.parent.mkdir()
    file.write_text(DEVICE, encoding="utf-8")
    assert run("ingest", file.parent, "--kb", tmp_path / "kb").status == 0
    file.unlink()
    result = run("ingest", file.parent, "--kb", tmp_path / "kb", "--sync")
    assert (result.status, "移除 1" in result.out, result.err) == (0, True, "")


def test_a_folder_of_known_files_is_not_an_empty_one(run: Run, documents: Path, copy: Path) -> None:
    assert run("ingest", documents, "--kb", copy).status == 0


def test_ingest_of_overrides_alone_is_wrong_use(run: Run, tmp_path: Path) -> None:
    run("ingest", "top_k=3", "--kb", tmp_path / "kb").assert_failed(2, "ingest")


def test_paths_with_spaces_and_equals_signs_are_paths(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "top_k=3").write_text("x", encoding="utf-8")  # no suffix, but clearly a file
    (tmp_path / "a b=c 年假.txt").write_text("年假有十天。", encoding="utf-8")
    (tmp_path / "kb=x.txt").write_text("报销三十天。", encoding="utf-8")
    (tmp_path / "dir = 1").mkdir()
    (tmp_path / "dir = 1" / "k=v.txt").write_text("转速一万二千转。", encoding="utf-8")
    result = run("ingest", "a b=c 年假.txt", "kb=x.txt", "dir = 1", "top_k=2", "--kb", "my kb")
    assert result.status == 0, result.err
    assert source_names(run, tmp_path / "my kb") == ["a b=c 年假.txt", "k=v.txt", "kb=x.txt"]


def test_a_file_whose_name_is_not_utf8_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt")).write_text("年假有十天。", encoding="utf-8")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (folder / "ok.txt").write_text("转速一万二千转。", encoding="utf-8")
    result = ragproj("ingest", folder, "--kb", tmp_path / "kb", "--json")
    assert "Traceback" not in result.err
    assert result.json["added"] >= 1
    assert result.json["added"] + len(result.json["failed"]) == 2


def test_stdout_is_json_alone_and_the_log_goes_to_stderr(documents: Path, tmp_path: Path) -> None:
    result = ragproj("ingest", documents, "--kb", tmp_path / "kb", "--json", "--verbose")
    assert result.json["added"] == 2
    assert "INFO:chains" in result.err


def test_a_knowledge_base_path_that_is_a_file_is_a_clear_error(run: Run, documents: Path) -> None:
    run("ingest", documents, "--kb", documents / "device.txt").assert_failed(1, "device.txt")


# -- ask -----------------------------------------------------------------------------------------------------------


def test_ask_json_is_the_chains_dictionary(run: Run, kb: Path, documents: Path) -> None:
    result = run("ask", SPEED, "--kb", kb, "--json")
    assert result.status == 0
    output = result.json
    assert set(output) == {"query", "result", "source_documents", "citations", "refused"}
    assert output["query"] == SPEED
    assert "一万二千转" in output["result"]
    assert output["refused"] is False
    (citation,) = output["citations"]
    assert {"n", "source", "page", "start", "end", "quote"} <= set(citation)
    assert citation["source"] == str(documents / "device.txt")
    assert DEVICE[citation["start"] : citation["end"]] == citation["quote"]
    assert all("text" in document and "metadata" in document for document in output["source_documents"])


def test_ask_prints_the_answer_and_where_it_stands(run: Run, kb: Path, documents: Path) -> None:
    result = run("ask", SPEED, "--kb", kb)
    assert result.status == 0
    answer, place = result.out.rstrip("\n").split("\n")[0], result.out.rstrip("\n").split("\n")[-1]
    assert answer.startswith("XR-7 型离心机的最高转速是每分钟一万二千转。")
    assert re.fullmatch(rf"\[1\] {re.escape(str(documents / 'device.txt'))} @\d+-\d+", place)


def test_a_refusal_is_an_answer_and_exits_with_0(run: Run, kb: Path) -> None:
    result = run("ask", NONSENSE, "--kb", kb, "--json")
    assert result.status == 0
    assert (result.json["refused"], result.json["citations"]) == (True, [])


@pytest.mark.parametrize("verb", ["ask", "search"])
@pytest.mark.parametrize("question", ["", "  \t"])
def test_an_empty_question_is_wrong_use(run: Run, kb: Path, verb: str, question: str) -> None:
    run(verb, question, "--kb", kb, "--json").assert_failed(2, verb)


def test_a_question_of_a_hundred_thousand_characters_is_wrong_use_and_names_the_limit(kb: Path) -> None:
    # one argument may have 128 KiB on Linux, so ASCII here; Chinese in tests/chains/test_retrieval_qa.py
    ragproj("ask", "a" * 100_000, "--kb", kb).assert_failed(2, "100000", "4000")


def test_a_question_that_is_not_utf8_does_no_harm(kb: Path) -> None:
    result = ragproj(os.fsdecode(b"ask"), os.fsdecode("转速".encode() + b"\xff"), "--kb", kb, "--json")
    assert result.status == 0, result.err
    assert "一万二千转" in result.json["result"]


def test_a_question_that_begins_with_a_dash_or_looks_like_an_override_is_a_question(run: Run, kb: Path) -> None:
    assert run("ask", "--kb", kb, "--", "-5 度时 XR-7 的转速？").status == 0
    assert run("ask", "top_k=3", "--kb", kb, "--json").json["query"] == "top_k=3"


def test_a_missing_knowledge_base_says_what_to_run(run: Run, tmp_path: Path) -> None:
    for words in (["ask", "年假？"], ["search", "年假"], ["sources"], ["remove", "x"]):
        run(*words, "--kb", tmp_path / "none").assert_failed(1, str(tmp_path / "none"), "ragproj ingest")
    assert not (tmp_path / "none").exists()


def test_a_knowledge_base_of_another_embedder_is_refused_by_name(run: Run, kb: Path, documents: Path) -> None:
    for words in (["ask", "年假？"], ["search", "年假"], ["ingest", str(documents)]):
        run(*words, "--kb", kb, "embeddings.dimensions=512").assert_failed(1, "lexical-1024", "lexical-512")
    assert run("ask", SPEED, "--kb", kb).status == 0


def test_documents_are_listed_removed_and_checked_whatever_the_configured_embedder(
    run: Run, copy: Path, documents: Path
) -> None:
    words = ["embeddings.dimensions=256", "--kb", copy]
    listed = run("sources", "--json", *words)
    assert len(listed.json["sources"]) == 2
    assert run("check", *words).status == 0
    assert run("remove", "device.txt", *words).status == 0
    assert len(run("sources", "--json", *words).json["sources"]) == 1
    assert run("check", "--kb", copy).status == 0
    run("ask", SPEED, *words).assert_failed(1, "lexical-")


def test_a_generator_that_is_away_is_a_failure_with_its_address(run: Run, kb: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        words = ["llm._type=chat_model", "llm.model=tiny", f"llm.base_url={base_url}"]
        run("ask", SPEED, "--kb", kb, "--json", *words).assert_failed(1, base_url)


# -- search --------------------------------------------------------------------------------------------------------


def test_search_json_has_the_agreed_shape(run: Run, kb: Path, documents: Path) -> None:
    result = run("search", "转速", "--kb", kb, "--json", "--top-k", "2")
    assert result.status == 0
    assert list(result.json) == ["query", "hits"]
    assert result.json["query"] == "转速"
    hits = result.json["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2]
    assert all(list(hit) == ["rank", "score", "id", "source", "text", "metadata"] for hit in hits)
    assert hits[0]["source"] == str(documents / "device.txt")
    assert hits[0]["text"] in DEVICE
    assert isinstance(hits[0]["score"], float)


@pytest.mark.parametrize(("words", "count"), [(["--top-k", "1"], 1), (["top_k=1"], 1), (["retriever._type=dense"], 2)])
def test_search_takes_top_k_and_overrides(run: Run, kb: Path, words: list[str], count: int) -> None:
    assert len(run("search", "转速", "--kb", kb, "--json", *words).json["hits"]) == count


@pytest.mark.parametrize("top_k", ["0", "-1", "100000"])
def test_search_refuses_a_top_k_out_of_range(run: Run, kb: Path, top_k: str) -> None:
    run("search", "转速", "--kb", kb, "--top-k", top_k).assert_failed(2, "top_k", top_k)


def test_search_prints_rank_score_source_and_text(run: Run, kb: Path, documents: Path) -> None:
    lines = run("search", "转速", "--kb", kb, "--top-k", "1").out.splitlines()
    assert re.fullmatch(rf"1\. \[\d\.\d\d\] {re.escape(str(documents / 'device.txt'))} @0", lines[0])
    assert "一万二千转" in lines[1]


def test_search_in_an_empty_knowledge_base_finds_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "zero.txt").touch()
    run("ingest", tmp_path / "zero.txt", "--kb", tmp_path / "kb")
    result = run("search", "年假", "--kb", tmp_path / "kb", "--json")
    assert (result.status, result.json["hits"]) == (0, [])


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """(a knowledge base of three records, questions about them)"""
    records = tmp_path / "pool.jsonl"
    rows = [("p1", "年假有十天。"), ("p2", "保修期为三年。"), ("p3", "报销由李雷审批。\u2028第二行。")]
    records.write_text(
        "".join(json.dumps({"id": i, "title": i, "text": t}, ensure_ascii=False) + "\n" for i, t in rows),
        encoding="utf-8",
    )
    assert run("ingest", records, "--kb", tmp_path / "kb").status == 0
    questions = tmp_path / "questions.jsonl"
    asked = [
        {"id": "1", "question": "年假有几天？", "answers": ["十天"], "context_id": "p1"},
        {"id": "2", "question": "保修期多久？", "answers": ["三年"], "pos_ids": ["p2"]},
    ]
    questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8")
    return tmp_path / "kb", questions


def test_evaluate_json_has_the_agreed_shape(run: Run, pool: tuple[Path, Path]) -> None:
    kb, questions = pool
    report = run("evaluate", "--kb", kb, "--questions", questions, "--json").json
    assert list(report) == ["n", "retrieval", "answer"]
    assert report["n"] == 2
    assert report["retrieval"] == {"recall@1": 1, "recall@5": 1, "recall@10": 1, "mrr@10": 1, "ndcg@10": 1}
    assert list(report["answer"]) == ["contains_gold", "exact_match", "char_f1", "mean_chars", "refused"]
    assert report["answer"]["contains_gold"] == 1


def test_evaluate_can_leave_answers_out_and_prints_lines(run: Run, pool: tuple[Path, Path]) -> None:
    kb, questions = pool
    words = ["evaluate", "--kb", str(kb), "--questions", str(questions), "--retrieval-only"]
    assert list(run(*words, "--json").json) == ["n", "retrieval"]
    lines = run(*words).out.splitlines()
    assert lines[0] == "n = 2"
    assert lines[1].split() == ["retrieval.recall@1", "1"]


def test_bad_questions_are_listed_with_their_lines(run: Run, pool: tuple[Path, Path]) -> None:
    kb, questions = pool
    questions.write_text('{"question": "好"}\n{oops\n{"answers": []}\n', encoding="utf-8")
    result = run("evaluate", "--kb", kb, "--questions", questions, "--json")
    result.assert_failed(result.status, "questions.jsonl:2", "questions.jsonl:3")
    assert result.status in {1, 2}
    missing = run("evaluate", "--kb", kb, "--questions", questions.with_name("none.jsonl"))
    missing.assert_failed(missing.status, "none.jsonl")


# -- sources and remove --------------------------------------------------------------------------------------------


def test_sources_lists_every_document(run: Run, kb: Path, documents: Path) -> None:
    rows = run("sources", "--kb", kb, "--json").json["sources"]
    assert [row["source"] for row in rows] == [str(documents / "device.txt"), str(documents / "handbook.md")]
    assert {"source", "title", "chunks", "characters", "added"} <= set(rows[0])
    lines = run("sources", "--kb", kb).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [row["source"] for row in rows]


@pytest.mark.parametrize("form", ["name", "absolute", "relative"])
def test_remove_takes_a_name_or_a_path(
    run: Run, copy: Path, documents: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(documents.parent)
    word = {"name": "device.txt", "absolute": documents / "device.txt", "relative": Path(documents.name, "device.txt")}
    result = run("remove", word[form], "--kb", copy, "--json")
    assert result.status == 0, result.err
    assert result.json == {"removed": 1, "sources": [str(documents / "device.txt")]}
    assert source_names(run, copy) == ["handbook.md"]
    assert run("ask", SPEED, "--kb", copy, "--json").json["refused"] is True
    assert (documents / "device.txt").exists()


def test_remove_of_something_unknown_removes_nothing(run: Run, copy: Path) -> None:
    run("remove", "device.txt", "nope.txt", "--kb", copy, "--json").assert_failed(1, "nope.txt", "ragproj sources")
    assert source_names(run, copy) == ["device.txt", "handbook.md"]


def test_remove_of_an_ambiguous_name_lists_the_candidates(run: Run, tmp_path: Path) -> None:
    for folder, text in (("a", "年假有十天。"), ("b", "报销三十天。")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(text, encoding="utf-8")
    kb = tmp_path / "kb"
    run("ingest", tmp_path / "a", tmp_path / "b", "--kb", kb)
    run("remove", "same.txt", "--kb", kb).assert_failed(1, str(tmp_path / "a/same.txt"), str(tmp_path / "b/same.txt"))
    assert run("remove", tmp_path / "a" / "same.txt", "--kb", kb).status == 0
    assert run("remove", "same.txt", "--kb", kb).status == 0  # now it is the only one
    assert source_names(run, kb) == []


def test_remove_of_overrides_alone_is_wrong_use(run: Run, copy: Path) -> None:
    run("remove", "top_k=3", "--kb", copy).assert_failed(2, "remove")


def test_remove_takes_several_and_counts_each_once(run: Run, copy: Path) -> None:
    result = run("remove", "device.txt", "handbook.md", "device.txt", "--kb", copy, "--json")
    assert result.json["removed"] == 2
    assert source_names(run, copy) == []


# -- validate and configs ------------------------------------------------------------------------------------------


def write_config(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_validate_prints_what_the_config_comes_to(run: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path / "my.yaml", "top_k: 3\nserver: {password: geheim}\n")
    result = run("validate", "--config", config, "--json", "llm._type=extractive", "llm.max_chars=99")
    assert result.status == 0
    assert result.json["ok"] is True
    assert result.json["config"]["top_k"] == 3
    assert result.json["config"]["llm"] == {"_type": "extractive", "max_chars": 99, "max_quotes": 3}
    plain = run("validate", "--config", config)
    assert "top_k: 3" in plain.out
    assert "geheim" not in plain.out + result.out


def test_what_validate_prints_is_a_config(run: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path / "again.yaml", run("validate", "top_k=7", "language=en").out)
    assert (
        run("validate", "--config", config, "--json").json == run("validate", "top_k=7", "language=en", "--json").json
    )


BAD = """top_k: 0
foo: 1
llm: {_type: gpt}
retriever: {_type: hybrid, dense_weight: 3, wieght: 1}
splitter: {chunk_size: many}
"""


@pytest.mark.parametrize("verb", [["validate"], ["ask", "年假？"], ["ingest", "x"], ["serve"], ["sources"]])
def test_a_bad_config_lists_everything_at_once_and_exits_with_2(run: Run, tmp_path: Path, verb: list[str]) -> None:
    config = write_config(tmp_path / "bad.yaml", BAD)
    result = run(*verb, "--config", config, "--kb", tmp_path / "kb", "min_relevance=7")
    places = ["top_k", "foo", "llm", "extractive", "chat_model", "retriever.dense_weight", "retriever.wieght"]
    result.assert_failed(2, "bad.yaml", *places, "splitter.chunk_size", "min_relevance")
    assert not (tmp_path / "kb").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [("a: [1", "YAML"), ("- 1\n- 2\n", "list"), ("!!python/object/apply:os.system ['true']", "YAML")],
)
def test_a_config_that_is_no_mapping_is_refused(run: Run, tmp_path: Path, text: str, named: str) -> None:
    run("validate", "--config", write_config(tmp_path / "bad.yaml", text)).assert_failed(2, "bad.yaml", named)


def test_a_missing_config_and_a_binary_one_are_refused(run: Run, tmp_path: Path) -> None:
    run("validate", "--config", tmp_path / "none.yaml").assert_failed(2, "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    run("validate", "--config", tmp_path / "binary.yaml").assert_failed(2, "binary.yaml")


@pytest.mark.parametrize("name", ["default.yaml", "openai_compatible.yaml"])
def test_shipped_configs_are_valid(run: Run, name: str) -> None:
    import chains

    config = Path(chains.__file__).parent / "configs" / name
    assert run("validate", "--config", config).status == 0


# -- serve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org", "::1.evil.example"])
def test_serve_beyond_this_machine_needs_a_password(
    run: Run, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for password in (None, ""):
        monkeypatch.delenv("RAGPROJ_PASSWORD", raising=False)
        if password is not None:
            monkeypatch.setenv("RAGPROJ_PASSWORD", password)
        run("serve", "--host", host, "--kb", tmp_path / "kb").assert_failed(2, host, "RAGPROJ_PASSWORD")
    assert not (tmp_path / "kb").exists()


def test_serve_on_every_ipv6_address_needs_a_password_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAGPROJ_PASSWORD", raising=False)
    run("serve", "--host", "::", "--kb", tmp_path / "kb").assert_failed(2, "RAGPROJ_PASSWORD")


@pytest.mark.parametrize("port", ["-1", "70000"])
def test_serve_on_a_port_that_is_none_is_wrong_use(run: Run, tmp_path: Path, port: str) -> None:
    run("serve", "--port", port, "--kb", tmp_path / "kb").assert_failed(2, port)


def test_serve_on_a_used_port_fails_with_a_way_out(copy: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = ragproj("serve", "--kb", copy, "--port", str(port))
    result.assert_failed(1, str(port), "--port")


def interruptible() -> None:
    """In a child before it begins: SIGINT ends it, though background jobs of a shell and their children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def serving(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A served page: (process, its address, what it wrote to stderr up to there)."""
    process = subprocess.Popen(
        command("serve", *words, "--port", "0"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    assert process.stderr is not None
    try:
        seen = ""
        for line in process.stderr:
            seen += line
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert address, seen
        yield process, address.group(), seen
    finally:
        if process.poll() is None:
            process.kill()
        process.stderr.close()


def test_serve_answers_until_it_is_interrupted(copy: Path) -> None:
    with serving("--kb", copy) as (process, address, _):
        with urllib.request.urlopen(address, timeout=10) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(20) in {0, 130}
        assert "Traceback" not in rest


def test_serve_starts_where_the_other_verbs_refuse_another_embedder(run: Run, copy: Path, documents: Path) -> None:
    words = ("--kb", copy, "embeddings.dimensions=512")
    with serving(*words) as (_, address, seen):
        assert re.search("向量由 lexical-1024.* 生成，配置的是 lexical-512", seen)
        with urllib.request.urlopen(address, timeout=10) as page:
            assert page.status == 200
    for verb in (("ask", SPEED), ("search", SPEED), ("ingest", documents)):
        run(*verb, *words).assert_failed(1, "lexical-1024", "lexical-512", "ragproj reembed")


# -- interrupted and unread ----------------------------------------------------------------------------------------


def pipe_to_nobody(*words: str | Path) -> tuple[int, str]:
    """(status, stderr) of a command whose reader is gone before it writes, as in `| true`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command(*words), stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60, check=False
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("words", [["search", "转速", "--json"], ["ask", "转速"]])
def test_a_reader_that_left_is_no_crash(kb: Path, words: Sequence[str]) -> None:
    status, err = pipe_to_nobody(*words, "--kb", kb)
    assert status == 1
    assert "BrokenPipe" not in err
    assert "Traceback" not in err


def test_output_that_is_piped_is_whole_and_utf8_in_any_locale(kb: Path) -> None:
    result = ragproj("search", "转速", "--kb", kb, "--json", env={"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"})
    assert result.status == 0
    assert result.json["hits"]


def committed(kb: Path) -> int:
    """Sources that are visible in a knowledge base being written."""
    if not (kb / "kb.sqlite").exists():
        return 0
    connection = sqlite3.connect(kb / "kb.sqlite")
    try:
        return int(connection.execute("SELECT COUNT(*) FROM sources WHERE active = 1").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # not there yet
    finally:
        connection.close()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        if ready() or process.poll() is not None:
            return
        time.sleep(0.01)


@pytest.fixture
def many_files(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        text = "".join(f"第{number}号文件的第{n}条规定。" for n in range(200))
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    yield folder
    shutil.rmtree(folder)


def test_ctrl_c_during_ingest_leaves_a_good_knowledge_base(many_files: Path, tmp_path: Path) -> None:
    kb = tmp_path / "kb"
    process = subprocess.Popen(
        command("ingest", many_files, "--kb", kb, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    wait_for(lambda: committed(kb) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the parser's process too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert out == b""
    assert "Traceback" not in err.decode()
    assert "已中断" in err.decode()
    stored = committed(kb)
    assert 3 <= stored < 300
    found = ragproj("search", "第0号文件的第7条规定", "--kb", kb, "--json")
    assert found.status == 0, found.err
    assert found.json["hits"][0]["source"].endswith("000.txt")
    for path in sorted(many_files.iterdir())[stored + 5 :]:
        path.unlink()  # enough to see that the rest is taken up
    again = ragproj("ingest", many_files, "--kb", kb, "--json").json
    assert (again["unchanged"], again["added"], again["failed"]) == (stored, 5, [])


def test_ctrl_c_while_starting_is_quiet(kb: Path) -> None:
    for delay in (0.15, 0.4):
        process = subprocess.Popen(
            command("ask", SPEED, "--kb", kb),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in {0, 130, -signal.SIGINT}
        assert "UnboundLocalError" not in err.decode()
