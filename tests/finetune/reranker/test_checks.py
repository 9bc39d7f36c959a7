"""What the doctor finds before a reranker's training, its memory above all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chains.bge.directory import read_model_directory
from finetune.bge.checks import Hardware
from finetune.data.rows import RetrievalRow
from finetune.evaluation import from_rows
from finetune.reranker.checks import examine, memory_forecast, parameters_of
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import load_cross_encoder

ROW = RetrievalRow(query="怎样备份知识库", pos=("备份的第一条",), neg=("向量", "模型", "检索"))
DEV = from_rows("dev", [RetrievalRow(query="新的问题", pos=("新的文档",))])


def config(**settings: Any) -> RerankerTrainingConfig:
    given = {"model": "m", "output": "o", "train": ["t.jsonl"], "group_size": 4}
    return RerankerTrainingConfig.from_dict({**given, **settings}, where="test")


def test_weights_are_counted_with_the_head_and_without_loading_the_model(tiny_encoder: Path) -> None:
    directory = read_model_directory(tiny_encoder)
    model = load_cross_encoder(directory, seed=0, device="cpu")
    assert parameters_of(directory) == sum(parameter.numel() for parameter in model.parameters())


def test_a_training_that_does_not_fit_is_found_before_it_begins(tiny_encoder: Path) -> None:
    directory = read_model_directory(tiny_encoder)

    def found(memory: int) -> list[tuple[str, str]]:
        hardware = Hardware("cpu", has_bf16=False, memory=memory)
        findings = examine(config(), [ROW], DEV, directory, hardware, steps=20)
        return [(finding.name, finding.severity) for finding in findings]

    assert found(8 * 10**9) == []
    assert found(4 * 10**8) == [("memory", "error")]


def test_the_forecast_grows_with_the_pairs_of_a_step_up_to_a_micro_batch(tiny_encoder: Path) -> None:
    directory = read_model_directory(tiny_encoder)

    def activations(processes: int = 1, **settings: Any) -> int:
        plan, hardware = config(dropout=0.0, max_tokens=64, **settings), Hardware("cpu", False, None, processes)
        return memory_forecast(plan, directory, hardware, [40], parameters=10**6).activations

    one = activations(batch_size=1)  # 4 pairs of 40 tokens
    assert activations(batch_size=2) == 2 * one
    assert activations(processes=2, batch_size=2) == one
    assert activations(batch_size=10**6, graph_tokens=0, micro_batch_tokens=320) == 2 * one
