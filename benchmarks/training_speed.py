"""Training of a BGE-shaped BERT-mini: rows per second and memory, FlagEmbedding's runner against ours.

    python -m benchmarks.training_speed               # about 15 minutes on two quiet cores
    python -m benchmarks.training_speed --steps 6     # a trial

The same rows, start weights, batch and group size, lengths, learning rate and number of steps; each in a process of its
own, in turn. Rows are medical questions with their answer and three random other answers; queries are cut at 64 tokens,
passages at 256. Time is that of the steps after the first. Both save their model, and nDCG@10 of both is measured on
questions neither has seen.

"ours, fastest" is float32 without dropout, or bfloat16 without dropout where the processor multiplies it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, Report
from benchmarks.measuring import ChildRun, run_child, serve_child
from benchmarks.medfaq_training import questions_over_pool, split
from benchmarks.random_models import build_bert
from chains.metrics import paired_interval
from finetune.data.rows import RetrievalRow, read_retrieval_rows, write_rows

MODULE = "benchmarks.training_speed"
GROUP, QUERY_TOKENS, PASSAGE_TOKENS = 4, 64, 256
LEARNING_RATE, TEMPERATURE = 5e-4, 0.02
WHOLE_GRAPH = 40_000  # tokens of a batch of 32 x 4 here: FlagEmbedding keeps its whole graph, so do we
SEED = 42
FP32_BAR, FASTEST_BAR, MEMORY_BAR = 2.0, 3.0, 1.3
SMALL, LARGE = 64, 1_024
INSTRUCTION = "为这个句子生成表示以用于检索相关文章："
METRIC = "ndcg@10"


def flag_embedding(
    model: str, rows: str, output: str, batch: int, steps: int, *, device: str = "cpu", group: int = GROUP
) -> dict[str, Any]:
    """FlagEmbedding's own runner, as `python -m FlagEmbedding.finetune.embedder.encoder_only.base` starts it.

    On a GPU it computes in bfloat16, as ours does there.
    """
    from FlagEmbedding.finetune.embedder.encoder_only.base import (
        EncoderOnlyEmbedderDataArguments,
        EncoderOnlyEmbedderModelArguments,
        EncoderOnlyEmbedderRunner,
        EncoderOnlyEmbedderTrainingArguments,
    )
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    runner = EncoderOnlyEmbedderRunner(
        EncoderOnlyEmbedderModelArguments(model_name_or_path=model),
        EncoderOnlyEmbedderDataArguments(
            train_data=[rows],
            cache_path=f"{output}-cache",
            train_group_size=group,
            query_max_len=QUERY_TOKENS,
            passage_max_len=PASSAGE_TOKENS,
            query_instruction_for_retrieval=INSTRUCTION,
        ),
        EncoderOnlyEmbedderTrainingArguments(
            output_dir=output,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            warmup_steps=steps // 10,
            weight_decay=0.01,
            temperature=TEMPERATURE,
            use_cpu=device == "cpu",
            bf16=device != "cpu",
            seed=SEED,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    runner.trainer.add_callback(Clock())
    runner.run()
    losses = [entry["loss"] for entry in runner.trainer.state.log_history if "loss" in entry]
    return {"model": output, "rows_per_s": batch * (len(ends) - 1) / (ends[-1] - ends[0]), "loss": losses[-1]}


def ours(
    model: str,
    rows: str,
    output: str,
    batch: int,
    steps: int,
    settings: dict[str, Any],
    *,
    device: str = "cpu",
    group: int = GROUP,
) -> dict[str, Any]:
    """Our trainer."""
    from finetune.bge.config import BgeTrainingConfig
    from finetune.bge.train import train
    from finetune.training_loop import TrainingEvent

    times: list[float] = []

    def clock(event: TrainingEvent) -> None:
        assert event.rows_per_s is not None
        times.append(batch / event.rows_per_s)

    lengths = {"query_max_tokens": QUERY_TOKENS, "passage_max_tokens": PASSAGE_TOKENS, "group_size": group}
    config = BgeTrainingConfig(
        model=model,
        output=Path(output),
        train=[Path(rows)],
        batch_size=batch,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        temperature=TEMPERATURE,
        device=device,
        seed=SEED,
        **lengths | settings,
    )
    result = train(config, read_retrieval_rows([Path(rows)]), observe=clock)
    rest = times[1:] or times
    return {"model": str(result.candidate), "rows_per_s": batch * len(rest) / sum(rest), "loss": result.losses[-1]}


def scores(model: str, questions: int, passages: int) -> dict[str, Any]:
    """nDCG@10 of a saved model, one value per unseen question.

    The instruction is given, since the directory that FlagEmbedding saves does not hold it.
    """
    from chains.bge.embeddings import BGEEmbeddings
    from finetune.evaluation import evaluate_embeddings

    parts = split()
    unseen = questions_over_pool("unseen", parts.test, parts.passages)
    unseen = unseen.sampled(max_questions=questions, max_passages=passages, seed=SEED)
    found = evaluate_embeddings(BGEEmbeddings(model=model, engine="torch", query_instruction=INSTRUCTION), unseen)
    return {"values": list(found.by_metric[METRIC])}


def write_training_rows(path: Path, *, group: int = GROUP) -> Path:
    """Questions, each with its answer and others drawn at random, as many as make a group."""
    parts, draw = split(), random.Random(SEED)
    texts = sorted({parts.passages[row["context_id"]] for row in parts.train})
    rows = []
    for row in parts.train:
        positive = parts.passages[row["context_id"]]
        others = [text for text in draw.sample(texts, group) if text != positive]
        rows.append(RetrievalRow(row["question"], (positive,), tuple(others[: group - 1])))
    write_rows(path, rows)
    return path


def compare_speed(report: Report, scratch: Path, model: Path, rows: Path, *, batch: int, steps: int, pool: int) -> None:
    """FlagEmbedding and ours in turn."""
    common = {"model": model, "rows": rows, "batch": batch, "steps": steps}
    runs: dict[str, ChildRun] = {
        "FlagEmbedding": run_child(MODULE, "flag_embedding", output=scratch / "theirs", **common)
    }
    for name, settings in {
        "ours, float32": {"precision": "fp32", "graph_tokens": WHOLE_GRAPH},
        "ours, fastest": {"precision": "auto", "dropout": 0.0, "graph_tokens": WHOLE_GRAPH},
    }.items():
        output = scratch / name.replace(", ", "-")
        runs[name] = run_child(MODULE, "ours", output=output, settings=settings, **common)
    reference = runs["FlagEmbedding"].result
    values = {
        name: run_child(MODULE, "scores", model=run.result["model"], questions=pool // 4, passages=pool).result[
            "values"
        ]
        for name, run in runs.items()
    }
    for name, run in runs.items():
        gain = paired_interval(values["FlagEmbedding"], values[name], seed=SEED)
        report.add(
            f"batch {batch} x group {GROUP}, {steps} steps",
            who=name,
            rows_per_s=run.result["rows_per_s"],
            to_theirs=run.result["rows_per_s"] / reference["rows_per_s"],
            cpu_s=run.cpu_s,
            peak_mb=run.peak_mb,
            last_loss=run.result["loss"],
            ndcg=sum(values[name]) / len(values[name]),
            ndcg_to_theirs_95=f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]",
        )
    for name, limit in {"ours, float32": FP32_BAR, "ours, fastest": FASTEST_BAR}.items():
        ratio = runs[name].result["rows_per_s"] / reference["rows_per_s"]
        report.bar(f"rows per second, {name}", ratio, limit, "x FlagEmbedding", at_least=True)


def compare_memory(report: Report, scratch: Path, model: Path, rows: Path) -> None:
    """One step of a small and of a batch sixteen times as large, with the same settings."""
    settings = {"precision": "fp32", "graph_tokens": 8_192, "passage_max_tokens": 128, "group_size": 2}
    peaks = {}
    for batch in (SMALL, LARGE):
        output = scratch / f"memory-{batch}"
        run = run_child(MODULE, "ours", model=model, rows=rows, output=output, batch=batch, steps=1, settings=settings)
        peaks[batch] = run.peak_mb
        report.add("memory", batch=batch, peak_mb=run.peak_mb, rows_per_s=run.result["rows_per_s"], **settings)
    report.bar(f"memory of batch {LARGE}", peaks[LARGE] / peaks[SMALL], MEMORY_BAR, f"x that of batch {SMALL}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Speed, then memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pool", type=int, default=1_600, help="unseen passages that nDCG is measured on")
    parser.add_argument("--only", choices=["speed", "memory"], default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        Report("training_speed", {"steps": options.steps, "batch": options.batch}, options.results) as report,
    ):
        scratch = Path(folder)
        model = build_bert(scratch / "base", "mini", pooling="cls", max_tokens=512, instruction=INSTRUCTION)
        rows = write_training_rows(scratch / "rows.jsonl")
        if options.only != "memory":
            compare_speed(report, scratch, model, rows, batch=options.batch, steps=options.steps, pool=options.pool)
        if options.only != "speed":
            compare_memory(report, scratch, model, rows)


TASKS = {"flag_embedding": flag_embedding, "ours": ours, "scores": scores}

if __name__ == "__main__" and not serve_child(sys.argv[1:], TASKS):
    main()
