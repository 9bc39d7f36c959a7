"""A whole training run of a BGE retriever: doctor, measurement, training, measurement, mixing, gate, report, promotion.

The output directory holds `candidate/` (what was trained), `checkpoints/` while it trains, one JSON file per finished
stage, and `model/`, which exists once the gate let it pass. A run that was broken off goes on at the stage it had come
to; one that is finished says so.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from chains.bge.directory import ModelDirectory, digest, read_model_directory, resolve_model
from chains.bge.embeddings import BGEEmbeddings
from finetune.bge.blend import best, sweep, write_mixture
from finetune.bge.checkpoints import Checkpoints
from finetune.bge.checks import Hardware, Parameters, examine
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.distributed import joined
from finetune.bge.encoder import choose_device
from finetune.bge.train import Plan, TrainingEvent, rows_digest, settings_of, train
from finetune.data.rows import RetrievalRow, read_retrieval_rows
from finetune.doctor import Finding, Monitor, settle
from finetune.evaluation import RetrievalSet, evaluate_embeddings, read_set
from finetune.gate import DEV, Verdict, decide, forgets
from finetune.measurement import Measured, measure, set_digest
from finetune.report import Blend, DataFile, FusedReport, RunReport, SetReport, file_of, read_manifest, write_report
from finetune.stages import Stages
from loaders.errors import ConfigError, UsageError

logger = logging.getLogger(__name__)

MODEL, CANDIDATE, MIXTURE, CHECKPOINTS = "model", "candidate", "mixture", "checkpoints"

Observer = Callable[[TrainingEvent], None]
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
class _Task:
    """What a run is about: read once, changed by no stage."""

    config: BgeTrainingConfig
    rows: Sequence[RetrievalRow]
    base: ModelDirectory
    sets: Mapping[str, RetrievalSet]
    """as they are measured; dev first"""
    sampled: Mapping[str, bool]
    tell: Teller

    @property
    def training(self) -> dict[str, Any]:
        """What decides the weights."""
        return {**settings_of(self.config), "rows": rows_digest(self.rows), "base": digest(self.base.path)}

    @property
    def measuring(self) -> dict[str, Any]:
        """What decides a measurement, besides the weights."""
        sets = {name: set_digest(questions) for name, questions in self.sets.items()}
        return {"sets": sets, "fused": self.config.evaluation.fused}

    @property
    def whole(self) -> dict[str, Any]:
        """What decides everything."""
        gate = self.config.gate.model_dump(mode="json")
        metric = self.config.evaluation.metric
        return {"training": self.training, "measuring": self.measuring, "gate": gate, "metric": metric}

    def embedder(self, tuned: Path | None) -> Embeddings:
        """The base, or what came of it, as it will serve; on the reference engine, so that nothing is exported."""
        device = choose_device(self.config.device)
        if tuned is None:
            return BGEEmbeddings(self.config.model, engine="torch", device=device)
        if (tuned / "adapter_config.json").is_file():
            return BGEEmbeddings(self.config.model, adapter=tuned, engine="torch", device=device)
        return BGEEmbeddings(tuned, engine="torch", device=device)


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
        UsageError: the output holds a promoted model of another run.
        RagProjError: rows, sets or the model cannot be read.
    """
    task = _read(config, tell or (lambda _: None))
    stages = Stages(config.output)
    with joined(config.device) as processes:
        finished = _finished(task)
        processes.wait()  # nothing is written before every process has looked
        if not processes.first:
            if finished is None:
                train(config, task.rows)
            return None
        if finished is not None:
            return replace(_promote(config, finished), already=True)
        hardware = Hardware.of(choose_device(config.device, processes.local_rank), processes.count)
        findings = _doctor(task, hardware)
        _set_aside(task, stages)
        before = _measured(task, stages, "before", None)
        trained = _train(task, stages, observe, findings, processes.count)
    return _judge(task, stages, before, trained)


