"""The steps of a training, whatever is trained: schedule, clipping, evaluations, best weights, checkpoints, resume.

What is special about a kind of model is its `Learner`.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from chains.bge.pool import ahead
from finetune.checkpoints import Checkpoints, State
from finetune.distributed import Processes
from finetune.doctor import Monitor
from finetune.early_stopping import EarlyStopping
from finetune.heap import kept_heap
from finetune.precision import Numbers, device_kind
from finetune.schedule import Schedule
from finetune.training_config import TrainingConfig
from loaders.errors import RagProjError

if TYPE_CHECKING:
    from torch import nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

CANDIDATE, CHECKPOINTS = "candidate", "checkpoints"  # in the output directory of a run
_EVENTS = 10  # evaluations and checkpoints of a run whose config does not say how often


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


Observe = Callable[[TrainingEvent], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind."""

    candidate: Path
    """the model directory, or the adapter directory"""
    steps: int
    """optimizer steps done"""
    planned_steps: int
    """more than were done where it stopped early"""
    losses: tuple[float, ...]
    """of every step"""
    scores: tuple[tuple[int, float], ...]
    """(step, score) of every evaluation"""
    best_step: int | None
    """the step whose weights the candidate has; None without evaluation: the last"""
    seconds: float
    """of this process, evaluations included, without loading the model"""
    rows_per_s: float
    """of the steps of this process, without evaluations; 0 where none was left to do"""


class Batch(Protocol):
    """What a step works on."""

    @property
    def rows(self) -> int:
        """Of all processes together."""


_Batch = TypeVar("_Batch", bound=Batch)
_Served = TypeVar("_Served")


class Learner(ABC, Generic[_Batch, _Served]):
    """A model that is trained, and what a step of its kind of training does."""

    model: nn.Module
    """in train mode; its parameters that require a gradient are trained"""
    optimizer: Optimizer
    rows: Sequence[object]
    """what it learns from"""
    device: str
    numbers: Numbers
    schedule: Schedule
    identity: Mapping[str, Any]
    """what decides the weights, as JSON values: checkpoints of another are refused"""

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @abstractmethod
    def arithmetic(self) -> str:
        """What a step works on, in numbers, for the log."""

    @abstractmethod
    def batch(self, step: int) -> _Batch:
        """What a step works on, of its number alone; made in a thread beside the step before."""

    @abstractmethod
    def gradient(self, batch: _Batch, step: int, scaler: GradScaler) -> float:
        """The loss of a batch, the same in every process; to the gradients this process's part is added, scaled."""

    @abstractmethod
    def served(self) -> _Served:
        """The model as an evaluation sees it; called in evaluation mode."""


