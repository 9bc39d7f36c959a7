"""A run around a training: doctor, measurement, training, measurement, mixing, gate, report, promotion.

The output directory holds `candidate/` (what was trained), `checkpoints/` while it trains, one JSON file per finished
stage, and `model/`, which exists once the gate let it pass. A run that was broken off goes on at the stage it had come
to; one that is finished says so.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from chains.bge.directory import digest
from chains.lora import base_mark
from finetune.blend import best, sweep
from finetune.data.rows import GenerationRow, RetrievalRow
from finetune.distributed import Processes
from finetune.doctor import Finding, Monitor, settle
from finetune.evaluation import Scores
from finetune.gate import DEV, DevParts, Verdict, decide, dev_parts, forgets
from finetune.measurement import Measured
from finetune.report import Blend, DataFile, FusedReport, RunReport, SetReport, file_of, read_manifest, write_report
from finetune.stages import Stages
from finetune.training_config import TrainingConfig
from finetune.training_loop import CANDIDATE, CHECKPOINTS, Observe, TrainingEvent, TrainingResult
from loaders.errors import ConfigError, UsageError

MODEL, MIXTURE = "model", "mixture"  # in the output directory, beside what the training loop writes

_Section = TypeVar("_Section")

Teller = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    model: Path
    """the promoted model, or the refused candidate"""
    manifest: Mapping[str, Any]
    """content of its `ragproj.json`"""
    already: bool = False
    """it had been finished before, nothing was done"""

    @property
    def promoted(self) -> bool:
        """Whether the gate let it pass."""
        return bool(self.manifest["promoted"])


@dataclass(frozen=True)
class Trained:
    """What a training came to, as it is kept until the run is over."""

    steps: int
    planned_steps: int
    best_step: int | None
    seconds: float
    rows_per_s: float
    losses: tuple[float, ...]
    scores: tuple[tuple[int, float], ...]
    findings: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, result: TrainingResult, findings: Sequence[Finding]) -> Trained:
        """A result, and what the doctor found before and during the training."""
        return cls(
            steps=result.steps,
            planned_steps=result.planned_steps,
            best_step=result.best_step,
            seconds=result.seconds,
            rows_per_s=result.rows_per_s,
            losses=result.losses,
            scores=result.scores,
            findings=tuple(finding.as_dict() for finding in findings),
        )


class Task(ABC):
    """What differs between the kinds of models: how one is trained, and how it is measured."""

    kind: str
    """as `ragproj.json` has it"""
    config: TrainingConfig
    method = "full"
    base: Path
    """the directory that training starts from"""
    rows: Sequence[RetrievalRow] | Sequence[GenerationRow]
    sampled: Mapping[str, bool]
    """by set, dev first: whether it is a sample"""
    fused = False
    """whether dev is measured together with lexical search, too"""
    set_report: ClassVar[type[SetReport]] = SetReport
    """how a set is compared before and after"""

    def __init__(self, *, observe: Observe | None, tell: Teller | None) -> None:
        """Args are told of every step and evaluation, and in a line of what begins and of every finding."""
        self.observe = observe or (lambda _: None)
        self.tell = tell or (lambda _: None)

    @property
    def output(self) -> Path:
        """The directory of the run."""
        return self.config.output

    @abstractmethod
    def training(self) -> dict[str, Any]:
        """What decides the weights, as JSON values."""

    @abstractmethod
    def measuring(self) -> dict[str, Any]:
        """What decides a measurement besides the weights, as JSON values."""

    @abstractmethod
    def examine(self) -> list[Finding]:
        """What the doctor finds before the run."""

    @abstractmethod
    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """Scores of the base (None) or of a directory that came of it, on all sets."""

    @abstractmethod
    def train(self, observe: Observe, monitor: Monitor | None) -> TrainingResult:
        """Train `output/candidate`, going on from checkpoints in `output/checkpoints`; as `TrainingLoop` takes them."""

    @abstractmethod
    def mix(self, share: float, target: Path) -> None:
        """Write the mixture of base and candidate with that share of the candidate."""

    def found(self) -> Mapping[str, Scores]:
        """Scores of the sets without any model, by set, where there is an order before it; none otherwise."""
        return {}

    def dev_parts(self, questions: int) -> DevParts:
        """Which of so many questions of dev choose the weights, and which judge them."""
        return dev_parts(questions, seed=self.config.evaluation.seed)

    def whole(self) -> dict[str, Any]:
        """What decides everything."""
        gate, metric = self.config.gate.model_dump(mode="json"), self.config.evaluation.metric
        return {"training": self.training(), "measuring": self.measuring(), "gate": gate, "metric": metric}


def set_sections(dev: _Section | None, extra: Mapping[str, _Section], *, example: str) -> dict[str, _Section]:
    """Evaluation sets by their names, dev first.

    Args:
        dev: the set that must gain; nothing where the config has none.
        extra: the others.
        example: how dev is set, for the message.

    Raises:
        ConfigError: there is no dev set, or another one has its name.
    """
    if not dev:
        raise ConfigError(
            f"缺少 evaluation.dev：没有评测集就无法判断训练是否有效；可写 {example}",
            f"evaluation.dev is missing: without it nobody knows whether training helps; set {example}",
        )
    if DEV in extra:
        raise ConfigError("evaluation.extra 中的评测集不能叫 dev", "no set of evaluation.extra can be called dev")
    return {DEV: dev, **dict(sorted(extra.items()))}


def run_together(task: Task, processes: Processes) -> Outcome | None:
    """Train, judge and promote; None in all processes but the first.

    Raises:
        DoctorError: something is wrong with the run; it says what to do.
        UsageError: the output holds a promoted model of another run.
    """
    outcome = finished(task)
    trains = outcome is None and _kept(task, Stages(task.output)) is None
    processes.wait()  # nothing is written before every process has looked
    if processes.first:
        return run(task) if outcome is None else conclude(task, outcome)
    if trains:
        task.train(task.observe, None)
    return None


def finished(task: Task) -> Outcome | None:
    """The outcome of this very run, where it is there already; `conclude` makes sure that it is promoted.

    Raises:
        UsageError: a model of another run has been promoted there: it is never written over.
    """
    for name in (MODEL, MIXTURE, CANDIDATE):
        manifest = read_manifest(task.output / name)
        if manifest is not None and manifest.get("run") == task.whole():
            return Outcome(task.output / name, manifest, already=True)
    if (task.output / MODEL).exists():
        raise UsageError(
            f"{task.output / MODEL} 是另一次训练通过的模型，不会被覆盖；请换一个 output，或先移走它",
            f"{task.output / MODEL} was promoted by another run and is not written over; choose another output, or"
            " move it",
        )
    return None


def run(task: Task) -> Outcome:
    """The whole run of a task that is not finished; every stage once.

    Raises:
        DoctorError: something is wrong with the run; it says what to do.
    """
    findings = settle(task.examine(), task.config.doctor)
    for finding in findings:
        task.tell(str(finding))
    stages = Stages(task.output)
    _set_aside(task, stages)
    before = _measured(task, stages, "before", None)
    parts = task.dev_parts(before.sets[DEV].questions)
    trained = _trained(task, stages, findings)
    model, after, blend = _after(task, stages, before, parts)
    metric = task.config.evaluation.metric
    before, after = before.on_dev(parts.judging), after.on_dev(parts.judging)
    verdict = decide(before.values(metric), after.values(metric), task.config.gate, metric=metric)
    verdict = replace(verdict, parts=parts)
    write_report(model, _report(task, model, verdict, (before, after), trained, blend), run=task.whole())
    manifest = read_manifest(model)
    assert manifest is not None, "it was just written"
    return conclude(task, Outcome(model, manifest))


def conclude(task: Task, outcome: Outcome) -> Outcome:
    """The end of a run that is judged: a model that passed takes its place, checkpoints go."""
    model = task.output / MODEL
    if outcome.promoted and outcome.model != model:
        outcome.model.rename(model)
        outcome = replace(outcome, model=model)
    shutil.rmtree(task.output / CHECKPOINTS, ignore_errors=True)
    return outcome


# --- stages -----------------------------------------------------------------------------------------------------


def _set_aside(task: Task, stages: Stages) -> None:
    """Move a candidate that an earlier run with other settings was refused for out of the way."""
    candidate = task.output / CANDIDATE
    if read_manifest(candidate) is None or stages.load("training", task.training()) is not None:
        return
    aside = candidate.with_name(f"{CANDIDATE}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    candidate.rename(aside)
    task.tell(f"上次未通过的候选模型移到 {aside} / the refused candidate of before is now {aside.name}")


def _measured(task: Task, stages: Stages, name: str, tuned: Path | None) -> Measured:
    """The measurement of the base (None) or of a model that came of it, taken once."""
    identity = {**task.measuring(), "weights": digest(task.base if tuned is None else tuned)}
    saved = stages.load(name, identity)
    if saved is not None:
        return Measured.from_dict(saved)
    task.tell(f"评测 / measuring: {name}")
    found = task.measure(tuned, fused=task.fused)
    stages.save(name, identity, found.as_dict())
    return found


def _trained(task: Task, stages: Stages, findings: Sequence[Finding]) -> Trained:
    """What training came to; not repeated where it is finished."""
    kept = _kept(task, stages)
    if kept is not None:
        return kept
    task.tell("训练 / training")
    monitor = Monitor()

    def observe(event: TrainingEvent) -> None:
        task.observe(event)
        if event.loss is None:
            return
        found = monitor.observe(
            step=event.step, loss=event.loss, gradient_norm=event.gradient_norm, overflowed=event.skipped
        )
        for finding in settle(found, task.config.doctor):
            task.tell(str(finding))

    result = task.train(observe, monitor)
    trained = Trained.of(result, [*findings, *settle(monitor.findings, task.config.doctor)])
    stages.save("training", task.training(), vars(trained))
    return trained


def _kept(task: Task, stages: Stages) -> Trained | None:
    """What a training came to that is finished; None where there is something to train."""
    saved = stages.load("training", task.training())
    return None if saved is None or not (task.output / CANDIDATE).is_dir() else Trained(**saved)


def _after(task: Task, stages: Stages, before: Measured, parts: DevParts) -> tuple[Path, Measured, Blend | None]:
    """(directory, its scores, mixtures tried): the candidate, or the best mixture where it forgets too much.

    What is best is decided on the part of dev that chooses.
    """
    metric = task.config.evaluation.metric
    candidate, mixture = task.output / CANDIDATE, task.output / MIXTURE
    after = _measured(task, stages, "after", candidate)
    if not task.config.gate.blend or not forgets(before.values(metric), after.values(metric), task.config.gate):
        return candidate, after, None

    def values(share: float) -> Mapping[str, Sequence[float]]:
        task.tell(f"出现遗忘，尝试混合比例 {share:g} / forgetting shows, trying a mixture of {share:g}")
        task.mix(share, mixture)
        return task.measure(mixture, fused=False).on_dev(parts.choosing).values(metric)

    tried = sweep(values, before.on_dev(parts.choosing).values(metric), task.config.gate, metric=metric)
    shutil.rmtree(mixture, ignore_errors=True)
    chosen = best(tried)
    figures = tuple((found.share, round(found.dev, 4), found.verdict.promoted) for found in tried)
    if chosen is None:
        return candidate, after, Blend(figures, None)
    task.mix(chosen.share, mixture)
    return mixture, _measured(task, stages, "mixture", mixture), Blend(figures, chosen.share)


def _report(
    task: Task,
    model: Path,
    verdict: Verdict,
    measured: tuple[Measured, Measured],
    trained: Trained,
    blend: Blend | None,
) -> RunReport:
    before, after = measured
    fused, found = None, task.found()
    if found and verdict.parts is not None:
        found = Measured(found).on_dev(verdict.parts.judging).sets
    if before.fused is not None and after.fused is not None:
        fused = FusedReport(before.fused, after.fused)
    return RunReport(
        kind=task.kind,
        method=task.method,
        base=task.config.model,
        base_digest=base_mark(task.base),
        digest=digest(model),
        verdict=verdict,
        metric=task.config.evaluation.metric,
        sets={
            name: task.set_report(before.sets[name], after.sets[name], drawn) for name, drawn in task.sampled.items()
        },
        data=data_files(task.config.train, task.rows),
        settings=task.config.model_dump(mode="json"),
        seed=task.config.seed,
        steps=trained.steps,
        planned_steps=trained.planned_steps,
        best_step=trained.best_step,
        seconds=trained.seconds,
        rows_per_s=trained.rows_per_s,
        losses=trained.losses,
        scores=[(step, score) for step, score in trained.scores],
        findings=[Finding(**finding) for finding in trained.findings],
        fused=fused,
        prefixes={
            length: task.set_report(scores, after.prefixes[length], task.sampled[DEV])
            for length, scores in before.prefixes.items()
        },
        found=found,
        blend=blend,
    )


def data_files(paths: Sequence[Path], rows: Sequence[RetrievalRow] | Sequence[GenerationRow]) -> list[DataFile]:
    """The files of training rows, each with its hash and how many rows it gave."""
    counts = Counter(row.file for row in rows)
    return [file_of(path, counts[str(path)]) for path in paths]
