"""A whole training run of a reranker, judged on lists of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chains.bge.directory import digest, read_model_directory, resolve_model
from finetune.bge.checks import Hardware
from finetune.bge.train import rows_digest, schedule_of
from finetune.blend import mix
from finetune.data.rows import RetrievalRow, read_retrieval_rows
from finetune.distributed import Processes, joined
from finetune.doctor import Finding, Monitor
from finetune.evaluation import Scores
from finetune.gate import DEV
from finetune.measurement import Measured
from finetune.precision import choose_device
from finetune.reranker.candidates import CandidateSet, evaluate_found, evaluate_reranker, read_candidates
from finetune.reranker.checks import examine
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import PairScorer, has_head, load_cross_encoder, save_cross_encoder
from finetune.reranker.train import train
from finetune.run import Outcome, Task, Teller, run_together, set_sections
from finetune.training_loop import CANDIDATE, Observe, TrainingResult


def finetune_reranker(
    config: RerankerTrainingConfig, *, observe: Observe | None = None, tell: Teller | None = None
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
        return run_together(RerankerTask(config, processes, observe=observe, tell=tell), processes)


class RerankerTask(Task):
    """What a run is about: read once, changed by no stage."""

    kind = "reranker"
    config: RerankerTrainingConfig
    rows: Sequence[RetrievalRow]

    def __init__(
        self,
        config: RerankerTrainingConfig,
        processes: Processes | None = None,
        *,
        observe: Observe | None = None,
        tell: Teller | None = None,
    ) -> None:
        """Rows and sets are read here, candidates are searched; the model is loaded later."""
        super().__init__(observe=observe, tell=tell)
        processes = processes or Processes()
        self.config, evaluation = config, config.evaluation
        sections = set_sections(evaluation.dev, evaluation.extra, example="evaluation.dev.rows=[dev.jsonl]")
        self.rows = read_retrieval_rows(config.train)
        self.base = resolve_model(config.model)
        self.directory = read_model_directory(self.base)
        self._device, self._processes = choose_device(config.device, processes.local_rank), processes.count
        self._steps = schedule_of(config, len(self.rows), self._processes).steps
        limits = {"max_passages": evaluation.max_passages, "seed": evaluation.seed}
        questions = evaluation.max_questions
        read = {
            name: read_candidates(name, section, config.candidates, max_questions=questions, **limits)
            for name, section in sections.items()
        }
        self.sets: dict[str, CandidateSet] = {name: found for name, (found, _) in read.items()}
        self.sampled = {name: drawn for name, (_, drawn) in read.items()}
        dev = self.sets[DEV]
        choosing = dev.part(self.dev_parts(len(dev.candidates)).choosing)
        self._dev = choosing.sampled(max_questions=evaluation.interval_questions, **limits)

    def training(self) -> dict[str, Any]:
        """Settings, rows, base and the questions that choose among the weights."""
        return {
            **self.config.deciding(),
            "dev": self._dev.digest,
            "rows": rows_digest(self.rows),
            "base": digest(self.base),
        }

    def measuring(self) -> dict[str, Any]:
        """The sets with their candidates, and where pairs are cut."""
        return {"sets": {name: found.digest for name, found in self.sets.items()}, "max_tokens": self.config.max_tokens}

    def examine(self) -> list[Finding]:
        """Rows, texts, settings, memory."""
        return examine(
            self.config,
            self.rows,
            self.sets[DEV].questions,
            self.directory,
            Hardware.of(self._device, self._processes),
            steps=self._steps,
        )

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """The candidates of every set put in order; `fused` does not apply.

        A base without a head puts nothing in order: what it would serve is the order they were found in.
        """
        if tuned is None and not has_head(self.directory):
            return Measured(self.found())
        directory = self.directory if tuned is None else read_model_directory(tuned)
        model = load_cross_encoder(directory, seed=self.config.seed, device=self._device)
        scorer = PairScorer(model, directory, max_tokens=self.config.max_tokens, device=self._device)
        return Measured({name: evaluate_reranker(scorer.score, found) for name, found in self.sets.items()})

    def found(self) -> dict[str, Scores]:
        """The candidates of every set in the order they were found in."""
        return {name: evaluate_found(candidates) for name, candidates in self.sets.items()}

    def train(self, observe: Observe, monitor: Monitor | None) -> TrainingResult:
        """By `finetune.reranker.train`."""

        def score(scorer: PairScorer) -> float:
            return evaluate_reranker(scorer.score, self._dev).mean(self.config.evaluation.metric)

        dev = self._dev.digest
        return train(self.config, self.rows, self.directory, evaluate=score, observe=observe, monitor=monitor, dev=dev)

    def mix(self, share: float, target: Path) -> None:
        """The weights of both, with the head that the base was given where it has none."""
        candidate = read_model_directory(self.output / CANDIDATE)
        tuned = load_cross_encoder(candidate, seed=self.config.seed, device="cpu")
        mix(tuned, load_cross_encoder(self.directory, seed=self.config.seed, device="cpu"), share)
        save_cross_encoder(tuned, target, self.directory, max_tokens=self.config.max_tokens)
