"""Train a BGE retriever on rows of query, positives and negatives.

    ragproj finetune bge --config finetune/configs/bge_full.yaml
    torchrun --nproc-per-node 8 -m ui.cli finetune bge --config finetune/configs/bge_full.yaml

FlagEmbedding is the reference: for the same rows, weights and order the loss of every step is the same. What differs
is how it is computed: queries and passages pooled in micro-batches of like lengths, each distinct text once, the last
layer for the first token alone, and batches larger than memory through a gradient cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

from chains.bge.directory import ModelDirectory, read_model_directory, resolve_model
from chains.bge.embeddings import BGEEmbeddings
from chains.bge.encoder import embed
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.batches import (
    Mask,
    TokenBatch,
    batch_rows,
    false_negatives,
    sample_row,
    steps_per_epoch,
    token_batch,
)
from finetune.bge.config import FORWARD_ROWS, BgeTrainingConfig, RetrievalTrainingConfig
from finetune.bge.encoder import save_candidate, training_encoder
from finetune.bge.gradient_cache import MicroBatch, backward, micro_batches
from finetune.bge.loss import Objective, largest_dimension_problem, loss_of
from finetune.bge.word_table import word_table
from finetune.bge.workers import Workers
from finetune.data.rows import RetrievalRow
from finetune.distributed import Processes, joined
from finetune.doctor import Monitor
from finetune.optimizer import adamw
from finetune.order import epoch_order, seeded
from finetune.precision import choose_device, choose_numbers, device_kind
from finetune.schedule import Schedule
from finetune.training_loop import Learner, Observe, TrainingError, TrainingLoop, TrainingResult

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.amp import GradScaler

_SHOWN = 20  # rows named in a message


@dataclass(frozen=True)
class StepBatch:
    """One step's work for this process."""

    rows: int
    """of all processes"""
    texts: TokenBatch
    """this process's own"""
    masked: Mask | None
    """(rows, rows x group); with cross-device negatives of all processes, else of this one"""
    teacher: list[tuple[float, ...]] | None
    """scores by row, of the same extent"""


