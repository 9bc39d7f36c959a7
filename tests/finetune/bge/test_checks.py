"""What the doctor finds before a BGE training, on rows and models made for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bge_models import build_bert, small_vocabulary

from chains.bge.directory import read_model_directory
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.checks import (
    Hardware,
    Lengths,
    Parameters,
    check_duplicates,
    check_leak,
    check_lengths,
    check_negatives,
    check_processes,
    check_prompts,
    check_vocabulary,
    examine,
    memory_forecast,
    sampled,
    ways_out,
)
from finetune.bge.config import BgeTrainingConfig
from finetune.data.rows import RetrievalRow
from finetune.doctor import Finding
from finetune.evaluation import Passage, RetrievalSet, from_rows

ROW = RetrievalRow(query="怎样备份知识库", pos=("备份的第一条",), neg=("向量", "模型", "检索"))


def config(**settings: Any) -> BgeTrainingConfig:
    return BgeTrainingConfig.from_dict({"model": "m", "output": "o", "train": ["t.jsonl"], **settings}, where="test")


def found(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.name, finding.severity) for finding in findings]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> BgeTokenizer:
    return BgeTokenizer.from_directory(read_model_directory(tiny_model))


# --- rows


def test_rows_without_negatives_stop_a_run_that_samples_them() -> None:
    rows = [ROW, replace(ROW, neg=())]
    (finding,) = check_negatives(rows, config(group_size=4))
    assert (finding.name, finding.severity) == ("no_negatives", "error")
    assert "2 行中有 1 行" in finding.zh
    assert "ragproj data mine" in finding.zh


def test_in_batch_negatives_alone_are_enough() -> None:
    assert check_negatives([replace(ROW, neg=())] * 3, config(group_size=1, batch_size=8)) == []


def test_a_group_of_one_in_a_batch_of_one_has_nothing_to_tell_apart() -> None:
    assert found(check_negatives([replace(ROW, neg=())], config(group_size=1, batch_size=1))) == [
        ("group_of_one", "error")
    ]


def test_negatives_that_stay_unused_or_are_repeated_are_noted() -> None:
    assert found(check_negatives([ROW], config(group_size=1))) == [("group_of_one", "note")]
    assert found(check_negatives([ROW], config(group_size=8))) == [("few_negatives", "note")]
    assert check_negatives([ROW], config(group_size=4)) == []


def test_rows_that_differ_in_white_space_alone_are_duplicates() -> None:
    other = replace(ROW, query="别的问题")
    assert found(check_duplicates([ROW, replace(ROW, query="怎样 备份知识库"), other])) == [
        ("duplicate_rows", "warning")
    ]
    assert check_duplicates([ROW, other]) == []


def test_a_dev_question_that_is_trained_on_is_a_leak() -> None:
    dev = from_rows("dev", [RetrievalRow(query="怎样备份 知识库", pos=("另一段",))])
    (finding,) = check_leak([ROW], dev)
    assert finding.severity == "error"
    assert "1 个问题中有 1 个" in finding.zh


def test_a_dev_answer_that_is_a_positive_of_training_is_a_leak_with_or_without_its_title() -> None:
    passages = (Passage("a", "备份的\n第一条"), Passage("b", "第一条", title="备份的"))
    for gold in ("a", "b"):
        dev = RetrievalSet("dev", ("新的问题",), ((gold,),), passages)
        assert found(check_leak([ROW], dev)) == [("dev_leak", "error")]


def test_a_dev_answer_that_is_only_a_negative_of_training_is_no_leak() -> None:
    assert check_leak([ROW], from_rows("dev", [RetrievalRow(query="新的问题", pos=("向量",))])) == []


def test_a_leak_of_one_question_in_two_hundred_is_a_warning() -> None:
    rows = [RetrievalRow(query=f"新的问题{number}", pos=(f"新的片段{number}",)) for number in range(199)]
    assert found(check_leak([ROW], from_rows("dev", [*rows, ROW]))) == [("dev_leak", "warning")]


def test_a_prompt_of_a_row_that_is_never_served_is_named() -> None:
    own = replace(ROW, prompt="查询：", file="train.jsonl", line=3)
    (finding,) = check_prompts([ROW, own], "为这个句子生成表示：")
    assert (finding.name, finding.severity) == ("row_prompts", "warning")
    assert "1 of 2 rows" in finding.en
    assert "'查询：' in train.jsonl:3" in finding.en
    assert check_prompts([ROW, own], "查询：") == []


# --- texts


def test_lengths_count_cls_sep_and_the_instruction(tokenizer: BgeTokenizer) -> None:
    lengths = Lengths.of([ROW], tokenizer, "为了")
    assert lengths.queries == (2 + 2 + 7,)
    assert sorted(lengths.passages) == [4, 4, 4, 8]


def test_texts_that_lose_their_end_are_counted(tokenizer: BgeTokenizer) -> None:
    lengths = Lengths.of([ROW], tokenizer, "")
    (finding,) = check_lengths(lengths, config(query_max_tokens=8, passage_max_tokens=32))
    assert finding.name == "truncated"
    assert "100 % 的查询超过 query_max_tokens=8" in finding.zh
    assert "最长 9" in finding.zh
    assert check_lengths(lengths, config(query_max_tokens=9, passage_max_tokens=8)) == []


def test_unknown_characters_are_found_by_their_share(tokenizer: BgeTokenizer) -> None:
    unknown = next(chr(code) for code in range(0x4E00, 0x9FFF) if chr(code) not in small_vocabulary())
    assert check_vocabulary(tokenizer, ["知识库"]) == []
    assert found(check_vocabulary(tokenizer, ["知识库的备份" * 5 + unknown])) == [("unknown_tokens", "warning")]
    (finding,) = check_vocabulary(tokenizer, ["知识" + unknown * 2])
    assert finding.severity == "error"
    assert "50.0 %" in finding.zh


def test_negatives_of_other_processes_are_noted_only_where_they_were_asked_for() -> None:
    assert check_processes(config(), 1) == []
    assert found(check_processes(config(cross_device_negatives=True), 1)) == [("single_process", "note")]
    assert check_processes(config(cross_device_negatives=True), 2) == []


def test_a_sample_is_the_same_for_a_seed_and_in_order() -> None:
    rows = [replace(ROW, line=number) for number in range(3000)]
    lines = [row.line for row in sampled(rows, 7)]
    assert len(lines) == 1000
    assert lines == sorted(lines)
    assert lines == [row.line for row in sampled(rows, 7)]
    assert sampled(rows[:10], 7) == rows[:10]


# --- memory


def test_parameters_are_counted_without_loading_the_model(tiny_model: Path) -> None:
    from chains.bge.encoder import load_encoder

    directory = read_model_directory(tiny_model)
    count = sum(parameter.numel() for parameter in load_encoder(directory).parameters())
    assert Parameters.of(config(), directory) == Parameters(count, count)


def test_an_adapters_parameters_are_those_that_peft_trains(tiny_model: Path) -> None:
    from finetune.bge.encoder import training_encoder

    settings = config(method="lora", model=str(tiny_model), lora={"rank": 4})
    directory = read_model_directory(tiny_model)
    encoder = training_encoder(settings, directory, "cpu")
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in encoder.parameters())
    assert Parameters.of(settings, directory) == Parameters(total, trained)


def test_the_forecast_holds_a_whole_small_step_but_only_a_micro_batch_of_a_large_one(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    lengths = Lengths(queries=(10,), passages=(30,))
    hardware = Hardware("cpu", has_bf16=False, memory=None)
    parameters = Parameters(1_000_000, 1_000_000)

    def activations(**settings: Any) -> int:
        plan = config(passage_max_tokens=64, query_max_tokens=64, dropout=0.0, **settings)
        return memory_forecast(plan, directory, hardware, lengths, parameters).activations

    small, double = activations(batch_size=4), activations(batch_size=8)  # 4 x (10 + 4 x 30) = 520 positions
    assert double == pytest.approx(2 * small, rel=0.02)
    huge, larger = (activations(batch_size=n, graph_tokens=0, micro_batch_tokens=512) for n in (512, 1024))
    assert huge < 20 * small
    assert larger < 4 * huge  # what grows is the matrix of similarities, with the square


def test_a_sound_run_has_no_finding_and_errors_stand_first(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    hardware = Hardware("cpu", has_bf16=False, memory=8 * 10**9)
    dev = from_rows("dev", [RetrievalRow(query="新的问题", pos=("新的文档",))])
    parameters = Parameters(500_000, 500_000)
    assert examine(config(), [ROW], dev, directory, hardware, steps=20, parameters=parameters) == []
    bad = config(learning_rate=1e-3, precision="fp16")
    findings = examine(bad, [ROW], from_rows("dev", [ROW]), directory, hardware, steps=20, parameters=parameters)
    assert found(findings) == [("dev_leak", "error"), ("precision", "error"), ("learning_rate", "warning")]


def test_the_ways_out_of_too_little_memory_are_settings_that_this_run_does_not_have_yet() -> None:
    assert ways_out(config()) == ["micro_batch_tokens", "graph_tokens", "gradient_checkpointing=true", "method=lora"]
    assert ways_out(config(method="lora", gradient_checkpointing=True)) == ["micro_batch_tokens", "graph_tokens"]


def test_a_model_too_large_for_the_memory_is_found(tmp_path: Path) -> None:
    directory = read_model_directory(build_bert(tmp_path / "model"))
    hardware = Hardware("cpu", has_bf16=False, memory=10**9)
    findings = examine(config(), [ROW], None, directory, hardware, steps=20, parameters=Parameters(10**9, 10**9))
    assert found(findings) == [("memory", "error")]
