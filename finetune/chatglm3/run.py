"""A whole training run of ChatGLM3: doctor, measurement, training, measurement, gate, report, promotion.

The output directory holds `candidate/` (what was trained), `checkpoints/` while it trains, one JSON file per finished
stage, the answers before and after beside them, and `model/`, which exists once the gate let it pass. A run that was
broken off goes on at the stage it had come to; one that is finished says so.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chains.bge.directory import digest
from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.directories import native_directory
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.bge.checkpoints import Checkpoints
from finetune.bge.distributed import joined
from finetune.bge.run import Outcome
from finetune.bge.train import TrainingEvent
from finetune.chatglm3.checks import ModelSizes, examine
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example, read_examples
from finetune.chatglm3.evaluation import (
    Answered,
    GenerationSetReport,
    answer_rows,
    counted_mean,
    evaluate_rows,
    sampled_rows,
    score_answers,
)
from finetune.chatglm3.model import device_and_dtype, serving_quantization
from finetune.chatglm3.train import examples_digest, plan_of, settings_of, train
from finetune.data.jsonl import write_records
from finetune.data.rows import GenerationRow, read_generation_rows
from finetune.doctor import Finding, Monitor, settle
from finetune.evaluation import Scores
from finetune.gate import DEV, Verdict, decide
from finetune.measurement import Measured
from finetune.report import DataFile, RunReport, file_of, read_manifest, write_report
from finetune.stages import Stages
from loaders.errors import ConfigError, UsageError

MODEL, CANDIDATE, CHECKPOINTS = "model", "candidate", "checkpoints"

Observer = Callable[[TrainingEvent], None]
Teller = Callable[[str], None]


@dataclass(frozen=True)
class _Task:
    """What a run is about: read once, changed by no stage."""

    config: ChatGlm3TrainingConfig
    directory: Path
    rows: Sequence[GenerationRow]
    examples: Sequence[Example]
    sets: Mapping[str, Sequence[GenerationRow]]
    """as they are measured; dev first"""
    sampled: Mapping[str, bool]
    tell: Teller

    @property
    def training(self) -> dict[str, Any]:
        """What decides the weights."""
        rows = examples_digest(self.examples)
        return {**settings_of(self.config), "rows": rows, "base": digest(self.directory)}

    @property
    def measuring(self) -> dict[str, Any]:
        """What decides a measurement, besides the weights."""
        evaluation = self.config.evaluation
        sets = {name: [row.as_dict() for row in rows] for name, rows in self.sets.items()}
        return {"sets": sets, "max_new_tokens": evaluation.max_new_tokens, "language": self.config.language}

    @property
    def whole(self) -> dict[str, Any]:
        """What decides everything, but for the texts of the sets."""
        gate = self.config.gate.model_dump(mode="json")
        sets = {name: len(rows) for name, rows in self.sets.items()}
        metric = self.config.evaluation.metric
        return {"training": self.training, "sets": sets, "gate": gate, "metric": metric}

    def generator(self, tuned: Path | None) -> ChatGLM3:
        """The base, or what came of it, as it will serve: the same class, quantisation and prompt; always greedy."""
        config = self.config
        device, dtype = device_and_dtype(config)
        adapter = tuned is not None and (tuned / "adapter_config.json").is_file()
        return ChatGLM3(
            model=str(self.directory if tuned is None or adapter else tuned),
            adapter=str(tuned) if adapter else None,
            quantization=serving_quantization(config),
            device=device,
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]  # one of the names it knows
            **self.answering,
        )

    @property
    def answering(self) -> dict[str, Any]:
        """How answers are generated for a measurement."""
        evaluation = self.config.evaluation
        return {"temperature": 0, "max_new_tokens": evaluation.max_new_tokens, "max_rows": evaluation.concurrency}


def finetune_chatglm3(
    config: ChatGlm3TrainingConfig, *, observe: Observer | None = None, tell: Teller | None = None
) -> Outcome | None:
    """Train, judge and promote; None in all processes but the first.

    Args:
        config: the settings.
        observe: told of every step and evaluation.
        tell: told in a line what begins, and of every finding.

    Raises:
        DoctorError: something is wrong with the run; it says what to do.
        UsageError: the output holds a promoted model of another run.
        RagProjError: rows or the model cannot be read.
    """
    task = _read(config, tell or (lambda _: None))
    stages = Stages(config.output)
    with joined(config.device) as processes:
        finished = _finished(task)
        processes.wait()  # nothing is written before every process has looked
        if not processes.first:
            if finished is None:
                train(config, task.examples, task.directory, evaluate=_never)
            return None
        if finished is not None:
            return replace(_promote(config, finished), already=True)
        findings = _doctor(task)
        _set_aside(task, stages)
        before = _measured(task, stages, "before", None)
        trained = _train(task, stages, observe, findings)
    return _judge(task, stages, before, trained)


def _never(_: Any) -> float:
    """Takes part in evaluations without doing them: the first process does."""
    return 0.0


def _read(config: ChatGlm3TrainingConfig, tell: Teller) -> _Task:
    evaluation = config.evaluation
    if not evaluation.dev:
        raise ConfigError(
            "缺少 evaluation.dev：没有评测数据就无法判断训练是否有效；可写 evaluation.dev=[generation_dev.jsonl]",
            "evaluation.dev is missing: without it nobody knows whether training helps; set evaluation.dev to a list of"
            " generation rows",
        )
    if DEV in evaluation.extra:
        raise ConfigError("evaluation.extra 中的评测集不能叫 dev", "no set of evaluation.extra can be called dev")
    directory = native_directory(config.model)
    rows = read_generation_rows(config.train)
    whole = {
        name: read_generation_rows(paths)
        for name, paths in {DEV: evaluation.dev, **dict(sorted(evaluation.extra.items()))}.items()
    }
    sets = {name: sampled_rows(found, evaluation.max_rows, seed=evaluation.seed) for name, found in whole.items()}
    return _Task(
        config=config,
        directory=directory,
        rows=rows,
        examples=read_examples(
            rows,
            ChatGLM3Tokenizer.from_directory(directory),
            max_tokens=config.max_tokens,
            language=config.language,
        ),
        sets=sets,
        sampled={name: len(sets[name]) < len(whole[name]) for name in sets},
        tell=tell,
    )


# --- stages -----------------------------------------------------------------------------------------------------


def _finished(task: _Task) -> Outcome | None:
    """The outcome of this very run, where it is there already.

    Raises:
        UsageError: a model of another run has been promoted there: it is never written over.
    """
    output = task.config.output
    for name in (MODEL, CANDIDATE):
        manifest = read_manifest(output / name)
        if manifest is not None and manifest.get("run") == task.whole:
            return Outcome(output / name, manifest)
    if (output / MODEL).exists():
        raise UsageError(
            f"{output / MODEL} 是另一次训练通过的模型，不会被覆盖；请换一个 output，或先移走它",
            f"{output / MODEL} was promoted by another run and is not written over; choose another output, or move it",
        )
    return None


def _doctor(task: _Task) -> list[Finding]:
    import torch

    device, dtype = device_and_dtype(task.config)
    found = examine(
        task.config,
        task.examples,
        task.sets[DEV],
        ModelSizes.of(task.directory),
        device=device,
        number_bytes=4 if dtype == torch.float32 else 2,
        steps=plan_of(task.config, len(task.examples)).steps,
    )
    findings = settle(found, task.config.doctor)
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
    """The measurement of the base (None) or of a model that came of it, taken once; the answers are kept beside it."""
    identity = {**task.measuring, "weights": digest(task.directory if tuned is None else tuned)}
    saved = stages.load(name, identity)
    if saved is not None:
        return Measured.from_dict(saved)
    task.tell(f"评测 / measuring: {name}")
    model = task.generator(tuned)
    scores: dict[str, Scores] = {}
    records: list[dict[str, Any]] = []
    for set_name, rows in task.sets.items():
        answers = answer_rows(
            model, rows, language=task.config.language, concurrency=task.config.evaluation.concurrency
        )
        scores[set_name] = score_answers(rows, answers)
        records += [_record(set_name, row, answer) for row, answer in zip(rows, answers, strict=True)]
    del model
    _make_room()
    found = Measured(scores)
    task.config.output.mkdir(parents=True, exist_ok=True)
    write_records(task.config.output / f"answers_{name}.jsonl", records)
    stages.save(name, identity, found.as_dict())
    return found


def _make_room() -> None:
    """Let go of the weights of a model that is no longer needed, before the next is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record(name: str, row: GenerationRow, answer: Answered) -> dict[str, Any]:
    return {"set": name, "answered": answer.result, "refused": answer.refused, **row.as_dict()}


