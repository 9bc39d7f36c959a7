"""Train ChatGLM3 to answer from references.

    ragproj finetune chatglm3 --config finetune/configs/chatglm3_qlora.yaml
    torchrun --nproc-per-node 8 -m ui.cli finetune chatglm3 --config finetune/configs/chatglm3_qlora.yaml

A step is the mean loss over the learned tokens of `batch_size` rows. How these rows are cut into forward passes, packed
or padded, on one process or on many, changes its speed and not its value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.chatglm3.settings import PAD_ID
from finetune.chatglm3.batches import MicroBatch, answer_loss, packed, padded, plan, share
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example
from finetune.chatglm3.model import device_and_dtype, numbers_of, save_candidate, training_model, training_optimizer
from finetune.distributed import Processes, joined
from finetune.doctor import Monitor
from finetune.optimizer import decay_groups
from finetune.order import epoch_order, seeded
from finetune.schedule import Schedule
from finetune.training_loop import Learner, Observe, TrainingError, TrainingLoop, TrainingResult

if TYPE_CHECKING:
    from torch.amp import GradScaler


@dataclass(frozen=True)
class StepBatch:
    """One step's work for this process."""

    rows: int
    """of all processes"""
    learned: int
    """tokens, likewise"""
    pieces: list[list[Example]]
    """this process's forward passes"""


def train(
    config: ChatGlm3TrainingConfig,
    examples: Sequence[Example],
    directory: Path,
    *,
    evaluate: Callable[[Any], float] | None = None,
    observe: Observe | None = None,
    monitor: Monitor | None = None,
    dev: str | None = None,
) -> TrainingResult:
    """Train and write the candidate to `config.output / "candidate"`; a run that was broken off goes on by itself.

    The candidate has the weights of the best evaluation, or the last ones without `evaluate`.

    Args:
        config: the settings.
        examples: what to train on, none longer than `config.max_tokens`.
        directory: the native directory of `config.model`.
        evaluate, observe, monitor, dev: as `TrainingLoop` has them; an evaluation sees the model in evaluation mode.

    Raises:
        TrainingError: there is nothing to train on.
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    if not examples:
        raise TrainingError("没有训练数据", "there is nothing to train on")
    with joined(config.device) as processes:
        learner = _Generator(config, examples, directory, processes)
        loop = TrainingLoop(config, learner, processes, evaluate=evaluate, observe=observe, monitor=monitor, dev=dev)
        return loop.run(lambda target: save_candidate(learner.model, target, directory, config))


def schedule_of(config: ChatGlm3TrainingConfig, examples: int) -> Schedule:
    """How long a run over so many examples is; the last step of an epoch may have fewer."""
    return Schedule.of(config, -(-examples // config.batch_size))


class _Generator(Learner[StepBatch, Any]):
    """A causal model that learns the answers of its examples."""

    rows: Sequence[Example]

    def __init__(
        self,
        config: ChatGlm3TrainingConfig,
        examples: Sequence[Example],
        directory: Path,
        processes: Processes,
    ) -> None:
        self.config, self.rows, self.processes = config, examples, processes
        self.device, dtype = device_and_dtype(config, processes.local_rank)
        self.numbers = numbers_of(dtype)
        self.schedule = schedule_of(config, len(examples))
        self.model = training_model(config, directory, self.device, dtype)
        self.optimizer = training_optimizer(
            config.optimizer,
            decay_groups(self.model, config.weight_decay),
            learning_rate=config.learning_rate,
            device=self.device,
        )
        self.identity = {**config.deciding(), "rows": examples_digest(examples), "processes": processes.count}

    def arithmetic(self) -> str:
        """What a step works on."""
        batch, capacity = self.config.batch_size, self.config.forward_tokens
        tokens = sum(len(example.ids) for example in self.rows) / len(self.rows)
        learned = sum(example.learned for example in self.rows) / len(self.rows)
        passes = max(1.0, batch * tokens / capacity)
        return (
            f"batch {batch} rows x {tokens:.0f} tokens ({learned:.0f} learned) = about {passes:.1f} forward passes of"
            f" {capacity} tokens a step"
        )

    def served(self) -> Any:
        """The model itself."""
        return self.model

    def batch(self, step: int) -> StepBatch:
        """The step's examples, cut into forward passes that are dealt out to the processes."""
        config = self.config
        epoch, place = divmod(step, self.schedule.steps_per_epoch)
        order = epoch_order(len(self.rows), seed=config.seed, epoch=epoch)
        size = config.batch_size
        examples = [self.rows[number] for number in order[place * size : (place + 1) * size]]
        lengths = [len(example.ids) for example in examples]
        passes = plan(lengths, batching=config.batching, capacity=config.forward_tokens)
        sizes = [sum(lengths[index] for index in one) for one in passes]
        own = share(passes, sizes, rank=self.processes.rank, count=self.processes.count)
        return StepBatch(
            rows=len(examples),
            learned=sum(example.learned for example in examples),
            pieces=[[examples[index] for index in one] for one in own],
        )

    def gradient(self, batch: StepBatch, step: int, scaler: GradScaler) -> float:
        """The mean loss over the learned tokens of a step."""
        import torch

        total = torch.zeros((), device=self.device)
        if self.processes.count > 1:  # a process without a part of this step adds nothing to the sums
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
        for number, piece in enumerate(batch.pieces):
            torch.manual_seed(seeded(self.config.seed, step, self.processes.rank, number))  # of dropout
            with self.numbers.autocast(self.device):
                loss = answer_loss(self.model, self._tensors(piece)) / batch.learned
            scaler.scale(loss).backward()
            total += loss.detach()
        return self.processes.total(float(total), self.device)

    def _tensors(self, piece: Sequence[Example]) -> MicroBatch:
        if self.config.batching == "packed":
            return packed(piece, self.device)
        return padded(piece, self.device, pad_id=PAD_ID)


def examples_digest(examples: Sequence[Example]) -> str:
    """A hash of the examples in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.ids, example.labels)).encode())
    return digest.hexdigest()
