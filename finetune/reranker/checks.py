"""What the doctor looks at before a reranker's training: rows, lengths, vocabulary, leaks, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chains.bge.directory import ModelDirectory
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.checks import (
    Hardware,
    check_duplicates,
    check_leak,
    check_negatives,
    check_vocabulary,
    sampled,
    typical,
)
from finetune.bge.workers import Workers
from finetune.data.rows import RetrievalRow
from finetune.doctor import (
    Finding,
    check_learning_rate,
    check_memory,
    check_precision,
    check_steps,
    check_truncated,
    in_order,
)
from finetune.evaluation import RetrievalSet
from finetune.memory import Forecast, Plan, Shape, forecast
from finetune.reranker.config import RerankerTrainingConfig

_WHOLE = 1_000_000  # tokens: no pair is cut while its length is counted


def examine(
    config: RerankerTrainingConfig,
    rows: Sequence[RetrievalRow],
    dev: RetrievalSet,
    directory: ModelDirectory,
    hardware: Hardware,
    *,
    steps: int,
) -> list[Finding]:
    """All findings about a run that has not begun, errors first.

    Args:
        config: the settings.
        rows: what it trains on.
        dev: what it is judged on.
        directory: of the base model.
        hardware: what it runs on.
        steps: optimizer steps it will take.
    """
    tokenizer = BgeTokenizer.from_directory(directory)
    sample = sampled(rows, config.seed)
    pairs = [(row.query, text) for row in sample for text in (*row.pos, *row.neg)]
    lengths = [len(ids) for ids, _ in tokenizer.encode_pairs(pairs, _WHOLE)]
    plan = memory_forecast(config, directory, hardware, lengths, parameters=parameters_of(directory))
    return in_order(
        [
            *check_steps(steps, rows=len(rows), batch_size=config.batch_size),
            *check_negatives(rows, config),
            *check_duplicates(rows),
            *check_leak(rows, dev),
            *check_truncated(lengths, config.max_tokens, key="max_tokens", zh="查询与片段", en="pairs"),
            *check_vocabulary(tokenizer, [row.query for row in sample] + [row.pos[0] for row in sample]),
            *check_learning_rate(config.learning_rate, "full"),
            *check_precision(config.precision, device=hardware.kind, has_bf16=hardware.has_bf16),
            *check_memory(plan, hardware.memory, ["micro_batch_tokens", "graph_tokens", "max_tokens"]),
        ]
    )


def parameters_of(directory: ModelDirectory) -> int:
    """Weights of the cross-encoder, its head included, counted from the configuration without loading it."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = AutoConfig.from_pretrained(str(directory.path), num_labels=1)
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(sizes)
    return sum(parameter.numel() for parameter in model.parameters())


def memory_forecast(
    config: RerankerTrainingConfig,
    directory: ModelDirectory,
    hardware: Hardware,
    lengths: Sequence[int],
    *,
    parameters: int,
) -> Forecast:
    """What one process will take: the graph of a whole step where it is small, else of one micro-batch.

    Args:
        config: the settings.
        directory: of the base model.
        hardware: what it runs on.
        lengths: of pairs, in tokens.
        parameters: of the model; all are trained.
    """
    from transformers import AutoConfig

    sizes: Any = AutoConfig.from_pretrained(str(directory.path))
    pair = typical(lengths, config.max_tokens)
    dropout = sizes.attention_probs_dropout_prob if config.dropout is None else config.dropout
    rows = max(1, config.batch_size // hardware.processes)
    workers = Workers.fitting(hardware.device)
    at_once = config.least_graph_tokens(hardware.device) + workers * config.tokens_at_once(hardware.device)
    plan = Plan(
        trainable=parameters,
        tokens=min(rows * config.group_size * pair, at_once),
        workers=workers,
        length=pair,
        activation_bytes=hardware.number_bytes(config.precision),
        attention_scores=hardware.kind == "cpu" and dropout > 0,
    )
    heads, hidden = sizes.num_attention_heads, sizes.hidden_size
    return forecast(Shape(parameters, sizes.num_hidden_layers, hidden, sizes.intermediate_size, heads), plan)
