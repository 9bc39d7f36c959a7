"""Train ChatGLM3 to answer from references.

    ragproj finetune chatglm3 --config finetune/configs/chatglm3_qlora.yaml
    torchrun --nproc-per-node 8 -m ui.cli finetune chatglm3 --config finetune/configs/chatglm3_qlora.yaml

A step is the mean loss over the learned tokens of `batch_size` rows. How these rows are cut into forward passes, packed
or padded, on one process or on many, changes its speed and not its value.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chains.chatglm3.settings import PAD_ID
from finetune.bge.batches import epoch_order, seeded
from finetune.bge.checkpoints import Checkpoints, State
from finetune.bge.distributed import Processes, joined
from finetune.bge.train import Plan, TrainingError, TrainingEvent, decay_groups
from finetune.chatglm3.batches import MicroBatch, answer_loss, packed, padded, plan, share
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example
from finetune.chatglm3.model import device_and_dtype, save_candidate, training_model, training_optimizer
from finetune.early_stopping import EarlyStopping

logger = logging.getLogger(__name__)

_EVENTS = 10  # evaluations and checkpoints of a run whose config does not say how often
# Settings that do not change what the weights become.
_FREE = frozenset(
    {"output", "evaluation", "gate", "doctor", "checkpoint_steps", "log_steps", "device", "gradient_checkpointing"}
)

Evaluate = Callable[[Any], float]
Observe = Callable[[TrainingEvent], None]


@dataclass(frozen=True)
class GenerationTrainingResult:
    """What a run left behind."""

    candidate: Path
    """the adapter directory, or the model directory"""
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
    tokens_per_s: float
    """likewise, padding not counted"""


def plan_of(config: ChatGlm3TrainingConfig, examples: int) -> Plan:
    """The steps of a run over so many examples; the last of an epoch may be smaller."""
    per_epoch = -(-examples // config.batch_size)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    return Plan(per_epoch, steps, math.ceil(steps * config.warmup_share))


def train(
    config: ChatGlm3TrainingConfig,
    examples: Sequence[Example],
    directory: Path,
    *,
    evaluate: Evaluate | None = None,
    observe: Observe | None = None,
) -> GenerationTrainingResult:
    """Train and write the candidate to `config.output / "candidate"`; a run that was broken off goes on by itself.

    The candidate has the weights of the best evaluation, or the last ones without `evaluate`. Checkpoints stay in
    `config.output / "checkpoints"` until `Checkpoints.clear`.

    Args:
        config: the settings.
        examples: what to train on, none longer than `config.max_tokens`.
        directory: the native directory of `config.model`.
        evaluate: the score of the model so far, higher is better; called in the first process with the model in
            evaluation mode, before the first step, every `evaluation.every_steps` and at the end.
        observe: told of every step and evaluation, in the first process; may raise to end the run.

    Raises:
        TrainingError: there is nothing to train on.
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    if not examples:
        raise TrainingError("没有训练数据", "there is nothing to train on")
    started = time.perf_counter()
    with joined(config.device) as processes:
        run = _Run(config, examples, directory, processes, evaluate, observe)
        run.resume()
        run.loop()
        return run.finish(started)


