"""Train a cross-encoder on rows of query, positives and negatives, in one process.

    ragproj finetune reranker --config finetune/configs/reranker.yaml

The loss is FlagEmbedding's: cross-entropy over the scores of a row's group, the positive first; with distillation the
cross-entropy against the teacher's distribution is added. Sampling and micro-batches are those of `finetune.bge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chains.bge.directory import ModelDirectory
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.batches import batch_rows, sample_row, steps_per_epoch
from finetune.bge.config import FORWARD_ROWS
from finetune.bge.gradient_cache import MicroBatch, backward, micro_batches
from finetune.bge.train import rows_digest
from finetune.data.rows import RetrievalRow
from finetune.distributed import Processes
from finetune.doctor import Monitor
from finetune.optimizer import adamw
from finetune.order import epoch_order, seeded
from finetune.precision import choose_device, choose_numbers, device_kind
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import PairScorer, load_cross_encoder, save_cross_encoder, scores_of
from finetune.schedule import Schedule
from finetune.training_loop import Learner, Observe, TrainingLoop, TrainingResult

if TYPE_CHECKING:
    from torch import Tensor
    from torch.amp import GradScaler


@dataclass(frozen=True)
class StepBatch:
    """One step's work."""

    rows: int
    texts: list[list[int]]
    """token ids of (query, passage), group by group, the positive first"""
    teacher: list[tuple[float, ...]] | None
    """scores by row"""


def train(
    config: RerankerTrainingConfig,
    rows: Sequence[RetrievalRow],
    directory: ModelDirectory,
    *,
    evaluate: Callable[[PairScorer], float] | None = None,
    observe: Observe | None = None,
    monitor: Monitor | None = None,
    dev: str | None = None,
) -> TrainingResult:
    """Train and write the candidate to `config.output / "candidate"`; a run that was broken off goes on by itself.

    The candidate has the weights of the best evaluation, or the last ones without `evaluate`.

    Args:
        config: the settings.
        rows: what to train on; each has negatives.
        directory: of the model it starts from.
        evaluate, observe, monitor, dev: as `TrainingLoop` has them.

    Raises:
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    learner = _Reranker(config, rows, directory)
    loop = TrainingLoop(config, learner, Processes(), evaluate=evaluate, observe=observe, monitor=monitor, dev=dev)
    return loop.run(lambda target: save_cross_encoder(learner.model, target, directory, max_tokens=config.max_tokens))


def schedule_of(config: RerankerTrainingConfig, rows: int) -> Schedule:
    """How long a run over so many rows is."""
    return Schedule.of(config, steps_per_epoch(rows, batch_size=config.batch_size, processes=1))


class _Reranker(Learner[StepBatch, PairScorer]):
    """A cross-encoder that learns to score a row's positive above its negatives."""

    rows: Sequence[RetrievalRow]

    def __init__(self, config: RerankerTrainingConfig, rows: Sequence[RetrievalRow], directory: ModelDirectory) -> None:
        self.config, self.rows, self.directory = config, rows, directory
        self.device = choose_device(config.device)
        self.numbers = choose_numbers(config.precision, self.device)
        self.schedule = schedule_of(config, len(rows))
        self.tokenizer = BgeTokenizer.from_directory(directory)
        self.model = load_cross_encoder(directory, seed=config.seed, device=self.device, dropout=config.dropout).train()
        self.optimizer = adamw(self.model, config)
        self.identity = {**config.deciding(), "rows": rows_digest(rows)}

    def arithmetic(self) -> str:
        """What a step works on."""
        batch, group = self.config.batch_size, self.config.group_size
        return f"batch {batch} rows x {group} passages = {batch * group} pairs a step"

    def served(self) -> PairScorer:
        """What scores pairs with the very weights that are trained."""
        return PairScorer(self.model, self.directory, max_tokens=self.config.max_tokens, device=self.device)

    def batch(self, step: int) -> StepBatch:
        """The pairs of the step's rows."""
        config = self.config
        epoch, place = divmod(step, self.schedule.steps_per_epoch)
        order = epoch_order(len(self.rows), seed=config.seed, epoch=epoch)
        samples = [
            sample_row(
                self.rows[number],
                number=number,
                group_size=config.group_size,
                instruction="",
                distillation=config.distillation,
                seed=config.seed,
                epoch=epoch,
            )
            for number in batch_rows(order, place, batch_size=config.batch_size, processes=1)
        ]
        pairs = [(sample.query, passage) for sample in samples for passage in sample.passages]
        teacher = [sample.teacher for sample in samples if sample.teacher is not None]
        return StepBatch(
            rows=len(samples),
            texts=[ids for ids, _ in self.tokenizer.encode_pairs(pairs, config.max_tokens)],
            teacher=teacher if len(teacher) == len(samples) else None,
        )

    def gradient(self, batch: StepBatch, step: int, scaler: GradScaler) -> float:
        """The loss of a batch."""
        import torch

        teacher = None if batch.teacher is None else torch.tensor(batch.teacher, device=self.device)

        def scaled_loss(scores: Tensor) -> Tensor:  # (rows x group, 1)
            return scaler.scale(group_loss(scores.view(batch.rows, -1), teacher))

        pieces = micro_batches(
            batch.texts,
            pad_id=self.tokenizer.pad_id,
            token_budget=self.config.tokens_at_once(self.device),
            max_rows=FORWARD_ROWS[device_kind(self.device)],
            device=self.device,
        )
        seed = seeded(self.config.seed, step)
        loss = backward(self._encode, pieces, scaled_loss, graph_tokens=self.config.graph_tokens, seed=seed)
        return float(loss) / scaler.get_scale()

    def _encode(self, piece: MicroBatch) -> Tensor:
        """Scores of a piece, (n, 1)."""
        has_types = self.directory.model_type == "bert"
        with self.numbers.autocast(self.device):
            found = scores_of(self.model, piece.input_ids, piece.attention_mask, self.tokenizer, has_types=has_types)
        return found.float()[:, None]


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
