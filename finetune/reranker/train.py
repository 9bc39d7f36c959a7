"""Train a cross-encoder on rows of query, positives and negatives, in one process.

    ragproj finetune reranker --config finetune/configs/reranker.yaml

The loss is FlagEmbedding's: cross-entropy over the scores of a row's group, the positive first; with distillation the
cross-entropy against the teacher's distribution is added. Order, sampling, schedule, checkpoints and micro-batches are
those of `finetune.bge`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from chains.bge.directory import ModelDirectory
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.batches import Sample, batch_rows, epoch_order, sample_row, seeded
from finetune.bge.checkpoints import Checkpoints, State
from finetune.bge.encoder import choose_device, choose_numbers
from finetune.bge.gradient_cache import MicroBatch, backward, micro_batches
from finetune.bge.train import Plan, TrainingEvent, decay_groups, rows_digest
from finetune.data.rows import RetrievalRow
from finetune.early_stopping import EarlyStopping
from finetune.judging import CANDIDATE, CHECKPOINTS, Trained
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import PairScorer, load_cross_encoder, save_cross_encoder, scores_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_TOKENS = {"cpu": 2_048, "cuda": 16_384}  # positions of a micro-batch where the config leaves it open
_ROWS = {"cpu": 64, "cuda": 1_024}
_EVENTS = 10  # evaluations and checkpoints of a run whose config does not say how often
# Settings that do not change what the weights become.
_FREE = frozenset(
    {"output", "evaluation", "gate", "doctor", "candidates", "checkpoint_steps", "log_steps", "graph_tokens", "device"}
)


def train_reranker(
    config: RerankerTrainingConfig,
    rows: Sequence[RetrievalRow],
    directory: ModelDirectory,
    *,
    evaluate: Callable[[PairScorer], float] | None = None,
    observe: Callable[[TrainingEvent], None] | None = None,
) -> Trained:
    """Train and write the candidate, of the best evaluation or of the last step; a broken-off run goes on by itself.

    Args:
        config: the settings.
        rows: what to train on; each has negatives.
        directory: of the model it starts from.
        evaluate: the score of the model so far, higher is better; before the first step, at intervals, at the end.
        observe: told of every step and evaluation; may raise to end the run.

    Raises:
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    started = time.perf_counter()
    run = _Run(config, rows, directory)
    run.resume(evaluate, observe)
    often = max(1, run.plan.steps // _EVENTS)
    evaluate_every, save_every = config.evaluation.every_steps or often, config.checkpoint_steps or often
    stepped = time.perf_counter()
    first = run.step
    while run.step < run.plan.steps and not run.stopping.should_stop:
        event = run.optimize()
        if observe is not None:
            observe(event)
        if event.step % config.log_steps == 0:
            logger.info("step %d/%d: loss %.4f", event.step, event.steps, event.loss)
        last = run.step == run.plan.steps
        if run.step % evaluate_every == 0 or last:
            run.evaluate(evaluate, observe)
        if run.step % save_every == 0 or last:
            run.save()
    seconds = time.perf_counter() - stepped
    if run.stopping.best_step is not None and run.stopping.best_step != run.step:
        run.checkpoints.load_best(run.stopping.best_step, run.model)
    save_cross_encoder(run.model, config.output / CANDIDATE, directory, max_tokens=config.max_tokens)
    return Trained(
        steps=run.step,
        planned_steps=run.plan.steps,
        best_step=run.stopping.best_step,
        seconds=time.perf_counter() - started,
        rows_per_s=(run.step - first) * config.batch_size / seconds,
        losses=tuple(run.losses),
        scores=tuple(run.stopping.history),
    )


def settings_of(config: RerankerTrainingConfig) -> dict[str, Any]:
    """The settings that decide what the weights become, as JSON values."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude=set(_FREE))
    return found


def plan_of(config: RerankerTrainingConfig, rows: int) -> Plan:
    """How long a run over so many rows is."""
    return Plan.of(cast("Any", config), rows, 1)  # it reads batch_size, epochs, max_steps, warmup_share


class _Run:
    """The model with its optimizer, and where the run stands."""

    def __init__(self, config: RerankerTrainingConfig, rows: Sequence[RetrievalRow], directory: ModelDirectory) -> None:
        import torch

        self.config, self.rows, self.directory = config, rows, directory
        self.device = choose_device(config.device)
        self.kind = self.device.split(":")[0]
        self.numbers = choose_numbers(config.precision, self.device)
        self.plan = plan_of(config, len(rows))
        self.tokenizer = BgeTokenizer.from_directory(directory)
        self.model = load_cross_encoder(directory, seed=config.seed, device=self.device, dropout=config.dropout).train()
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, config.weight_decay), lr=config.learning_rate, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.numbers.scaled)
        self.stopping = EarlyStopping(config.evaluation.patience)
        self.checkpoints = Checkpoints(config.output / CHECKPOINTS)
        self.identity = {**settings_of(config), "rows": rows_digest(rows)}
        self.losses: list[float] = []
        self.step = 0

    def resume(
        self,
        evaluate: Callable[[PairScorer], float] | None,
        observe: Callable[[TrainingEvent], None] | None,
    ) -> None:
        """Go on from the newest checkpoint, or evaluate the model as it is."""
        checkpoint = self.checkpoints.newest(self.identity)
        if checkpoint is None:
            self.evaluate(evaluate, observe)
            return
        state = self.checkpoints.load(checkpoint, self.model, self.optimizer)
        self.step, self.losses = state.step, list(state.losses)
        self.stopping.restore(state.evaluations)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))

    def optimize(self) -> TrainingEvent:
        """One optimizer step."""
        import torch

        rate = self.config.learning_rate * self.plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradient(self._samples())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss)
        skipped = self.scaler.get_scale() < scale
        event = TrainingEvent(self.step, self.plan.steps, loss=loss, gradient_norm=float(norm), learning_rate=rate)
        return replace(event, skipped=skipped)

    def _samples(self) -> list[Sample]:
        epoch, place = divmod(self.step, self.plan.steps_per_epoch)
        order = epoch_order(len(self.rows), seed=self.config.seed, epoch=epoch)
        return [
            sample_row(
                self.rows[number],
                number=number,
                group_size=self.config.group_size,
                instruction="",
                distillation=self.config.distillation,
                seed=self.config.seed,
                epoch=epoch,
            )
            for number in batch_rows(order, place, batch_size=self.config.batch_size, processes=1)
        ]

    def _gradient(self, samples: Sequence[Sample]) -> float:
        """The loss of a batch; the parameters hold its (scaled) gradient."""
        import torch

        pairs = [(sample.query, passage) for sample in samples for passage in sample.passages]
        texts = [ids for ids, _ in self.tokenizer.encode_pairs(pairs, self.config.max_tokens)]
        pieces = micro_batches(
            texts,
            pad_id=self.tokenizer.pad_id,
            token_budget=self.config.micro_batch_tokens or _TOKENS[self.kind],
            max_rows=_ROWS[self.kind],
            device=self.device,
        )
        scored = [sample.teacher for sample in samples if sample.teacher is not None]
        teacher = torch.tensor(scored, device=self.device) if len(scored) == len(samples) else None

        def scaled(scores: Tensor) -> Tensor:  # (rows x group, 1)
            return self.scaler.scale(group_loss(scores.view(len(samples), -1), teacher))

        loss = backward(
            self._encode,
            pieces,
            scaled,
            graph_tokens=self.config.graph_tokens,
            seed=seeded(self.config.seed, self.step),
        )
        return float(loss) / self.scaler.get_scale()

    def _encode(self, piece: MicroBatch) -> Tensor:
        """Scores of a piece, (n, 1)."""
        import torch

        has_types = self.directory.model_type == "bert"
        with torch.autocast(self.kind, dtype=self.numbers.dtype, enabled=self.numbers.dtype is not None):
            found = scores_of(self.model, piece.input_ids, piece.attention_mask, self.tokenizer, has_types=has_types)
        return found.float()[:, None]

    def evaluate(
        self,
        evaluate: Callable[[PairScorer], float] | None,
        observe: Callable[[TrainingEvent], None] | None,
    ) -> None:
        """The score of the weights as they are, kept where it is the best so far."""
        if evaluate is None:
            return
        score = evaluate(PairScorer(self.model, self.directory, max_tokens=self.config.max_tokens, device=self.device))
        if self.stopping.update(self.step, score):
            self.checkpoints.save_best(self.step, self.model)
        if observe is not None:
            observe(TrainingEvent(self.step, self.plan.steps, score=score))

    def save(self) -> None:
        """A checkpoint to go on from."""
        state = State(
            step=self.step,
            run=self.identity,
            evaluations=self.stopping.state(),
            scaler=self.scaler.state_dict(),
            losses=tuple(self.losses),
        )
        self.checkpoints.save(state, self.model, self.optimizer, best_step=self.stopping.best_step)


def group_loss(scores: Tensor, teacher: Tensor | None) -> Tensor:
    """Mean over the rows of the cross-entropy of the first passage, a scalar.

    Args:
        scores: (rows, group), the positive first.
        teacher: (rows, group) scores of another reranker; the cross-entropy against their softmax is added, as
            FlagEmbedding's reranker does.
    """
    import torch

    logs = torch.log_softmax(scores, dim=-1)
    loss = -logs[:, 0].mean()
    if teacher is None:
        return loss
    return loss - (logs * torch.softmax(teacher, dim=-1)).sum(dim=-1).mean()