def train(
    config: BgeTrainingConfig,
    rows: Sequence[RetrievalRow],
    *,
    evaluate: Callable[[Embeddings], float] | None = None,
    observe: Observe | None = None,
    monitor: Monitor | None = None,
    dev: str | None = None,
) -> TrainingResult:
    """Train and write the candidate to `config.output / "candidate"`; a run that was broken off goes on by itself.

    The candidate has the weights of the best evaluation, or the last ones without `evaluate`.

    Args:
        config: the settings.
        rows: what to train on.
        evaluate, observe, monitor, dev: as `TrainingLoop` has them; an evaluation sees the embedder that will serve.

    Raises:
        TrainingError: rows and settings do not fit together; every such row counts, the first are named.
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    directory = read_model_directory(resolve_model(config.model))
    if config.query_instruction is not None:
        directory = replace(directory, query_instruction=config.query_instruction)
    check(config, rows, directory)
    with joined(config.device) as processes:
        learner = _Retriever(config, rows, directory, processes)
        loop = TrainingLoop(config, learner, processes, evaluate=evaluate, observe=observe, monitor=monitor, dev=dev)
        return loop.run(lambda target: save_candidate(learner.model, target, directory, config))


def schedule_of(config: RetrievalTrainingConfig, rows: int, processes: int) -> Schedule:
    """How long a run over so many rows is.

    Raises:
        TrainingError: the processes cannot have the same share of every batch.
    """
    steps = steps_per_epoch(rows, batch_size=config.batch_size, processes=processes)
    if steps == 0 or config.batch_size % processes:
        raise TrainingError(
            f"{rows} 行、batch_size {config.batch_size} 无法平分给 {processes} 个进程，请改为其倍数",
            f"{rows} rows in batches of {config.batch_size} cannot be shared by {processes} processes;"
            " batch_size must be a multiple of them",
        )
    return Schedule.of(config, steps)


def check(config: BgeTrainingConfig, rows: Sequence[RetrievalRow], directory: ModelDirectory) -> None:
    """Nothing, where rows, settings and model fit together.

    Raises:
        TrainingError: they do not; says which and what to do.
    """
    too_long = max(config.query_max_tokens, config.passage_max_tokens)
    if too_long > directory.max_tokens:
        raise TrainingError(
            f"模型最多读取 {directory.max_tokens} 个 token，"
            f"query_max_tokens 或 passage_max_tokens 为 {too_long}，请调小",
            f"the model reads {directory.max_tokens} tokens at most, but query_max_tokens or passage_max_tokens is"
            f" {too_long}; lower it",
        )
    if (size := largest_dimension_problem(config.matryoshka, directory.dimensions)) is not None:
        raise TrainingError(
            f"matryoshka 中的 {size} 超过模型的维数 {directory.dimensions}，请去掉",
            f"matryoshka has {size}, the model only {directory.dimensions} dimensions; remove it",
        )
    check_rows(config, rows)


def check_rows(config: RetrievalTrainingConfig, rows: Sequence[RetrievalRow]) -> None:
    """Nothing, where every row has what the settings ask of it; rerankers', too.

    Raises:
        TrainingError: some have not; says which and what to do.
    """
    if config.group_size > 1:
        _all_rows(rows, lambda row: bool(row.neg), "没有 neg，group_size 应为 1，或先用 ragproj data mine 挖掘负例",
                  "have no neg: set group_size=1, or mine negatives with `ragproj data mine`")  # fmt: skip
    if config.distillation:
        _all_rows(rows, lambda row: bool(row.pos_scores and row.neg_scores),
                  "没有 pos_scores 和 neg_scores，请设 distillation=false，或先给它们打分",
                  "have no pos_scores and neg_scores: set distillation=false, or score them first")  # fmt: skip


def _all_rows(rows: Sequence[RetrievalRow], fits: Callable[[RetrievalRow], bool], zh: str, en: str) -> None:
    odd = [f"{row.file}:{row.line}" for row in rows if not fits(row)]
    if odd:
        listed = ", ".join(odd[:_SHOWN]) + (" …" if len(odd) > _SHOWN else "")
        raise TrainingError(f"{len(odd)} 行训练数据{zh}：{listed}", f"{len(odd)} rows {en}: {listed}")


class _Retriever(Learner[StepBatch, Embeddings]):
    """An encoder that learns to set a row's positive apart from all other passages."""

    rows: Sequence[RetrievalRow]

    def __init__(
        self,
        config: BgeTrainingConfig,
        rows: Sequence[RetrievalRow],
        directory: ModelDirectory,
        processes: Processes,
    ) -> None:
        self.config, self.rows, self.directory, self.processes = config, rows, directory, processes
        self.device = choose_device(config.device, processes.local_rank)
        self.numbers = choose_numbers(config.precision, self.device)
        self.schedule = schedule_of(config, len(rows), processes.count)
        self.tokenizer = BgeTokenizer.from_directory(directory)
        self.model = training_encoder(config, directory, self.device)
        # recomputed layers draw their dropout from torch's own generator, which workers must not share
        self.workers = Workers(self.model, 1 if config.gradient_checkpointing else Workers.fitting(self.device))
        self.graph_tokens = config.graph_tokens_of(self.model, self.device, checkpointing=config.gradient_checkpointing)
        self.optimizer = adamw(self.model, config, embedding_rate=config.embedding_rate)
        self.objective = Objective(
            config.temperature, config.in_batch_negatives, tuple(config.matryoshka), directory.normalize
        )
        self.everywhere = config.in_batch_negatives and config.cross_device_negatives
        self.identity = {**config.deciding(), "rows": rows_digest(rows), "processes": processes.count}

    def arithmetic(self) -> str:
        """What a step works on."""
        batch, group = self.config.batch_size, self.config.group_size
        return f"batch {batch} rows x (1 query + {group} passages) = {batch * (1 + group)} texts a step"

    def served(self) -> Embeddings:
        """The embedder that will serve, over the very weights that are trained."""
        return BGEEmbeddings.from_encoder(self.model, self.directory)

    def batch(self, step: int) -> StepBatch:
        """What a step works on: the whole batch is drawn in every process, its own share is tokenized."""
        config, count = self.config, self.processes.count
        epoch, place = divmod(step, self.schedule.steps_per_epoch)
        order = epoch_order(len(self.rows), seed=config.seed, epoch=epoch)
        numbers = list(batch_rows(order, place, batch_size=config.batch_size, processes=count))
        own = self.processes.share(numbers)
        samples = [
            sample_row(
                self.rows[number],
                number=number,
                group_size=config.group_size,
                instruction=self.directory.query_instruction,
                distillation=config.distillation,
                seed=config.seed,
                epoch=epoch,
            )
            for number in (numbers if self.everywhere else own)
        ]
        own_samples = self.processes.share(samples) if self.everywhere else samples
        queries = self.tokenizer.encode([sample.query for sample in own_samples], config.query_max_tokens)
        passages = self.tokenizer.encode(
            [passage for sample in own_samples for passage in sample.passages], config.passage_max_tokens
        )
        masked = false_negatives(samples, texts=config.mask_duplicates, documents=config.mask_same_document)
        teacher = [sample.teacher for sample in samples if sample.teacher is not None]
        return StepBatch(
            rows=len(numbers),
            texts=token_batch(queries, passages),
            masked=masked if masked.any() else None,
            teacher=teacher or None,
        )

    def gradient(self, batch: StepBatch, step: int, scaler: GradScaler) -> float:
        """The loss of a batch; its gradient is spread over the processes by the passages each has encoded."""
        import torch

        gather = self.processes.gather if self.everywhere else _alone
        parts = 1 if self.everywhere else self.processes.count  # of the mean over all rows, one is this process's
        queries, passages = torch.tensor(batch.texts.queries), torch.tensor(batch.texts.passages)
        masked = None if batch.masked is None else torch.from_numpy(batch.masked).to(self.device)
        teacher = None if batch.teacher is None else torch.tensor(batch.teacher, device=self.device)

        def scaled_loss(vectors: Tensor) -> Tensor:  # (texts, d)
            found = loss_of(
                gather(vectors[queries]), gather(vectors[passages]), self.objective, masked=masked, teacher=teacher
            )
            return scaler.scale(found / parts)

        pieces = micro_batches(
            batch.texts.texts,
            pad_id=self.tokenizer.pad_id,
            token_budget=self.config.tokens_at_once(self.device),
            max_rows=FORWARD_ROWS[device_kind(self.device)],
            device=self.device,
        )
        with word_table(self.workers.models, [piece.input_ids for piece in pieces]):
            loss = backward(
                self._encode,
                pieces,
                scaled_loss,
                self.workers,
                graph_tokens=self.graph_tokens,
                seed=seeded(self.config.seed, step, self.processes.rank),
            )
        own = float(loss) / scaler.get_scale()
        return own if self.everywhere else self.processes.total(own, self.device)

    def _encode(self, model: nn.Module, piece: MicroBatch) -> Tensor:
        """Vectors of a piece by a worker's model, (n, dimensions)."""
        # entered for each piece: weights it casts in a pass without gradients must not be used in one with them
        with self.numbers.autocast(self.device):
            return embed(model, piece.input_ids, piece.attention_mask, self.directory)


def rows_digest(rows: Sequence[RetrievalRow]) -> str:
    """A hash of the rows in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row.as_dict(), ensure_ascii=False).encode())
    return digest.hexdigest()


def _alone(own: Tensor) -> Tensor:
    return own
