"""Rows to train tiny models on, and trainings that run in processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from finetune.bge.config import BgeTrainingConfig
from finetune.data.rows import RetrievalRow
from finetune.reranker.config import RerankerTrainingConfig

TOPICS = ("备份知识库", "向量模型检索", "文档问题答案", "第一条为了", "怎样做检索", "知识问题", "模型备份", "答案文档")
PRELOADED = ["transformers", "peft", "finetune.bge.train"]


def make_rows(count: int, *, negatives: int = 3, seed: int = 0) -> list[RetrievalRow]:
    """Rows whose query and positive share a number, no text twice, passages of 5 to 50 characters."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        topic, key = draw.choice(TOPICS), f"{number:03}"
        texts = [f"{draw.choice(TOPICS) * draw.randint(1, 8)}{number}，{other}" for other in range(negatives)]
        rows.append(
            RetrievalRow(
                query=f"{topic}{key}？",
                pos=(f"{topic * draw.randint(1, 6)}{key}。",),
                neg=tuple(texts),
                pos_scores=(draw.uniform(2, 5),),
                neg_scores=tuple(draw.uniform(-3, 2) for _ in texts),
                file="rows.jsonl",
                line=number + 1,
            )
        )
    return rows


def training_config(model: Path, output: Path, **settings: Any) -> BgeTrainingConfig:
    """A short run on the CPU, in float32: some processors would compute in bfloat16."""
    settings = {"batch_size": 8, "group_size": 3, "max_steps": 6, "learning_rate": 1e-3, **settings}
    usual = {"query_max_tokens": 40, "passage_max_tokens": 64, "precision": "fp32", "device": "cpu"}
    return BgeTrainingConfig(model=str(model), output=output, train=["rows.jsonl"], **usual | settings)


def reranker_config(model: Path, output: Path, **settings: Any) -> RerankerTrainingConfig:
    """A short run of a reranker on the CPU, in float32, too."""
    settings = {"batch_size": 4, "group_size": 3, "max_steps": 4, "learning_rate": 1e-3, **settings}
    content = {"model": str(model), "output": output, "train": ["rows.jsonl"], "device": "cpu"}
    return RerankerTrainingConfig(**{**content, "precision": "fp32", "max_tokens": 32, "dropout": 0.0, **settings})


def start(
    task: Callable[..., None], *arguments: Any, processes: int = 1, method: str = "forkserver"
) -> list[BaseProcess]:
    """The task in processes as torchrun would start them, forked from one that has loaded torch, or from this one."""
    context = get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        process = context.Process(target=_as_rank, args=(rank, processes, port, task, arguments))
        process.start()
        started.append(process)
    return started