def _read(config: BgeTrainingConfig, tell: Teller) -> _Task:
    evaluation = config.evaluation
    if evaluation.dev is None:
        raise ConfigError(
            "缺少 evaluation.dev：没有评测集就无法判断训练是否有效；可写 evaluation.dev.rows=[dev.jsonl]",
            "evaluation.dev is missing: without it nobody knows whether training helps; set evaluation.dev.rows",
        )
    if DEV in evaluation.extra:
        raise ConfigError("evaluation.extra 中的评测集不能叫 dev", "no set of evaluation.extra can be called dev")
    sections = {DEV: evaluation.dev, **dict(sorted(evaluation.extra.items()))}
    whole = {name: read_set(name, section) for name, section in sections.items()}
    limits = {"max_questions": evaluation.max_questions, "max_passages": evaluation.max_passages}
    sets = {name: found.sampled(**limits, seed=evaluation.seed) for name, found in whole.items()}
    return _Task(
        config=config,
        rows=read_retrieval_rows(config.train),
        base=read_model_directory(resolve_model(config.model)),
        sets=sets,
        sampled={name: sets[name] is not whole[name] for name in sets},
        tell=tell,
    )


# --- stages -----------------------------------------------------------------------------------------------------


def _finished(task: _Task) -> Outcome | None:
    """The outcome of this very run, where it is there already.

    Raises:
        UsageError: a model of another run has been promoted there: it is never written over.
    """
    output = task.config.output
    for name in (MODEL, MIXTURE, CANDIDATE):
        manifest = read_manifest(output / name)
        if manifest is not None and manifest.get("run") == task.whole:
            return Outcome(output / name, manifest)
    if (output / MODEL).exists():
        raise UsageError(
            f"{output / MODEL} 是另一次训练通过的模型，不会被覆盖；请换一个 output，或先移走它",
            f"{output / MODEL} was promoted by another run and is not written over; choose another output, or move it",
        )
    return None


def _doctor(task: _Task, hardware: Hardware) -> list[Finding]:
    config = task.config
    findings = settle(
        examine(
            config,
            task.rows,
            task.sets[DEV],
            task.base,
            hardware,
            steps=Plan.of(config, len(task.rows), hardware.processes).steps,
            parameters=Parameters.of(config, task.base),
        ),
        config.doctor,
    )
    for finding in findings:
        task.tell(str(finding))
    return findings