def _train(task: _Task, stages: Stages, observe: Observer | None, findings: Sequence[Finding]) -> dict[str, Any]:
    """What training came to, as plain values; not repeated where it is finished."""
    saved = stages.load("training", task.training)
    if saved is not None and (task.config.output / CANDIDATE).is_dir():
        return saved
    task.tell("训练 / training")
    evaluation, monitor = task.config.evaluation, Monitor()
    dev = sampled_rows(task.sets[DEV], evaluation.interval_rows, seed=evaluation.seed)

    def score(model: Any) -> float:
        chat = ChatGLM3.from_model(model, task.directory, **task.answering)
        scores = evaluate_rows(chat, dev, language=task.config.language, concurrency=evaluation.concurrency)
        return counted_mean(scores.by_metric[evaluation.metric])

    def watch(event: TrainingEvent) -> None:
        if observe is not None:
            observe(event)
        if event.loss is not None:
            found = monitor.observe(
                step=event.step, loss=event.loss, gradient_norm=event.gradient_norm, overflowed=event.skipped
            )
            for finding in settle(found, task.config.doctor):
                task.tell(str(finding))

    result = train(task.config, task.examples, task.directory, evaluate=score, observe=watch)
    content = {
        "steps": result.steps,
        "planned_steps": plan_of(task.config, len(task.examples)).steps,
        "best_step": result.best_step,
        "seconds": result.seconds,
        "rows_per_s": result.rows_per_s,
        "tokens_per_s": result.tokens_per_s,
        "losses": list(result.losses),
        "scores": [list(pair) for pair in result.scores],
        "findings": [finding.as_dict() for finding in [*findings, *settle(monitor.findings, task.config.doctor)]],
    }
    stages.save("training", task.training, content)
    return content