def finished(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes."""
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _as_rank(rank: int, count: int, port: int, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    task(*arguments)


# --- tasks ------------------------------------------------------------------------------------------------------


def train_and_record(model: Path, output: Path, rows: list[RetrievalRow], settings: dict[str, Any]) -> None:
    """Train; the first process writes its losses beside the candidate."""
    from finetune.bge.train import train

    result = train(training_config(model, output, **settings), rows)
    if os.environ.get("RANK", "0") == "0":
        (output / "losses.json").write_text(json.dumps(result.losses), encoding="utf-8")


def run_command(words: list[str]) -> None:
    """A `ragproj` command; its exit code is the process's."""
    from ui.cli import main

    sys.exit(main(words))


def train_and_die(model: Path, output: Path, rows: list[RetrievalRow], settings: dict[str, Any], step: int) -> None:
    """Train until this step, then a real SIGKILL."""
    from finetune.bge.train import train
    from finetune.training_loop import TrainingEvent

    def kill(event: TrainingEvent) -> None:
        if event.step == step and event.loss is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    train(training_config(model, output, **settings), rows, observe=kill)


def train_reranker_and_die(model: Path, output: Path, rows: list[RetrievalRow], settings: dict[str, Any]) -> None:
    """Train a reranker until its third step, then a real SIGKILL of the first process."""
    from chains.bge.directory import read_model_directory
    from finetune.reranker.train import train
    from finetune.training_loop import TrainingEvent

    def kill(event: TrainingEvent) -> None:
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    train(reranker_config(model, output, **settings), rows, read_model_directory(model), observe=kill)


def train_reranker_and_record(model: Path, output: Path, rows: list[RetrievalRow], settings: dict[str, Any]) -> None:
    """Train a reranker; the first process writes losses and the norms of the steps it took beside the candidate."""
    from chains.bge.directory import read_model_directory
    from finetune.reranker.train import train

    norms: list[float | None] = []
    config, directory = reranker_config(model, output, **settings), read_model_directory(model)
    losses = train(config, rows, directory, observe=lambda event: norms.append(event.gradient_norm)).losses
    if os.environ.get("RANK", "0") == "0":
        (output / "record.json").write_text(json.dumps({"losses": losses, "norms": norms}), encoding="utf-8")


def reference_losses_of_two(model: Path, target: Path, rows: list[RetrievalRow], settings: dict[str, Any]) -> None:
    """`reference_losses` in two processes, forked from this one: FlagEmbedding takes ten seconds to import."""
    from FlagEmbedding.finetune.embedder.encoder_only.base import modeling  # noqa: F401

    codes = finished(start(reference_losses, model, target, rows, settings, processes=2, method="fork"))
    sys.exit(int(codes != [0, 0]))


def reference_losses(model: Path, target: Path, rows: list[RetrievalRow], settings: dict[str, Any]) -> None:
    """FlagEmbedding's model, driven over the rows and batches of a training with the same settings.

    Writes the loss of every step. With several processes their gradients are averaged, as their trainer's DDP does.
    """
    import torch
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
    from torch import distributed
    from transformers import AutoModel, AutoTokenizer

    from finetune.bge.batches import batch_rows, sample_row
    from finetune.bge.train import schedule_of
    from finetune.optimizer import decay_groups
    from finetune.order import epoch_order

    config = training_config(model, target, **settings)
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count > 1:
        distributed.init_process_group("gloo")
    base = AutoModel.from_pretrained(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = BiEncoderOnlyEmbedderModel(
        base,
        negatives_cross_device=count > 1,
        temperature=config.temperature,
        use_mrl=bool(config.matryoshka),
        mrl_dims=config.matryoshka,
        normalize_embeddings=True,
    ).train()
    tokenizer = AutoTokenizer.from_pretrained(model)
    schedule = schedule_of(config, len(rows), count)
    optimizer = torch.optim.AdamW(decay_groups(theirs, config.weight_decay))
    losses = []
    for step in range(schedule.steps):
        epoch, place = divmod(step, schedule.steps_per_epoch)
        order = epoch_order(len(rows), seed=config.seed, epoch=epoch)
        numbers = list(batch_rows(order, place, batch_size=config.batch_size, processes=count))
        share = len(numbers) // count
        samples = [
            sample_row(
                rows[number],
                number=number,
                group_size=config.group_size,
                instruction="为这个句子生成表示以用于检索相关文章：",
                distillation=config.distillation,
                seed=config.seed,
                epoch=epoch,
            )
            for number in numbers[rank * share : (rank + 1) * share]
        ]
        texts = [[sample.query for sample in samples], [text for sample in samples for text in sample.passages]]
        limits = (config.query_max_tokens, config.passage_max_tokens)
        queries, passages = (
            tokenizer(part, truncation=True, max_length=limit, padding=True, return_tensors="pt")
            for part, limit in zip(texts, limits, strict=True)
        )
        teacher = [score for sample in samples for score in sample.teacher or ()] or None
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule.rate(step)
        flag = not config.in_batch_negatives
        loss = theirs(queries, passages, teacher_scores=teacher, no_in_batch_neg_flag=flag).loss
        loss.backward()
        for parameter in theirs.parameters():
            if count > 1 and parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= count
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if rank == 0:
        target.mkdir(parents=True, exist_ok=True)
        (target / "reference.json").write_text(json.dumps(losses), encoding="utf-8")
    if count > 1:
        distributed.destroy_process_group()
