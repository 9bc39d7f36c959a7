"""Multi-Doc-QA-Chinese: both layouts, damage, the split, the report, and memory that does not grow with the files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.data.multi_doc_qa import (
    OUTPUTS,
    Document,
    MultiDocQAConfig,
    convert,
    find_json_files,
    read_document,
    read_samples,
)
from finetune.data.rows import read_generation_rows, read_retrieval_rows
from loaders.errors import RagProjError, UsageError

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def text_of(seed: object, length: int = 80) -> str:
    return "".join(random.Random(str(seed)).choices(HAN, k=length))


def record(number: object, negatives: int = 12, **changes: Any) -> dict[str, Any]:
    """A record of the `raw` layout over texts that only its number decides."""
    return {
        "QA": [{"question": f"问题{number}是什么？", "answer": f"原文“{text_of(number)[10:30]}”，所以是。"}],
        "positive_doc": [{"text": f"标题{number}\n\n{text_of(number)}"}],
        "negative_doc": [{"text": text_of((number, place))} for place in range(negatives)],
        **changes,
    }


def written(path: Path, *records: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# -- a record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "document"),
    [
        ({"text": "题目\n\n正文"}, Document("题目", "题目\n\n正文")),
        ({"text": "正文", "title": "题目", "content": "别的"}, Document("", "正文")),
        ({"text": "", "title": "题目", "content": "正文"}, Document("题目", "题目\n\n正文")),
        (
            {"id": 1, "dataType": "健康", "title": "题目", "content": "题目是正文", "QA": None},
            Document("题目", "题目是正文"),
        ),
        ({"content": "正文"}, Document("", "正文")),
        ({"title": "题目", "content": None}, Document("题目", "题目")),
        ("题目\n\n正文", Document("题目", "题目\n\n正文")),
        ({"text": " \n"}, None),
        ({"text": 5}, None),
        (None, None),
        ([], None),
    ],
)
def test_a_document_is_read_in_every_layout(value: object, document: Document | None) -> None:
    assert read_document(value) == document


def test_the_body_of_a_document_is_its_text_without_the_title() -> None:
    assert Document("题目", "题目\n\n正文").body == "正文"
    assert Document("题目", "题目").body == "题目"
    assert Document("", "正文").body == "正文"


@pytest.mark.parametrize(
    ("pairs", "questions"),
    [
        ({"question": "问", "answer": "答"}, ["问"]),
        ([{"question": "一", "answer": "答"}, {"question": "二", "answer": "答"}], ["一", "二"]),
        ([{"question": "一"}, {"question": "", "answer": "答"}, None, {"question": "二", "answer": "答"}], ["二"]),
        (None, []),
        ([], []),
        ("问", []),
    ],
)
def test_every_pair_with_both_texts_is_a_question(pairs: object, questions: list[str]) -> None:
    assert [sample.question for sample in read_samples(record(1, QA=pairs), ("a", 1))] == questions


# -- a conversion --------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three files of thirty records, of two layouts; some documents answer in several of them, spaced otherwise."""
    folder = tmp_path / "raw"
    written(folder / "百科-001.json", *(record(number) for number in range(30)))
    shared = [record(f"又{number}", positive_doc=record(number)["positive_doc"]) for number in range(10)]
    spaced = [
        record(f"疏{number}", positive_doc=[{"text": " \n".join(record(number)["positive_doc"][0]["text"])}])
        for number in range(10)
    ]
    used = [
        record(f"负{number}", negative_doc=[*record(number)["positive_doc"], *record(f"负{number}")["negative_doc"]])
        for number in range(10)
    ]
    written(folder / "医学问答-001.json", *shared, *spaced, *used)
    split_up = [
        record(number)
        | {"positive_doc": [{"id": number, "title": f"题{number}", "content": text_of(number), "QA": None}]}
        for number in range(100, 130)
    ]
    (folder / "健康-001.json").write_text(json.dumps(split_up, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


@pytest.fixture
def out(raw: Path, tmp_path: Path) -> Path:
    convert([raw], tmp_path / "out", MultiDocQAConfig(dev_share=0.2))
    return tmp_path / "out"


def test_the_rows_pass_the_checks_of_training(out: Path) -> None:
    sizes = {name: len(lines_of(out / name)) for name in OUTPUTS}
    assert sizes["retrieval_train.jsonl"] + sizes["retrieval_dev.jsonl"] == 90
    assert sizes["retrieval_train.jsonl"] == sizes["generation_train.jsonl"]
    assert 10 <= sizes["retrieval_dev.jsonl"] == sizes["generation_dev.jsonl"] == sizes["dev_questions.jsonl"] <= 18
    retrieval = read_retrieval_rows([out / "retrieval_train.jsonl", out / "retrieval_dev.jsonl"])
    generation = read_generation_rows([out / "generation_train.jsonl", out / "generation_dev.jsonl"])
    assert [row.query for row in retrieval] == [row.question for row in generation]
    for rows, answered in zip(retrieval, generation, strict=True):
        assert len(rows.pos) == 1
        assert len(set(rows.neg)) == 8
        assert len(rows.neg_docs or ()) == 8
        assert len(answered.references) == 5
        assert rows.pos[0] in answered.references
        assert set(answered.references) <= {*rows.pos, *rows.neg}


def test_the_answering_reference_stands_anywhere(out: Path) -> None:
    retrieval = read_retrieval_rows([out / "retrieval_train.jsonl"])
    generation = read_generation_rows([out / "generation_train.jsonl"])
    places = {row.references.index(one.pos[0]) for one, row in zip(retrieval, generation, strict=True)}
    assert places == {0, 1, 2, 3, 4}


def test_no_reference_document_is_on_both_sides_in_any_role(out: Path) -> None:
    def plain(texts: tuple[str, ...]) -> set[str]:
        return {"".join(text.split()) for text in texts}

    train = read_retrieval_rows([out / "retrieval_train.jsonl"])
    dev = read_retrieval_rows([out / "retrieval_dev.jsonl"])
    answering = {side: set().union(*(plain(row.pos) for row in rows)) for side, rows in (("t", train), ("d", dev))}
    everything = {
        side: set().union(*(plain(row.pos + row.neg) for row in rows)) for side, rows in (("t", train), ("d", dev))
    }
    assert answering["t"]
    assert answering["d"]
    assert not answering["t"] & everything["d"]
    assert not answering["d"] & everything["t"]


def test_train_and_dev_mix_the_files(out: Path) -> None:
    def kind(query: str) -> str:
        number = query.removeprefix("问题").removesuffix("是什么？")
        return "百科" if number.isdigit() and int(number) < 100 else "健康" if number.isdigit() else "医学"

    train = [kind(row.query) for row in read_retrieval_rows([out / "retrieval_train.jsonl"])]
    dev = {kind(row.query) for row in read_retrieval_rows([out / "retrieval_dev.jsonl"])}
    assert len(dev) >= 2
    assert len(set(train[:10])) == 3


def test_the_dev_questions_name_passages_of_the_dev_pool(out: Path) -> None:
    pool = {passage["id"]: passage for passage in lines_of(out / "dev_passages.jsonl")}
    rows = {row.query: row for row in read_retrieval_rows([out / "retrieval_dev.jsonl"])}
    questions = lines_of(out / "dev_questions.jsonl")
    for question in questions:
        passage = pool[question["context_id"]]
        text = f"{passage['title']}\n\n{passage['text']}" if passage["title"] else passage["text"]
        # a passage that stands in several records with other white space is in the pool once
        assert "".join(text.split()) == "".join(rows[question["question"]].pos[0].split())
        assert question["answers"]
    assert len(pool) == len(lines_of(out / "dev_passages.jsonl"))
    assert {passage["id"] for passage in pool.values()} == {
        document for row in rows.values() for document in (*(row.pos_docs or ()), *(row.neg_docs or ()))
    }


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(raw: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        convert([raw], folder, MultiDocQAConfig(seed=seed))
    for name in (*OUTPUTS, "report.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert (folders[0] / OUTPUTS[0]).read_bytes() != (folders[2] / OUTPUTS[0]).read_bytes()


def test_bad_records_are_counted_with_their_lines_and_the_others_are_used(tmp_path: Path) -> None:
    good = json.dumps(record(1), ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_bytes(
        b"\xef\xbb\xbf" + good.encode() + b"\r\n"
        b'{"QA": [{"question": "x"\r\n'  # line 2
        b"\r\n"
        + json.dumps(record(2, positive_doc=[{"text": ""}])).encode()  # line 4
        + b"\r\n"
        + json.dumps(record(3, positive_doc=[{"text": "x" * 1_000_000}])).encode()  # line 5
        + b'\r\n{"QA": "\xff"}\r\n'  # line 6
        + json.dumps(record(4, QA=None)).encode()
        + b"\r\n"
        + json.dumps(record(5, QA=[{"question": "行\u2028尾？", "answer": "答"}]), ensure_ascii=False).encode()
    )
    report = convert([path], tmp_path / "out")
    assert report["files"][str(path)] == {"records": 7, "rows": 2, "bad": 4, "without_qa": 1}
    assert report["bad_records"]["count"] == 4
    places = [text.split("：")[0].rpartition(":")[2] for text in report["bad_records"]["first"]]
    assert places == ["2", "4", "5", "6"]
    assert sum(report["rows"].values()) == 2


def test_a_question_that_stands_twice_over_a_document_is_one_row(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", record(1), record(2), record(1), record(1, negatives=3))
    report = convert([path], tmp_path / "out")
    assert report["duplicates"] == 2
    assert sum(report["rows"].values()) == 2


def test_negatives_that_may_answer_are_left_out_and_reported(tmp_path: Path) -> None:
    one = record(1, negatives=0)
    positive = one["positive_doc"][0]["text"]
    quoted = text_of("别")[:40] + one["QA"][0]["answer"] + text_of("处")[:40]
    fine = [{"text": text_of(("好", number))} for number in range(6)]
    one["negative_doc"] = [{"text": " \n".join(positive)}, {"text": positive[3:] + "。"}, {"text": quoted}, *fine]
    report = convert([written(tmp_path / "a.json", one)], tmp_path / "out")
    suspected = report["suspected_false_negatives"]
    assert {key: suspected[key] for key in ("count", "equal", "near", "answer")} == {
        "count": 3, "equal": 1, "near": 1, "answer": 1,
    }  # fmt: skip
    assert {item["line"] for item in suspected["first"]} == {1}
    (row,) = read_retrieval_rows([tmp_path / "out" / "retrieval_train.jsonl"])
    assert set(row.neg) == {document["text"] for document in fine}
    config = MultiDocQAConfig(drop_suspects=False)
    convert([tmp_path / "a.json"], tmp_path / "all", config)
    (row,) = read_retrieval_rows([tmp_path / "all" / "retrieval_train.jsonl"])
    assert len(row.neg) == 8  # of nine: only the equal one can never be a negative


def test_lengths_are_counted_by_the_configured_tokenizer(tmp_path: Path) -> None:
    one = record(1, negatives=0, QA={"question": "年" * 7, "answer": "答" * 30}, positive_doc=[{"text": "文" * 600}])
    report = convert([written(tmp_path / "a.json", one)], tmp_path / "out")
    tokens = report["tokens"]
    # the embedded default counts one token for a Han character, and reads 512
    assert tokens["limit"] == 512
    assert tokens["question"] == {"texts": 1, "p50": 7, "p95": 7, "max": 7, "truncated": 0.0}
    assert tokens["passage"] == {"texts": 1, "p50": 600, "p95": 600, "max": 600, "truncated": 1.0}
    assert tokens["answer"] == {"texts": 1, "p50": 30, "p95": 30, "max": 30}
    report = convert([tmp_path / "a.json"], tmp_path / "long", MultiDocQAConfig(max_tokens=600))
    assert report["tokens"]["passage"]["truncated"] == 0


# -- files ---------------------------------------------------------------------------------------------------------


def test_results_are_replaced_only_when_told(raw: Path, out: Path) -> None:
    before = (out / OUTPUTS[0]).read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        convert([raw], out, MultiDocQAConfig(seed=5))
    assert (out / OUTPUTS[0]).read_bytes() == before
    convert([raw], out, MultiDocQAConfig(seed=5), overwrite=True)
    assert (out / OUTPUTS[0]).read_bytes() != before
    assert sorted(path.name for path in out.iterdir()) == sorted([*OUTPUTS, "report.json"])


def test_a_conversion_that_fails_leaves_the_folder_as_it_was(out: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    bad = written(tmp_path / "bad.json", "{}", "oops")
    with pytest.raises(RagProjError, match=r"bad\.json"):
        convert([bad], out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folders_are_searched_and_a_missing_path_is_named(tmp_path: Path) -> None:
    names = ["b/百科.json", "a.jsonl", "c.csv", "d.json.bak"]
    for name in names:
        written(tmp_path / name, record(1))
    found = find_json_files([tmp_path, tmp_path / "a.jsonl"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.jsonl", "b/百科.json"]
    with pytest.raises(UsageError, match="none"):
        find_json_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        find_json_files([tmp_path / "empty"])


_PEAK = """
import resource, sys
from pathlib import Path
from finetune.data.multi_doc_qa import convert
report = convert([Path(sys.argv[1])], Path(sys.argv[2]))
print(sum(report["rows"].values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    pool = [{"text": text_of(number, 700)} for number in range(400)]

    def peak(rows: int) -> tuple[int, int]:
        """(bytes of the file, KiB of memory at most)."""
        path = tmp_path / f"{rows}.json"
        draw = random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            for number in range(rows):
                one = record(number, negative_doc=draw.sample(pool, 99))
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
        command = [sys.executable, "-c", _PEAK, str(path), str(tmp_path / f"out{rows}")]
        done, memory = map(int, subprocess.check_output(command, text=True).split())
        assert done == rows
        return path.stat().st_size, memory

    small, at_small = peak(10)
    large, at_large = peak(140)
    assert large - small > 24 * 1024 * 1024
    assert at_large - at_small < 8 * 1024


def test_the_files_in_the_shape_of_the_dataset_convert(shared_data: Path, tmp_path: Path) -> None:
    report = convert([shared_data / "multidoc_shape"], tmp_path, MultiDocQAConfig(dev_share=0.2))
    assert report["bad_records"]["count"] == 0
    assert report["rows"] == {"train": 57, "dev": 14}  # 71 records with one question each
    assert report["rows_without_negatives"] == 0
    read_retrieval_rows([tmp_path / "retrieval_train.jsonl", tmp_path / "retrieval_dev.jsonl"])
