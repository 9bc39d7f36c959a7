"""A whole training run of a BGE retriever, judged through the embedder that serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from chains.bge.directory import digest, read_model_directory, resolve_model
from chains.bge.embeddings import BGEEmbeddings
from finetune.bge.blend import write_mixture
from finetune.bge.checks import Hardware, Parameters, examine
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.distributed import joined
from finetune.bge.encoder import choose_device
from finetune.bge.train import Plan, TrainingEvent, rows_digest, settings_of, train
from finetune.data.rows import RetrievalRow, read_retrieval_rows
from finetune.doctor import Finding
from finetune.evaluation import EvaluationConfig, RetrievalSet, evaluate_embeddings, read_set
from finetune.gate import DEV
from finetune.judging import CANDIDATE, Outcome, Task, Teller, Trained, Watch, conclude, finished, require_dev, run
from finetune.measurement import Measured, measure, set_digest

Observer = Callable[[TrainingEvent], None]


def finetune_bge(
    config: BgeTrainingConfig, *, observe: Observer | None = None, tell: Teller | None = None
) -> Outcome | None:
    """Train, judge and promote; None in all processes but the first.

    Args:
        config: the settings.
        observe: told of every step and evaluation.
        tell: told in a line what begins, and of every finding.

    Raises:
        DoctorError: something is wrong with the run; it says what to do.
        UsageError: the output holds a promoted model of another run, or there is no dev set.
        RagProjError: rows, sets or the model cannot be read.
    """
    with joined(config.device) as processes:
        task = BgeTask(config, observe=observe, tell=tell, rank=processes.local_rank, processes=processes.count)
        outcome = finished(task)
        processes.wait()  # nothing is written before every process has looked
        if not processes.first:
            if outcome is None:
                train(config, task.rows, evaluate=task.score)
            return None
        return run(task) if outcome is None else conclude(task, outcome)


class BgeTask(Task):
    """What a run is about: read once, changed by no stage."""

    kind = "bge"
    rows: Sequence[RetrievalRow]
    evaluation: EvaluationConfig

    def __init__(
        self,
        config: BgeTrainingConfig,
        *,
        observe: Observer | None = None,
        tell: Teller | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Rows and sets are read here; the model is loaded later."""
        require_dev(config.evaluation)
        self.config = config
        self.method, self.model, self.output = config.method, config.model, config.output
        self.files, self.seed = config.train, config.seed
        self.settings = config.model_dump(mode="json")
        self.evaluation, self.gate, self.doctor = config.evaluation, config.gate, config.doctor
        self.tell = tell or (lambda _: None)
        self.rows = read_retrieval_rows(config.train)
        self.base = resolve_model(config.model)
        self.directory = read_model_directory(self.base)
        self.sets, self.sampled = read_sets(config.evaluation)
        self._observe, self._processes = observe, processes
        self._device = choose_device(config.device, rank)
        limits = {
            "max_questions": self.evaluation.interval_questions,
            "max_passages": self.evaluation.interval_passages,
        }
        self._dev = self.sets[DEV].sampled(**limits, seed=self.evaluation.seed)

    def training(self) -> dict[str, Any]:
        """Settings, rows and base."""
        return {**settings_of(self.config), "rows": rows_digest(self.rows), "base": digest(self.base)}

    def measuring(self) -> dict[str, Any]:
        """The sets."""
        sets = {name: set_digest(questions) for name, questions in self.sets.items()}
        return {"sets": sets, "fused": self.evaluation.fused}

    def examine(self) -> list[Finding]:
        """Rows, texts, settings, memory."""
        return examine(
            self.config,
            self.rows,
            self.sets[DEV],
            self.directory,
            Hardware.of(self._device, self._processes),
            steps=self._plan.steps,
            parameters=Parameters.of(self.config, self.directory),
        )

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """Through `BGEEmbeddings` as it will serve, on the reference engine, so that nothing is exported."""
        if tuned is None:
            embeddings = BGEEmbeddings(self.model, engine="torch", device=self._device)
        elif self.method == "lora":
            embeddings = BGEEmbeddings(self.model, adapter=tuned, engine="torch", device=self._device)
        else:
            embeddings = BGEEmbeddings(tuned, engine="torch", device=self._device)
        return measure(embeddings, self.sets, fused=fused)

    def score(self, embeddings: Embeddings) -> float:
        """What checkpoints go by: the metric on a smaller dev set."""
        return evaluate_embeddings(embeddings, self._dev).mean(self.evaluation.metric)

    def train(self, watch: Watch) -> Trained:
        """By `finetune.bge.train`."""

        def observe(event: TrainingEvent) -> None:
            if self._observe is not None:
                self._observe(event)
            if event.loss is not None:
                watch(step=event.step, loss=event.loss, gradient_norm=event.gradient_norm, overflowed=event.skipped)

        result = train(self.config, self.rows, evaluate=self.score, observe=observe)
        return Trained(
            steps=result.steps,
            planned_steps=self._plan.steps,
            best_step=result.best_step,
            seconds=result.seconds,
            rows_per_s=result.rows_per_s,
            losses=result.losses,
            scores=result.scores,
        )

    def mix(self, share: float, target: Path) -> None:
        """The weights, or the adapter scaled."""
        write_mixture(self.directory, self.output / CANDIDATE, share, target)

    @property
    def _plan(self) -> Plan:
        return Plan.of(self.config, len(self.rows), self._processes)


def read_sets(evaluation: EvaluationConfig) -> tuple[dict[str, RetrievalSet], dict[str, bool]]:
    """(sets by name as they are measured, dev first; which of them are samples)."""
    assert evaluation.dev is not None
    sections = {DEV: evaluation.dev, **dict(sorted(evaluation.extra.items()))}
    whole: Mapping[str, RetrievalSet] = {name: read_set(name, section) for name, section in sections.items()}
    limits = {"max_questions": evaluation.max_questions, "max_passages": evaluation.max_passages}
    sets = {name: found.sampled(**limits, seed=evaluation.seed) for name, found in whole.items()}
    return sets, {name: sets[name] is not whole[name] for name in sets}
