"""A whole training run of a reranker, judged on lists of candidates."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from chains.bge.directory import digest, read_model_directory, resolve_model
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.blend import mix
from finetune.bge.checks import (
    Hardware,
    check_duplicates,
    check_leak,
    check_negatives,
    check_vocabulary,
    sampled,
)
from finetune.bge.encoder import choose_device
from finetune.bge.train import TrainingEvent, rows_digest
from finetune.data.rows import RetrievalRow, read_retrieval_rows
from finetune.doctor import Finding, check_learning_rate, check_precision, check_steps, check_truncated, in_order
from finetune.evaluation import EvaluationConfig
from finetune.gate import DEV
from finetune.judging import CANDIDATE, Outcome, Task, Teller, Trained, Watch, conclude, finished, require_dev, run
from finetune.measurement import Measured, set_digest
from finetune.reranker.candidates import CandidateSet, evaluate_reranker, read_candidates
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import PairScorer, load_cross_encoder, save_cross_encoder
from finetune.reranker.train import plan_of, settings_of, train_reranker
from loaders.errors import UsageError

Observer = Callable[[TrainingEvent], None]


def finetune_reranker(
    config: RerankerTrainingConfig, *, observe: Observer | None = None, tell: Teller | None = None
) -> Outcome:
    """Train, judge and promote.

    Args:
        config: the settings.
        observe: told of every step and evaluation.
        tell: told in a line what begins, and of every finding.

    Raises:
        DoctorError: something is wrong with the run; it says what to do.
        UsageError: the output holds a promoted model of another run, there is no dev set, or torchrun started several
            processes.
        RagProjError: rows, sets or the model cannot be read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "重排模型的训练只支持单个进程，请不要用 torchrun 启动",
            "a reranker is trained in a single process; start it without torchrun",
        )
    task = RerankerTask(config, observe=observe, tell=tell)
    outcome = finished(task)
    return run(task) if outcome is None else conclude(task, outcome)


class RerankerTask(Task):
    """What a run is about: read once, changed by no stage."""

    kind = "reranker"
    rows: Sequence[RetrievalRow]
    evaluation: EvaluationConfig
    method = "full"

    def __init__(
        self, config: RerankerTrainingConfig, *, observe: Observer | None = None, tell: Teller | None = None
    ) -> None:
        """Rows and sets are read here, candidates are searched; the model is loaded later."""
        require_dev(config.evaluation)
        self.config = config
        self.model, self.output = config.model, config.output
        self.files, self.seed = config.train, config.seed
        self.settings = config.model_dump(mode="json")
        self.evaluation, self.gate, self.doctor = config.evaluation, config.gate, config.doctor
        self.tell = tell or (lambda _: None)
        self.rows = read_retrieval_rows(config.train)
        self.base = resolve_model(config.model)
        self.directory = read_model_directory(self.base)
        self._observe = observe
        self._device = choose_device(config.device)
        assert config.evaluation.dev is not None
        sections = {DEV: config.evaluation.dev, **dict(sorted(config.evaluation.extra.items()))}
        limits = {
            "max_questions": self.evaluation.max_questions,
            "max_passages": self.evaluation.max_passages,
            "seed": self.evaluation.seed,
        }
        read = {name: read_candidates(name, section, config.candidates, **limits) for name, section in sections.items()}
        self.sets: dict[str, CandidateSet] = {name: found for name, (found, _) in read.items()}
        self.sampled = {name: drawn for name, (_, drawn) in read.items()}
        limits = {**limits, "max_questions": self.evaluation.interval_questions}
        self._dev = self.sets[DEV].sampled(**limits)

    def training(self) -> dict[str, Any]:
        """Settings, rows and base."""
        return {**settings_of(self.config), "rows": rows_digest(self.rows), "base": digest(self.base)}

    def measuring(self) -> dict[str, Any]:
        """The sets and how many candidates are put in order."""
        sets = {name: set_digest(found.questions) for name, found in self.sets.items()}
        return {"sets": sets, "candidates": self.config.candidates}

    def examine(self) -> list[Finding]:
        """Rows, texts and settings."""
        config = self.config
        hardware = Hardware.of(self._device, 1)
        tokenizer = BgeTokenizer.from_directory(self.directory)
        sample = sampled(self.rows, config.seed)
        pairs = [(row.query, text) for row in sample for text in (*row.pos, *row.neg)]
        lengths = [len(ids) for ids, _ in tokenizer.encode_pairs(pairs, 1_000_000)]
        return in_order(
            [
                *check_steps(plan_of(config, len(self.rows)).steps, rows=len(self.rows), batch_size=config.batch_size),
                *check_negatives(self.rows, cast("Any", config)),  # it reads group_size and batch_size
                *check_duplicates(self.rows),
                *check_leak(self.rows, self.sets[DEV].questions),
                *check_truncated(lengths, config.max_tokens, key="max_tokens", zh="查询与片段", en="pairs"),
                *check_vocabulary(tokenizer, [row.query for row in sample] + [row.pos[0] for row in sample]),
                *check_learning_rate(config.learning_rate, "full"),
                *check_precision(config.precision, device=hardware.kind, has_bf16=hardware.has_bf16),
            ]
        )

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """The candidates of every set put in order; `fused` does not apply."""
        directory = self.directory if tuned is None else read_model_directory(tuned)
        model = load_cross_encoder(directory, seed=self.config.seed, device=self._device)
        scorer = PairScorer(model, directory, max_tokens=self.config.max_tokens, device=self._device)
        return Measured({name: evaluate_reranker(scorer.score, found) for name, found in self.sets.items()})

    def train(self, watch: Watch) -> Trained:
        """By `finetune.reranker.train`."""

        def observe(event: TrainingEvent) -> None:
            if self._observe is not None:
                self._observe(event)
            if event.loss is not None:
                watch(step=event.step, loss=event.loss, gradient_norm=event.gradient_norm, overflowed=event.skipped)

        def score(scorer: PairScorer) -> float:
            return evaluate_reranker(scorer.score, self._dev).mean(self.evaluation.metric)

        return train_reranker(self.config, self.rows, self.directory, evaluate=score, observe=observe)

    def mix(self, share: float, target: Path) -> None:
        """The weights of both, with the head that the base was given where it has none."""
        candidate = read_model_directory(self.output / CANDIDATE)
        tuned = load_cross_encoder(candidate, seed=self.config.seed, device="cpu")
        mix(tuned, load_cross_encoder(self.directory, seed=self.config.seed, device="cpu"), share)
        shutil.rmtree(target, ignore_errors=True)
        save_cross_encoder(tuned, target, self.directory, max_tokens=self.config.max_tokens)