def _set_aside(task: _Task, stages: Stages) -> None:
    """Move a candidate that an earlier run with other settings was refused for out of the way."""
    candidate = task.config.output / CANDIDATE
    if read_manifest(candidate) is None or stages.load("training", task.training) is not None:
        return
    aside = candidate.with_name(f"{CANDIDATE}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    candidate.rename(aside)
    task.tell(f"上次未通过的候选模型移到 {aside} / the refused candidate of before is now {aside.name}")


def _measured(task: _Task, stages: Stages, name: str, tuned: Path | None) -> Measured:
    """The measurement of the base (None) or of a model that came of it, taken once."""
    identity = {**task.measuring, "weights": digest(task.base.path if tuned is None else tuned)}
    saved = stages.load(name, identity)
    if saved is not None:
        return Measured.from_dict(saved)
    task.tell(f"评测 / measuring: {name}")
    found = measure(task.embedder(tuned), task.sets, fused=task.config.evaluation.fused)
    stages.save(name, identity, found.as_dict())
    return found


def _train(
    task: _Task, stages: Stages, observe: Observer | None, findings: Sequence[Finding], processes: int
) -> dict[str, Any]:
    """What training came to, as plain values; not repeated where it is finished."""
    saved = stages.load("training", task.training)
    if saved is not None and (task.config.output / CANDIDATE).is_dir():
        return saved
    task.tell("训练 / training")
    evaluation, monitor = task.config.evaluation, Monitor()
    limits = {"max_questions": evaluation.interval_questions, "max_passages": evaluation.interval_passages}
    dev = task.sets[DEV].sampled(**limits, seed=evaluation.seed)

    def score(embeddings: Embeddings) -> float:
        return evaluate_embeddings(embeddings, dev).mean(evaluation.metric)

    def watch(event: TrainingEvent) -> None:
        if observe is not None:
            observe(event)
        if event.loss is not None:
            found = monitor.observe(
                step=event.step, loss=event.loss, gradient_norm=event.gradient_norm, overflowed=event.skipped
            )
            for finding in settle(found, task.config.doctor):
                task.tell(str(finding))

    result = train(task.config, task.rows, evaluate=score, observe=watch)
    content = {
        "steps": result.steps,
        "planned_steps": Plan.of(task.config, len(task.rows), processes).steps,
        "best_step": result.best_step,
        "seconds": result.seconds,
        "rows_per_s": result.rows_per_s,
        "losses": list(result.losses),
        "scores": [list(pair) for pair in result.scores],
        "findings": [finding.as_dict() for finding in [*findings, *settle(monitor.findings, task.config.doctor)]],
    }
    stages.save("training", task.training, content)
    return content


def _judge(task: _Task, stages: Stages, before: Measured, trained: Mapping[str, Any]) -> Outcome:
    """The verdict on the candidate, or on a mixture that forgets less; the report; the promotion."""
    config, metric = task.config, task.config.evaluation.metric
    model = config.output / CANDIDATE
    after = _measured(task, stages, "after", model)
    blend = None
    if config.gate.blend and forgets(before.values(metric), after.values(metric), config.gate):
        blend = _blend(task, before)
        if blend.share is not None:
            write_mixture(task.base, model, blend.share, config.output / MIXTURE)
            model = config.output / MIXTURE
            after = _measured(task, stages, "mixture", model)
    verdict = decide(before.values(metric), after.values(metric), config.gate, metric=metric)
    report = _report(task, model, verdict, (before, after), trained, blend)
    write_report(model, report, run=task.whole)
    manifest = read_manifest(model)
    assert manifest is not None, "it was just written"
    return _promote(config, Outcome(model, manifest))


def _promote(config: BgeTrainingConfig, outcome: Outcome) -> Outcome:
    """The end of a run that is judged: a model that passed takes its place, checkpoints go."""
    model = config.output / MODEL
    if outcome.promoted and outcome.model != model:
        outcome.model.rename(model)
        outcome = replace(outcome, model=model)
    Checkpoints(config.output / CHECKPOINTS).clear()
    return outcome


def _blend(task: _Task, before: Measured) -> Blend:
    """Mixtures with the base, each measured as the directory that it would serve from."""
    config, metric = task.config, task.config.evaluation.metric
    candidate, target = config.output / CANDIDATE, config.output / MIXTURE

    def values(share: float) -> Mapping[str, Sequence[float]]:
        task.tell(f"出现遗忘，尝试混合比例 {share:g} / forgetting shows, trying a mixture of {share:g}")
        write_mixture(task.base, candidate, share, target)
        return measure(task.embedder(target), task.sets, fused=False).values(metric)

    tried = sweep(values, before.values(metric), config.gate, metric=metric)
    chosen = best(tried)
    shutil.rmtree(target, ignore_errors=True)
    figures = tuple((mixture.share, round(mixture.dev, 4), mixture.verdict.promoted) for mixture in tried)
    return Blend(figures, None if chosen is None else chosen.share)


def _report(
    task: _Task,
    model: Path,
    verdict: Verdict,
    measured: tuple[Measured, Measured],
    trained: Mapping[str, Any],
    blend: Blend | None,
) -> RunReport:
    config = task.config
    before, after = measured
    fused = None
    if before.fused is not None and after.fused is not None:
        fused = FusedReport(before.fused, after.fused)
    return RunReport(
        kind="bge",
        method=config.method,
        base=config.model,
        base_digest=digest(task.base.path),
        digest=digest(model),
        verdict=verdict,
        metric=config.evaluation.metric,
        sets={name: SetReport(before.sets[name], after.sets[name], task.sampled[name]) for name in task.sets},
        data=data_files(config.train, task.rows),
        settings=config.model_dump(mode="json"),
        seed=config.seed,
        steps=trained["steps"],
        planned_steps=trained["planned_steps"],
        best_step=trained["best_step"],
        seconds=trained["seconds"],
        rows_per_s=trained["rows_per_s"],
        losses=trained["losses"],
        scores=[(step, score) for step, score in trained["scores"]],
        findings=[Finding(**finding) for finding in trained["findings"]],
        fused=fused,
        blend=blend,
    )


def data_files(paths: Sequence[Path], rows: Sequence[RetrievalRow]) -> list[DataFile]:
    """The files of training rows, each with its hash and how many rows it gave."""
    counts = Counter(row.file for row in rows)
    return [file_of(path, counts[str(path)]) for path in paths]