class TrainingLoop(Generic[_Batch, _Served]):
    """One training in one of its processes."""

    def __init__(
        self,
        config: TrainingConfig,
        learner: Learner[_Batch, _Served],
        processes: Processes,
        *,
        evaluate: Callable[[_Served], float] | None = None,
        observe: Observe | None = None,
        monitor: Monitor | None = None,
        dev: str | None = None,
    ) -> None:
        """A run that has not begun.

        Args:
            config: the settings.
            learner: what is trained.
            processes: those that train it together.
            evaluate: the score of the model so far, higher is better; called in the first process before the first
                step, every `evaluation.every_steps` and at the end.
            observe: told of every step and evaluation, in the first process; may raise to end the run.
            monitor: what `observe` watches the run with: its record is kept in the checkpoints.
            dev: a hash of what `evaluate` asks: scores on other questions do not go on where these have stopped.
        """
        import torch

        self.config, self.learner, self.processes = config, learner, processes
        self.evaluate, self.observe, self.monitor = evaluate, observe, monitor
        self.trained = learner.trained
        self.scaler = torch.amp.GradScaler(device_kind(learner.device), enabled=learner.numbers.scaled)
        self.identity = {**learner.identity, "dev": dev}
        self.stopping = EarlyStopping(config.evaluation.patience)
        self.checkpoints = Checkpoints(config.output / CHECKPOINTS)
        self.losses: list[float] = []
        self.step, self.rows_done, self.busy = 0, 0, 0.0

    def run(self, save: Callable[[Path], None]) -> TrainingResult:
        """All of it; a run that was broken off goes on by itself.

        Checkpoints stay in `output/checkpoints` until `Checkpoints.clear`.

        Args:
            save: writes the candidate to a directory; called once, in the first process, with the weights of the best
                evaluation in place, or the last ones without any.

        Raises:
            CheckpointError: the output holds checkpoints of a run with other settings.
        """
        started = time.perf_counter()
        self._announce()
        self._resume()
        with kept_heap():
            self._steps()
        best, candidate = self.stopping.best_step, self.config.output / CANDIDATE
        if self.processes.first:
            if best is not None and best != self.step:
                self.checkpoints.load_best(best, self.learner.model)
            save(candidate)
        self.processes.wait()
        return TrainingResult(
            candidate=candidate,
            steps=self.step,
            planned_steps=self.learner.schedule.steps,
            losses=tuple(self.losses),
            scores=tuple(self.stopping.history),
            best_step=best,
            seconds=time.perf_counter() - started,
            rows_per_s=self.rows_done / self.busy if self.busy else 0.0,
        )

    def _announce(self) -> None:
        if not self.processes.first:
            return
        learner, schedule = self.learner, self.learner.schedule
        count = sum(parameter.numel() for parameter in self.trained)
        logger.info(
            "%s; %d rows / %d = %d steps an epoch; %d steps, %d of them warm-up; %s parameters trained on %s x %d",
            *(learner.arithmetic(), len(learner.rows), self.config.batch_size, schedule.steps_per_epoch),
            *(schedule.steps, schedule.warmup, f"{count:,}", learner.device, self.processes.count),
        )

    def _resume(self) -> None:
        """Go on from the newest checkpoint, or evaluate the model as it is."""
        checkpoint = self.checkpoints.newest(self.identity)
        if checkpoint is None:
            self._evaluate()
            return
        state = self.checkpoints.load(checkpoint, self.learner.model, self.learner.optimizer)
        self.step, self.losses = state.step, list(state.losses)
        self.stopping.restore(state.evaluations)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))
        if self.monitor is not None and state.monitor:
            self.monitor.restore(state.monitor)
        logger.info("resumed after step %d of %d", self.step, self.learner.schedule.steps)

    def _steps(self) -> None:
        """All steps that are left, with evaluations and checkpoints between them."""
        steps = self.learner.schedule.steps
        often = max(1, steps // _EVENTS)
        evaluate_every = self.config.evaluation.every_steps or often
        save_every = self.config.checkpoint_steps or often
        for batch in ahead(self.learner.batch, range(self.step, steps)):
            if self.stopping.should_stop:
                logger.info("stopped early: no new best in %s evaluations", self.stopping.patience)
                break
            self._tell(self._optimize(batch))
            last = self.step == steps
            if self.step % evaluate_every == 0 or last:
                self._evaluate()
            if self.step % save_every == 0 or last:
                self._save()

    def _optimize(self, batch: _Batch) -> TrainingEvent:
        """One optimizer step."""
        import torch

        began = time.perf_counter()
        optimizer, schedule = self.learner.optimizer, self.learner.schedule
        rate = self.config.learning_rate * schedule.rate(self.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)  # of `finetune.optimizer`
        loss = self.learner.gradient(batch, self.step, self.scaler)
        self.processes.sum_gradients(self.trained)
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm or math.inf)
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss)
        took = time.perf_counter() - began
        self.rows_done, self.busy = self.rows_done + batch.rows, self.busy + took
        return TrainingEvent(
            step=self.step,
            steps=schedule.steps,
            loss=loss,
            gradient_norm=float(norm),
            learning_rate=rate,
            skipped=self.scaler.get_scale() < scale,
            rows_per_s=batch.rows / took,
        )

    def _evaluate(self) -> None:
        """The score of the weights as they are, kept where it is the best so far; every process learns it."""
        if self.evaluate is None:
            return
        model, score = self.learner.model, 0.0
        if self.processes.first:
            model.eval()
            score = self.evaluate(self.learner.served())
            model.train()
        score = self.processes.total(score, self.learner.device)
        if self.stopping.update(self.step, score) and self.processes.first:
            self.checkpoints.save_best(self.step, model)
        self._tell(TrainingEvent(self.step, self.learner.schedule.steps, score=score))

    def _save(self) -> None:
        if self.processes.first:
            state = State(
                step=self.step,
                run=self.identity,
                evaluations=self.stopping.state(),
                scaler=self.scaler.state_dict(),
                losses=tuple(self.losses),
                monitor={} if self.monitor is None else self.monitor.state(),
            )
            best = self.stopping.best_step
            self.checkpoints.save(state, self.learner.model, self.learner.optimizer, best_step=best)
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
