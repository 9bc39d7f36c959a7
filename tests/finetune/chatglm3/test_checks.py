"""The doctor before a ChatGLM3 training; sizes of the 6B model are those of FACTS and of its published config."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.chatglm3.checks import (
    Hardware,
    ModelSizes,
    check_answer_memory,
    check_four_bit_sizes,
    check_leak,
    check_lengths,
    examine,
    longest_prompt,
    memory_of,
    ways_out,
    weights_bytes,
)
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example
from finetune.data.rows import GenerationRow
from finetune.doctor import Finding

SIZES_6B = {
    "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 28, "vocab_size": 65024,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
ROW = GenerationRow("甲？", ("甲是乙。",), "乙。[1]", file="train.jsonl", line=1)


@pytest.fixture
def six_b(tmp_path: Path) -> ModelSizes:
    (tmp_path / "config.json").write_text(json.dumps(SIZES_6B), encoding="utf-8")
    return ModelSizes.of(tmp_path)


def config(**settings: Any) -> ChatGlm3TrainingConfig:
    given = {"model": "m", "output": "o", "train": ["t"], "evaluation": {"dev": ["d"]}}
    return ChatGlm3TrainingConfig.model_validate({**given, **settings})


def example(tokens: int = 10, learned: int = 3, **settings: Any) -> Example:
    return Example(array("i", [1]) * tokens, tokens - learned, settings.pop("row", ROW), **settings)


def test_weights_of_6b_in_4_bits(six_b: ModelSizes) -> None:
    assert six_b.count() == 6_243_584_000
    linear = 28 * (4096 * (4096 + 256 + 256 + 4096) + 4096 * 3 * 13696)
    assert linear == 5_710_544_896  # 5.711 B
    # about 2.95 GB in NF4, embedding and head in 16 bits
    assert weights_bytes(config(), six_b, 2) == pytest.approx(2.95e9 + 2 * (six_b.count() - linear), rel=0.01)
    assert weights_bytes(config(method="lora"), six_b, 2) == 2 * six_b.count()
    assert weights_bytes(config(method="full"), six_b, 2) == 4 * six_b.count()


def test_the_adapter_of_6b_at_rank_16_by_hand(six_b: ModelSizes) -> None:
    layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 256) + (4096 + 2 * 13696) + (13696 + 4096))
    assert six_b.adapter(16, config().lora.targets) == 28 * layer


def test_6b_at_2048_tokens_fits_12_gb(six_b: ModelSizes) -> None:
    forecast = memory_of(config(optimizer="paged_adamw_8bit"), six_b, device="cuda:0", number_bytes=2)
    assert 4e9 < forecast.total < 12e9


def test_the_optimizer_chosen_by_itself_is_counted_as_what_it_becomes(six_b: ModelSizes) -> None:
    """Two moments of a byte each in 8 bits, of four bytes each in float32."""
    trained = six_b.adapter(16, config().lora.targets)
    assert memory_of(config(), six_b, device="cuda:0", number_bytes=2).optimizer == 2 * trained
    assert memory_of(config(), six_b, device="cpu", number_bytes=4).optimizer == 8 * trained
    full = config(method="full")
    assert memory_of(full, six_b, device="cuda:0", number_bytes=2).total < 80e9


def test_full_weights_of_6b_take_most_of_80_gb(six_b: ModelSizes) -> None:
    full = config(method="full", optimizer="paged_adamw_8bit")
    forecast = memory_of(full, six_b, device="cuda:0", number_bytes=2)
    assert 60e9 < forecast.total < 80e9
    # float32, and under autocast the 16-bit copy that the forward pass computes with
    assert forecast.weights == 6 * six_b.count()
    assert memory_of(full, six_b, device="cuda:0", number_bytes=4).weights == 4 * six_b.count()


def test_the_ways_out_of_too_little_memory_are_settings_that_this_run_does_not_have_yet() -> None:
    full = config(method="full", optimizer="adamw", gradient_checkpointing=False)
    assert ways_out(full, "cuda:0") == [
        "max_tokens", "gradient_checkpointing=true", "optimizer=paged_adamw_8bit", "method=lora", "method=qlora",
    ]  # fmt: skip
    assert ways_out(config(method="lora"), "cpu") == ["max_tokens", "method=qlora"]
    assert ways_out(config(micro_batch_tokens=8192), "cuda:0") == ["micro_batch_tokens"]
    for settings in (full, config()):  # each is a setting of this config
        for way in ways_out(settings, "cuda:0"):
            assert way.split("=")[0] in ChatGlm3TrainingConfig.model_fields


def test_sizes_that_do_not_suit_4_bits_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES_6B, "hidden_size": 100}), encoding="utf-8")
    (finding,) = check_four_bit_sizes(ModelSizes.of(tmp_path))
    assert finding.name == "four_bit_sizes"
    assert finding.severity == "error"
    assert "method=lora" in finding.en


def test_answers_that_will_not_fit_are_forecast(six_b: ModelSizes) -> None:
    settings = config(evaluation={"dev": ["d"], "concurrency": 16, "max_new_tokens": 256})

    def found(memory: int | None, prompt_tokens: int = 2_048) -> list[Finding]:
        return check_answer_memory(settings, six_b, Hardware("cuda:0", 2, memory), prompt_tokens=prompt_tokens)

    # 28 KiB a token (2 x 28 layers x 2 groups x 128 x 2 bytes), 16 answers of 2,304 tokens, twice: 2.1 GB
    assert six_b.cache_values * 2 == 28 * 1024
    assert found(12_000_000_000) == []
    (finding,) = found(6_000_000_000)
    assert (finding.name, finding.severity) == ("evaluation_memory", "error")
    assert "2.1 GB" in finding.en
    assert found(None) == []
    # prompts may be longer than what is trained on: 16 x 8,192 tokens take 7.5 GB and 256 more each 0.2 GB
    (finding,) = found(12_000_000_000, prompt_tokens=8_192)
    assert "cache 7.8 GB" in finding.en


def test_the_longest_prompt_has_all_references_and_ends_at_the_context(tiny: Path) -> None:
    tokenizer = ChatGLM3Tokenizer.from_directory(tiny)
    short, long = replace(ROW, references=("甲是乙。",)), replace(ROW, references=("甲是乙。",) * 30)
    counts = [longest_prompt([row], tokenizer, context=8_192, language="zh") for row in (short, long)]
    assert counts[1] > counts[0] + 29 * 4
    assert longest_prompt([long, short], tokenizer, context=8_192, language="zh") == counts[1]
    assert longest_prompt([long], tokenizer, context=100, language="zh") == 100
    assert longest_prompt([], tokenizer, context=100, language="zh") == 0


def test_masked_labels_stop_a_run(six_b: ModelSizes) -> None:
    hardware = Hardware("cpu", 4, None)
    found = examine(config(), [example(learned=0)] * 20, [], six_b, hardware=hardware, steps=20, prompt_tokens=10)
    assert ("no_labels", "error") in [(finding.name, finding.severity) for finding in found]


def test_rows_that_lost_a_cited_reference_are_a_warning() -> None:
    assert check_lengths([example()], 100) == []
    (note,) = check_lengths([example()] * 99 + [example(dropped=1)], 100)
    assert note.severity == "note"
    (warning,) = check_lengths([example()] * 99 + [example(dropped=1, dropped_cited=1)], 100)
    assert warning.severity == "warning"
    assert "(1 of them one that the answer cites)" in warning.en


def test_dev_rows_that_are_trained_on_are_named() -> None:
    other = replace(ROW, question="丙？", references=("丙是丁。",), file="dev.jsonl", line=9)
    assert check_leak([ROW], [other]) == []
    (finding,) = check_leak([ROW], [replace(ROW, file="dev.jsonl", line=8), other])
    assert finding.severity == "error"
    assert "dev.jsonl:8" in finding.en


def test_a_dev_row_whose_references_are_numbered_anew_is_a_leak_all_the_same() -> None:
    numbered = replace(ROW, question="甲是 什么？", references=("丙是丁。", "甲是乙。"), answer="乙。[2]", line=7)
    trained = replace(ROW, question="它呢？", standalone="甲是什么？", references=("丙是丁。",), answer="乙。")
    (finding,) = check_leak([trained], [numbered])
    assert "train.jsonl:7" in finding.en
    other = replace(trained, standalone="丙是什么？")
    assert check_leak([other], [numbered]) == []  # another question; what both show, only one cites


def test_a_reference_that_is_cited_in_training_and_in_dev_is_a_leak_whatever_is_asked() -> None:
    asked_anew = replace(ROW, question="乙是谁？", references=("丙是丁。", "甲是乙。"), answer="甲。【2】")
    assert [finding.name for finding in check_leak([ROW], [asked_anew])] == ["dev_leak"]
    beside = replace(asked_anew, answer="丁。[1]")  # the trained reference stands beside it uncited
    assert check_leak([ROW], [beside]) == []
    assert check_leak([ROW], [replace(ROW, answer="没有答案。[1]", refuse=True)]) == []
