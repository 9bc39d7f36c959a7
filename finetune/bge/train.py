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
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings

from chains.bge.directory import ModelDirectory, read_model_directory, resolve_model
from chains.bge.encoder import embed
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.batches import (
    Mask,
    TokenBatch,
    batch_rows,
    epoch_order,
    false_negatives,
    sample_row,
    seeded,
    steps_per_epoch,
    token_batch,
)
from finetune.bge.checkpoints import Checkpoints, State
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.distributed import Processes, joined
from finetune.bge.encoder import choose_device, choose_numbers, save_candidate, training_encoder
from finetune.bge.gradient_cache import MicroBatch, backward, micro_batches
from finetune.bge.loss import Objective, largest_dimension_problem, loss_of
from finetune.bge.word_table import word_table
from finetune.data.rows import RetrievalRow
from finetune.early_stopping import EarlyStopping
from loaders.errors import RagProjError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Micro-batches: small ones stay in a processor's cache, large ones fill a GPU.
_CPU_TOKENS, _GPU_TOKENS = 1_024, 16_384
_CPU_ROWS, _GPU_ROWS = 64, 1_024
_EVENTS = 10  # evaluations and checkpoints of a run whose config does not say how often
_SHOWN = 20  # rows named in a message
# Settings that do not change what the weights become (of the training files the rows count, not their names).
_FREE = frozenset(
    {"output", "train", "evaluation", "gate", "doctor", "checkpoint_steps", "log_steps", "graph_tokens", "device"}
)


class TrainingError(RagProjError):
    """Rows and settings that do not fit together."""


