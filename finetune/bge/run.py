"""A whole training run of a BGE retriever, judged through the embedder that serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from chains.bge.directory import digest, read_model_directory, resolve_model
from chains.bge.embeddings import BGEEmbeddings
from finetune.bge.blend import write_mixture
from finetune.bge.checks import Hardware, Parameters, examine
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.train import rows_digest, schedule_of, train
from finetune.data.rows import RetrievalRow, read_retrieval_rows
from finetune.distributed import Processes, joined
from finetune.doctor import Finding, Monitor
from finetune.evaluation import EvaluationConfig, RetrievalSet, evaluate_embeddings, read_set
from finetune.gate import DEV
from finetune.measurement import Measured, measure, set_digest
from finetune.precision import choose_device
from finetune.run import Outcome, Task, Teller, run_together, set_sections
from finetune.training_loop import CANDIDATE, Observe, TrainingResult


def finetune_bge(
    config: BgeTrainingConfig, *, observe: Observe | None = None, tell: Teller | None = None
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
        return run_together(BgeTask(config, processes, observe=observe, tell=tell), processes)


class BgeTask(Task):
    """What a run is about: read once, changed by no stage."""

    kind = "bge"
    config: BgeTrainingConfig
    rows: Sequence[RetrievalRow]

    def __init__(
        self,
        config: BgeTrainingConfig,
        processes: Processes | None = None,
        *,
        observe: Observe | None = None,
        tell: Teller | None = None,
    ) -> None:
        """Rows and sets are read here; the model is loaded later."""
        super().__init__(observe=observe, tell=tell)
        processes = processes or Processes()
        self.config, self.method, self.fused = config, config.method, config.evaluation.fused
        self.sets, self.sampled = read_sets(config.evaluation)
        self.rows = read_retrieval_rows(config.train)
        self.base = resolve_model(config.model)
        self.directory = read_model_directory(self.base)
        self._device, self._processes = choose_device(config.device, processes.local_rank), processes.count
        self._steps = schedule_of(config, len(self.rows), self._processes).steps
        evaluation = config.evaluation
        dev = self.sets[DEV]
        self._dev = dev.part(self.dev_parts(len(dev.questions)).choosing).sampled(
            max_questions=evaluation.interval_questions,
            max_passages=evaluation.interval_passages,
            seed=evaluation.seed,
        )

    def training(self) -> dict[str, Any]:
        """Settings, rows, base and the questions that choose among the weights."""
        return {
            **self.config.deciding(),
            "dev": set_digest(self._dev),
            "rows": rows_digest(self.rows),
            "base": digest(self.base),
        }

    def measuring(self) -> dict[str, Any]:
        """The sets, and the lengths of vectors where there are several."""
        sets = {name: set_digest(questions) for name, questions in self.sets.items()}
        prefixes = {"prefixes": self.config.matryoshka} if self.config.matryoshka else {}
        return {"sets": sets, "fused": self.fused, **prefixes}

    def examine(self) -> list[Finding]:
        """Rows, texts, settings, memory."""
        return examine(
            self.config,
            self.rows,
            self.sets[DEV],
            self.directory,
            Hardware.of(self._device, self._processes),
            steps=self._steps,
            parameters=Parameters.of(self.config, self.directory),
        )

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """Through `BGEEmbeddings` as it will serve, on the reference engine, so that nothing is exported."""
        adapter = tuned if self.method == "lora" else None
        model = self.config.model if tuned is None or adapter is not None else tuned
        embeddings = BGEEmbeddings(model, adapter=adapter, engine="torch", device=self._device)
        return measure(embeddings, self.sets, fused=fused, prefixes=self.config.matryoshka)

    def score(self, embeddings: Embeddings) -> float:
        """What checkpoints go by: the metric on the part of dev that chooses, or on a sample of it."""
        return evaluate_embeddings(embeddings, self._dev).mean(self.config.evaluation.metric)

    def train(self, observe: Observe, monitor: Monitor | None) -> TrainingResult:
        """By `finetune.bge.train`."""
        dev = set_digest(self._dev)
        return train(self.config, self.rows, evaluate=self.score, observe=observe, monitor=monitor, dev=dev)

    def mix(self, share: float, target: Path) -> None:
        """The weights, or the adapter scaled."""
        write_mixture(self.directory, self.output / CANDIDATE, share, target)


def read_sets(evaluation: EvaluationConfig) -> tuple[dict[str, RetrievalSet], dict[str, bool]]:
    """(sets by name as they are measured, dev first; which of them are samples).

    Raises:
        ConfigError: there is no dev set, or another one has its name.
    """
    sections = set_sections(evaluation.dev, evaluation.extra, example="evaluation.dev.rows=[dev.jsonl]")
    whole: Mapping[str, RetrievalSet] = {name: read_set(name, section) for name, section in sections.items()}
    limits = {"max_questions": evaluation.max_questions, "max_passages": evaluation.max_passages}
    sets = {name: found.sampled(**limits, seed=evaluation.seed) for name, found in whole.items()}
    return sets, {name: sets[name] is not whole[name] for name in sets}
