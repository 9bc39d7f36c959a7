"""Train a cross-encoder on rows of query, positives and negatives.

    ragproj finetune reranker --config finetune/configs/reranker.yaml
    torchrun --nproc-per-node 8 -m ui.cli finetune reranker --config finetune/configs/reranker.yaml

The loss is FlagEmbedding's: cross-entropy over the scores of a row's group, the positive first; with distillation the
cross-entropy against the teacher's distribution is added. Sampling and micro-batches are those of `finetune.bge`. A
group is compared with nothing outside it: several processes share the rows of a batch and exchange gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chains.bge.directory import ModelDirectory
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.batches import batch_rows, sample_row
from finetune.bge.config import FORWARD_ROWS
from finetune.bge.dropout import use_cheap_dropout
from finetune.bge.gradient_cache import MicroBatch, backward, micro_batches
from finetune.bge.train import check_rows, rows_digest, schedule_of
from finetune.bge.workers import Workers
from finetune.data.rows import RetrievalRow
from finetune.distributed import Processes, joined
from finetune.doctor import Monitor
from finetune.optimizer import adamw
from finetune.order import epoch_order, seeded
from finetune.precision import choose_device, choose_numbers, device_kind
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import PairScorer, load_cross_encoder, save_cross_encoder, scores_of
from finetune.training_loop import Learner, Observe, TrainingLoop, TrainingResult

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.amp import GradScaler


@dataclass(frozen=True)
class StepBatch:
    """One step's work for this process."""

    rows: int
    """of all processes"""
    texts: list[list[int]]
    """token ids of this process's (query, passage), group by group, the positive first"""
    teacher: list[tuple[float, ...]] | None
    """scores by row, of the same extent"""


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
        TrainingError: rows lack what the settings ask of them, or a batch cannot be shared evenly by the processes.
        CheckpointError: the output holds checkpoints of a run with other settings.
    """
    check_rows(config, rows)
    with joined(config.device) as processes:
        learner = _Reranker(config, rows, directory, processes)
        loop = TrainingLoop(config, learner, processes, evaluate=evaluate, observe=observe, monitor=monitor, dev=dev)
        tokens = config.max_tokens
        return loop.run(lambda target: save_cross_encoder(learner.model, target, directory, max_tokens=tokens))


class _Reranker(Learner[StepBatch, PairScorer]):
    """A cross-encoder that learns to score a row's positive above its negatives."""

    rows: Sequence[RetrievalRow]

    def __init__(
        self,
        config: RerankerTrainingConfig,
        rows: Sequence[RetrievalRow],
        directory: ModelDirectory,
        processes: Processes,
    ) -> None:
        self.config, self.rows, self.directory, self.processes = config, rows, directory, processes
        self.device = choose_device(config.device, processes.local_rank)
        self.numbers = choose_numbers(config.precision, self.device)
        self.schedule = schedule_of(config, len(rows), processes.count)
        self.tokenizer = BgeTokenizer.from_directory(directory)
        self.model = load_cross_encoder(directory, seed=config.seed, device=self.device, dropout=config.dropout).train()
        if self.device == "cpu":
            use_cheap_dropout(self.model)
        self.workers = Workers(self.model, Workers.fitting(self.device))
        self.graph_tokens = config.graph_tokens_of(self.model, self.device)
        self.optimizer = adamw(self.model, config)
        self.identity = {**config.deciding(), "rows": rows_digest(rows), "processes": processes.count}

    def arithmetic(self) -> str:
        """What a step works on."""
        batch, group = self.config.batch_size, self.config.group_size
        return f"batch {batch} rows x {group} passages = {batch * group} pairs a step"

    def served(self) -> PairScorer:
        """What scores pairs with the very weights that are trained."""
        return PairScorer(self.model, self.directory, max_tokens=self.config.max_tokens, device=self.device)

    def batch(self, step: int) -> StepBatch:
        """What a step works on: the whole batch is drawn in every process, its own share is tokenized."""
        config, count = self.config, self.processes.count
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
            for number in batch_rows(order, place, batch_size=config.batch_size, processes=count)
        ]
        own = self.processes.share(samples)
        pairs = [(sample.query, passage) for sample in own for passage in sample.passages]
        teacher = [sample.teacher for sample in samples if sample.teacher is not None]
        return StepBatch(
            rows=len(samples),
            texts=[ids for ids, _ in self.tokenizer.encode_pairs(pairs, config.max_tokens)],
            teacher=self.processes.share(teacher) if len(teacher) == len(samples) else None,
        )

    def gradient(self, batch: StepBatch, step: int, scaler: GradScaler) -> float:
        """The loss of a batch, of which each process adds its own rows' part."""
        import torch

        teacher = None if batch.teacher is None else torch.tensor(batch.teacher, device=self.device)

        def scaled_loss(scores: Tensor) -> Tensor:  # (own rows x group, 1)
            own = group_loss(scores.view(-1, self.config.group_size), teacher)
            return scaler.scale(own / self.processes.count)  # all have as many rows: the sum is the mean over all

        pieces = micro_batches(
            batch.texts,
            pad_id=self.tokenizer.pad_id,
            token_budget=self.config.tokens_at_once(self.device),
            max_rows=FORWARD_ROWS[device_kind(self.device)],
            device=self.device,
        )
        seed = seeded(self.config.seed, step, self.processes.rank)
        loss = backward(self._encode, pieces, scaled_loss, self.workers, graph_tokens=self.graph_tokens, seed=seed)
        return self.processes.total(float(loss) / scaler.get_scale(), self.device)

    def _encode(self, model: nn.Module, piece: MicroBatch) -> Tensor:
        """Scores of a piece by a worker's model, (n, 1)."""
        has_types = self.directory.model_type == "bert"
        with self.numbers.autocast(self.device):
            found = scores_of(model, piece.input_ids, piece.attention_mask, self.tokenizer, has_types=has_types)
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