def _judge(task: _Task, stages: Stages, before: Measured, trained: Mapping[str, Any]) -> Outcome:
    """The verdict on the candidate; the report; the promotion."""
    config, metric = task.config, task.config.evaluation.metric
    model = config.output / CANDIDATE
    after = _measured(task, stages, "after", model)
    verdict = decide(before.values(metric), after.values(metric), config.gate, metric=metric)
    report = _report(task, model, verdict, before, after, trained)
    write_report(model, report, run=task.whole)
    manifest = read_manifest(model)
    assert manifest is not None, "it was just written"
    return _promote(config, Outcome(model, manifest))


def _promote(config: ChatGlm3TrainingConfig, outcome: Outcome) -> Outcome:
    """The end of a run that is judged: a model that passed takes its place, checkpoints go."""
    model = config.output / MODEL
    if outcome.promoted and outcome.model != model:
        outcome.model.rename(model)
        outcome = replace(outcome, model=model)
    Checkpoints(config.output / CHECKPOINTS).clear()
    return outcome


def _report(
    task: _Task,
    model: Path,
    verdict: Verdict,
    before: Measured,
    after: Measured,
    trained: Mapping[str, Any],
) -> RunReport:
    config = task.config
    return RunReport(
        kind="chatglm3",
        method=config.method,
        base=config.model,
        base_digest=digest(task.directory),
        digest=digest(model),
        verdict=verdict,
        metric=config.evaluation.metric,
        sets={name: GenerationSetReport(before.sets[name], after.sets[name], task.sampled[name]) for name in task.sets},
        data=_data_files(config.train, task.rows),
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
    )


def _data_files(paths: Sequence[Path], rows: Sequence[GenerationRow]) -> list[DataFile]:
    counts = Counter(row.file for row in rows)
    return [file_of(path, counts[str(path)]) for path in paths]