@dataclass(frozen=True)
class TrainingEvent:
    """What one optimizer step, or the evaluation after it, brought."""

    step: int
    """steps done; 0 for the evaluation before the first"""
    steps: int
    """of the whole run"""
    loss: float | None = None
    gradient_norm: float | None = None
    """before it was scaled down"""
    learning_rate: float | None = None
    skipped: bool = False
    """float16 overflowed: the gradients were thrown away"""
    rows_per_s: float | None = None
    score: float | None = None
    """of an evaluation"""


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind."""

    candidate: Path
    """the model directory, or the adapter directory"""
    directory: ModelDirectory
    """of the base"""
    steps: int
    """optimizer steps done; fewer than planned where it stopped early"""
    losses: tuple[float, ...]
    """of every step"""
    scores: tuple[tuple[int, float], ...]
    """(step, score) of every evaluation"""
    best_step: int | None
    """the step whose weights the candidate has; None without evaluation: the last"""
    seconds: float
    """of this process, evaluations included"""
    rows_per_s: float
    """of the steps of this process, without evaluations; 0 where none was left to do"""


@dataclass(frozen=True)
class Plan:
    """How long a run is."""

    steps_per_epoch: int
    steps: int
    warmup: int

    @classmethod
    def of(cls, config: BgeTrainingConfig, rows: int, processes: int) -> Plan:
        """The steps of a run over so many rows."""
        per_epoch = steps_per_epoch(rows, batch_size=config.batch_size, processes=processes)
        steps = config.max_steps or math.ceil(per_epoch * config.epochs)
        return cls(per_epoch, steps, math.ceil(steps * config.warmup_share))

    def rate(self, step: int) -> float:
        """Share of the highest learning rate at a step, counted from 0: transformers' `linear` schedule."""
        if step < self.warmup:
            return step / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)


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
    observe: Callable[[TrainingEvent], None] | None = None,
) -> TrainingResult:
    """Train and write the candidate to `config.output / "candidate"`; a run that was broken off goes on by itself.

    The candidate has the weights of the best evaluation, or the last ones without `evaluate`. Checkpoints stay in
    `config.output / "checkpoints"` until `Checkpoints.clear`.

    Args:
        config: the settings.
        rows: what to train on.
        evaluate: the score of the model so far, higher is better; called in the first process before the first step,
            every `evaluation.every_steps` and at the end.
        observe: told of every step and evaluation, in the first process; may raise to end the run.

    Raises:
        TrainingError: rows and settings do not fit together; every such row counts, the first are named.
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    started = time.perf_counter()
    directory = read_model_directory(resolve_model(config.model))
    if config.query_instruction is not None:
        directory = replace(directory, query_instruction=config.query_instruction)
    check(config, rows, directory)
    with joined(config.device) as processes:
        run = _Run(config, rows, directory, processes, evaluate, observe)
        run.resume()
        run.loop()
        return run.finish(started)


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


class _Run:
    """One training run in one process: what the loop needs, held together."""

    def __init__(
        self,
        config: BgeTrainingConfig,
        rows: Sequence[RetrievalRow],
        directory: ModelDirectory,
        processes: Processes,
        evaluate: Callable[[Embeddings], float] | None,
        observe: Callable[[TrainingEvent], None] | None,
    ) -> None:
        import torch

        self.config, self.rows, self.directory, self.processes = config, rows, directory, processes
        self.evaluate, self.observe = evaluate, observe
        self.device = choose_device(config.device, processes.local_rank)
        self.numbers = choose_numbers(config.precision, self.device)
        self.plan = Plan.of(config, len(rows), processes.count)
        if self.plan.steps_per_epoch == 0 or config.batch_size % processes.count:
            raise TrainingError(
                f"{len(rows)} 行、batch_size {config.batch_size} 无法平分给 {processes.count} 个进程，请改为其倍数",
                f"{len(rows)} rows in batches of {config.batch_size} cannot be shared by {processes.count} processes;"
                " batch_size must be a multiple of them",
            )
        self.tokenizer = BgeTokenizer.from_directory(directory)
        self.encoder = training_encoder(config, directory, self.device)
        self.trained = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.encoder, config.weight_decay), lr=config.learning_rate, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.split(":")[0], enabled=self.numbers.scaled)
        self.objective = Objective(
            config.temperature, config.in_batch_negatives, tuple(config.matryoshka), directory.normalize
        )
        self.stopping = EarlyStopping(config.evaluation.patience)
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.identity = {**settings_of(config), "rows": rows_digest(rows), "processes": processes.count}
        self.losses: list[float] = []
        self.step, self.rows_done, self.busy = 0, 0, 0.0
        self._announce()

    def _announce(self) -> None:
        if not self.processes.first:
            return
        config, plan = self.config, self.plan
        texts = config.batch_size * (1 + config.group_size)
        count = sum(parameter.numel() for parameter in self.trained)
        logger.info(
            "batch %d rows x (1 query + %d passages) = %d texts a step; %d rows / %d = %d steps an epoch; %d steps,"
            " %d of them warm-up; %s parameters trained on %s x %d",
            *(config.batch_size, config.group_size, texts, len(self.rows), config.batch_size),
            *(plan.steps_per_epoch, plan.steps, plan.warmup, f"{count:,}", self.device, self.processes.count),
        )

    def resume(self) -> None:
        """Go on from the newest checkpoint, or evaluate the model as it is."""
        checkpoint = self.checkpoints.newest(self.identity)
        if checkpoint is None:
            self._evaluate()
            return
        state = self.checkpoints.load(checkpoint, self.encoder, self.optimizer)
        self.step, self.losses = state.step, list(state.losses)
        self.stopping.restore(state.evaluations)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))
        logger.info("resumed after step %d of %d", self.step, self.plan.steps)

    def loop(self) -> None:
        """All steps that are left, with evaluations and checkpoints between them."""
        often = max(1, self.plan.steps // _EVENTS)
        evaluate_every = self.config.evaluation.every_steps or often
        save_every = self.config.checkpoint_steps or often
        for batch in ahead(self._batch(step) for step in range(self.step, self.plan.steps)):
            if self.stopping.should_stop:
                logger.info("stopped early: no new best in %s evaluations", self.stopping.patience)
                break
            event = self._optimize(batch)
            self._tell(event)
            last = self.step == self.plan.steps
            if self.step % evaluate_every == 0 or last:
                self._evaluate()
            if self.step % save_every == 0 or last:
                self._save()

    def finish(self, started: float) -> TrainingResult:
        """The candidate written, of the best weights where there were evaluations."""
        best = self.stopping.best_step
        if best is not None and best != self.step and self.processes.first:
            self.checkpoints.load_best(best, self.encoder)
        candidate = self.config.output / "candidate"
        if self.processes.first:
            save_candidate(self.encoder, candidate, self.directory, self.config)
        self.processes.wait()
        return TrainingResult(
            candidate=candidate,
            directory=self.directory,
            steps=self.step,
            losses=tuple(self.losses),
            scores=tuple(self.stopping.history),
            best_step=best,
            seconds=time.perf_counter() - started,
            rows_per_s=self.rows_done / self.busy if self.busy else 0.0,
        )

    def _batch(self, step: int) -> StepBatch:
        """What a step works on: the whole batch is drawn in every process, its own share is tokenized."""
        config, count = self.config, self.processes.count
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        order = epoch_order(len(self.rows), seed=config.seed, epoch=epoch)
        numbers = list(batch_rows(order, place, batch_size=config.batch_size, processes=count))
        own = self.processes.share(numbers)
        everywhere = config.in_batch_negatives and config.cross_device_negatives
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
            for number in (numbers if everywhere else own)
        ]
        own_samples = self.processes.share(samples) if everywhere else samples
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

    def _optimize(self, batch: StepBatch) -> TrainingEvent:
        """One optimizer step."""
        import torch

        began = time.perf_counter()
        rate = self.config.learning_rate * self.plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradient(batch)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm or math.inf)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss)
        took = time.perf_counter() - began
        self.rows_done, self.busy = self.rows_done + batch.rows, self.busy + took
        return TrainingEvent(
            step=self.step,
            steps=self.plan.steps,
            loss=loss,
            gradient_norm=float(norm),
            learning_rate=rate,
            skipped=self.scaler.get_scale() < scale,
            rows_per_s=batch.rows / took,
        )

    def _gradient(self, batch: StepBatch) -> float:
        """The loss of a batch; the parameters hold its (scaled) gradient, the same in every process."""
        import torch

        everywhere = self.config.in_batch_negatives and self.config.cross_device_negatives
        gather = self.processes.gather if everywhere else _alone
        parts = 1 if everywhere else self.processes.count  # of the mean over all rows, one is this process's
        on_gpu = self.device != "cpu"
        tokens = self.config.micro_batch_tokens or (_GPU_TOKENS if on_gpu else _CPU_TOKENS)
        queries, passages = torch.tensor(batch.texts.queries), torch.tensor(batch.texts.passages)
        masked = None if batch.masked is None else torch.from_numpy(batch.masked).to(self.device)
        teacher = None if batch.teacher is None else torch.tensor(batch.teacher, device=self.device)

        def scaled_loss(vectors: Tensor) -> Tensor:  # (texts, d)
            found = loss_of(
                gather(vectors[queries]), gather(vectors[passages]), self.objective, masked=masked, teacher=teacher
            )
            return self.scaler.scale(found / parts)

        pieces = micro_batches(
            batch.texts.texts,
            pad_id=self.tokenizer.pad_id,
            token_budget=tokens,
            max_rows=_GPU_ROWS if on_gpu else _CPU_ROWS,
            device=self.device,
        )
        with word_table(self.encoder, [piece.input_ids for piece in pieces]):
            loss = backward(
                self._encode,
                pieces,
                scaled_loss,
                graph_tokens=self.config.graph_tokens,
                seed=seeded(self.config.seed, self.step, self.processes.rank),
            )
        self.processes.sum_gradients(self.trained)
        own = float(loss) / self.scaler.get_scale()
        return own if everywhere else self.processes.total(own, self.device)

    def _encode(self, piece: MicroBatch) -> Tensor:
        """Vectors of a piece, (n, dimensions)."""
        import torch

        enabled = self.numbers.dtype is not None
        # entered for each piece: weights it casts in a pass without gradients must not be used in one with them
        with torch.autocast(self.device.split(":")[0], dtype=self.numbers.dtype, enabled=enabled):
            return embed(self.encoder, piece.input_ids, piece.attention_mask, self.directory)

    def _evaluate(self) -> None:
        """The score of the weights as they are, kept where it is the best so far; every process learns it."""
        if self.evaluate is None:
            return
        score = 0.0
        if self.processes.first:
            from chains.bge.embeddings import BGEEmbeddings

            self.encoder.eval()
            score = self.evaluate(BGEEmbeddings.from_encoder(self.encoder, self.directory))
            self.encoder.train()
        score = self.processes.total(score, self.device)
        if self.stopping.update(self.step, score) and self.processes.first:
            self.checkpoints.save_best(self.step, self.encoder)
        self._tell(TrainingEvent(self.step, self.plan.steps, score=score))

    def _save(self) -> None:
        if self.processes.first:
            state = State(
                step=self.step,
                run=self.identity,
                evaluations=self.stopping.state(),
                scaler=self.scaler.state_dict(),
                losses=tuple(self.losses),
            )
            self.checkpoints.save(state, self.encoder, self.optimizer, best_step=self.stopping.best_step)
        self.processes.wait()

    def _tell(self, event: TrainingEvent) -> None:
        if not self.processes.first:
            return
        if event.score is not None:
            logger.info("step %d/%d: score %.4f", event.step, event.steps, event.score)
        elif event.step % self.config.log_steps == 0 or event.step == 1:
            logger.info(
                "step %d/%d: loss %.4f, gradient %.2f, rate %.2e, %.1f rows/s",
                *(event.step, event.steps, event.loss, event.gradient_norm, event.learning_rate, event.rows_per_s),
            )
        if self.observe is not None:
            self.observe(event)


def decay_groups(encoder: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters as optimizer groups: matrices decay, vectors (biases, norms) do not."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def settings_of(config: BgeTrainingConfig) -> dict[str, Any]:
    """The settings that decide what the weights become, as JSON values."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude=set(_FREE))
    return found


def rows_digest(rows: Sequence[RetrievalRow]) -> str:
    """A hash of the rows in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row.as_dict(), ensure_ascii=False).encode())
    return digest.hexdigest()


def ahead(batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The same batches, each made in a thread while the one before is worked on."""
    waiting: deque[Future[StepBatch | None]] = deque()
    with ThreadPoolExecutor(1) as maker:
        waiting.append(maker.submit(next, batches, None))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(maker.submit(next, batches, None))
            yield batch


def _alone(own: Tensor) -> Tensor:
    return own