class _Run:
    """One training run in one process: what the loop needs, held together."""

    def __init__(
        self,
        config: ChatGlm3TrainingConfig,
        examples: Sequence[Example],
        directory: Path,
        processes: Processes,
        evaluate: Evaluate | None,
        observe: Observe | None,
    ) -> None:
        import torch

        self.config, self.examples, self.directory, self.processes = config, examples, directory, processes
        self.evaluate, self.observe = evaluate, observe
        self.device, self.dtype = device_and_dtype(config, processes.local_rank)
        self.plan = plan_of(config, len(examples))
        self.model = training_model(config, directory, self.device, self.dtype)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = training_optimizer(
            config.optimizer,
            decay_groups(self.model, config.weight_decay),
            learning_rate=config.learning_rate,
            device=self.device,
        )
        self.scaler = torch.amp.GradScaler(self.device.split(":")[0], enabled=self.dtype == torch.float16)
        self.stopping = EarlyStopping(config.evaluation.patience)
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.identity = {**settings_of(config), "rows": examples_digest(examples), "processes": processes.count}
        self.losses: list[float] = []
        self.step, self.rows_done, self.tokens_done, self.busy = 0, 0, 0, 0.0
        self._announce()

    def _announce(self) -> None:
        if not self.processes.first:
            return
        config, steps = self.config, self.plan
        tokens = sum(len(example.ids) for example in self.examples) / len(self.examples)
        learned = sum(example.learned for example in self.examples) / len(self.examples)
        passes = max(1.0, config.batch_size * tokens / config.forward_tokens)
        count = sum(parameter.numel() for parameter in self.trained)
        logger.info(
            "batch %d rows x %.0f tokens (%.0f learned) = about %.1f forward passes of %d tokens a step, on %d"
            " process(es); %d rows / %d = %d steps an epoch; %d steps, %d of them warm-up; %s parameters trained on %s",
            *(config.batch_size, tokens, learned, passes, config.forward_tokens, self.processes.count),
            *(len(self.examples), config.batch_size, steps.steps_per_epoch, steps.steps, steps.warmup),
            *(f"{count:,}", self.device),
        )

    def resume(self) -> None:
        """Go on from the newest checkpoint, or evaluate the model as it is."""
        checkpoint = self.checkpoints.newest(self.identity)
        if checkpoint is None:
            self._evaluate()
            return
        state = self.checkpoints.load(checkpoint, self.model, self.optimizer)
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
        while self.step < self.plan.steps:
            if self.stopping.should_stop:
                logger.info("stopped early: no new best in %s evaluations", self.stopping.patience)
                break
            self._tell(self._optimize())
            last = self.step == self.plan.steps
            if self.step % evaluate_every == 0 or last:
                self._evaluate()
            if self.step % save_every == 0 or last:
                self._save()

    def finish(self, started: float) -> GenerationTrainingResult:
        """The candidate written, of the best weights where there were evaluations."""
        best = self.stopping.best_step
        candidate = self.config.output / "candidate"
        if self.processes.first:
            if best is not None and best != self.step:
                self.checkpoints.load_best(best, self.model)
            save_candidate(self.model, candidate, self.directory, self.config)
        self.processes.wait()
        return GenerationTrainingResult(
            candidate=candidate,
            steps=self.step,
            losses=tuple(self.losses),
            scores=tuple(self.stopping.history),
            best_step=best,
            seconds=time.perf_counter() - started,
            rows_per_s=self.rows_done / self.busy if self.busy else 0.0,
            tokens_per_s=self.tokens_done / self.busy if self.busy else 0.0,
        )

    def _batch(self) -> list[Example]:
        """The examples of the next step, of all processes."""
        epoch, place = divmod(self.step, self.plan.steps_per_epoch)
        order = epoch_order(len(self.examples), seed=self.config.seed, epoch=epoch)
        size = self.config.batch_size
        return [self.examples[number] for number in order[place * size : (place + 1) * size]]

    def _pieces(self, batch: Sequence[Example]) -> list[list[Example]]:
        """This process's forward passes of a step."""
        lengths = [len(example.ids) for example in batch]
        passes = plan(lengths, batching=self.config.batching, capacity=self.config.forward_tokens)
        sizes = [sum(lengths[index] for index in one) for one in passes]
        own = share(passes, sizes, rank=self.processes.rank, count=self.processes.count)
        return [[batch[index] for index in one] for one in own]

    def _tensors(self, piece: Sequence[Example]) -> MicroBatch:
        if self.config.batching == "packed":
            return packed(piece, self.device)
        return padded(piece, self.device, pad_id=PAD_ID)

    def _optimize(self) -> TrainingEvent:
        """One optimizer step."""
        import torch

        began = time.perf_counter()
        rate = self.config.learning_rate * self.plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch()
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
        self.rows_done, self.busy = self.rows_done + len(batch), self.busy + took
        self.tokens_done += sum(len(example.ids) for example in batch)
        return TrainingEvent(
            step=self.step,
            steps=self.plan.steps,
            loss=loss,
            gradient_norm=float(norm),
            learning_rate=rate,
            skipped=self.scaler.get_scale() < scale,
            rows_per_s=len(batch) / took,
        )

    def _gradient(self, batch: Sequence[Example]) -> float:
        """The mean loss over the learned tokens of a step; the parameters hold its (scaled) gradient everywhere."""
        import torch

        learned = sum(example.learned for example in batch)
        total = torch.zeros((), device=self.device)
        if self.processes.count > 1:  # a process without a part of this step adds nothing to the sums
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
        for number, piece in enumerate(self._pieces(batch)):
            torch.manual_seed(seeded(self.config.seed, self.step, self.processes.rank, number))  # of dropout
            with torch.autocast(self.device.split(":")[0], dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss = answer_loss(self.model, self._tensors(piece)) / learned
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.processes.sum_gradients(self.trained)
        return self.processes.total(float(total), self.device)

    def _evaluate(self) -> None:
        """The score of the weights as they are, kept where it is the best so far; every process learns it."""
        if self.evaluate is None:
            return
        score = 0.0
        if self.processes.first:
            self.model.eval()
            score = self.evaluate(self.model)
            self.model.train()
        score = self.processes.total(score, self.device)
        if self.stopping.update(self.step, score) and self.processes.first:
            self.checkpoints.save_best(self.step, self.model)
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
            self.checkpoints.save(state, self.model, self.optimizer, best_step=self.stopping.best_step)
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


def settings_of(config: ChatGlm3TrainingConfig) -> dict[str, Any]:
    """The settings that decide what the weights become, as JSON values."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude=set(_FREE))
    return found


def examples_digest(examples: Sequence[Example]) -> str:
    """A hash of the examples in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.ids, example.labels)).encode())
    return digest.hexdigest()
