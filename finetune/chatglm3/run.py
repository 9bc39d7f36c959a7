"""A whole training run of ChatGLM3, judged on its answers through the chain that serves."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from chains.bge.directory import digest
from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.directories import native_directory
from chains.chatglm3.loading import ModelOptions, load_causal_model
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.bge.blend import mix, write_mixture
from finetune.bge.distributed import joined
from finetune.bge.train import TrainingEvent
from finetune.chatglm3.checks import ModelSizes, examine
from finetune.chatglm3.config import ChatGlm3TrainingConfig, GenerationEvaluationConfig
from finetune.chatglm3.data import read_examples
from finetune.chatglm3.evaluation import (
    Answered,
    GenerationSetReport,
    answer_rows,
    counted_mean,
    evaluate_rows,
    sampled_rows,
    score_answers,
)
from finetune.chatglm3.model import device_and_dtype, save_model, serving_quantization
from finetune.chatglm3.train import examples_digest, plan_of, settings_of, train
from finetune.data.jsonl import write_records
from finetune.data.rows import GenerationRow, read_generation_rows
from finetune.doctor import Finding, in_order
from finetune.evaluation import Scores
from finetune.gate import DEV
from finetune.judging import CANDIDATE, Outcome, Task, Teller, Trained, Watch, conclude, finished, run
from finetune.measurement import Measured
from finetune.report import SetReport
from loaders.errors import ConfigError

Observer = Callable[[TrainingEvent], None]


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
        UsageError: the output holds a promoted model of another run, or there is no dev set.
        RagProjError: rows or the model cannot be read.
    """
    with joined(config.device) as processes:
        task = GenerationTask(config, observe=observe, tell=tell, rank=processes.local_rank)
        outcome = finished(task)
        processes.wait()  # nothing is written before every process has looked
        if not processes.first:
            if outcome is None:
                train(config, task.examples, task.base, evaluate=task.score)
            return None
        return run(task) if outcome is None else conclude(task, outcome)


class GenerationTask(Task):
    """What a run is about: read once, changed by no stage."""

    kind = "chatglm3"
    rows: Sequence[GenerationRow]
    evaluation: GenerationEvaluationConfig
    set_report: ClassVar[type[SetReport]] = GenerationSetReport

    def __init__(
        self,
        config: ChatGlm3TrainingConfig,
        *,
        observe: Observer | None = None,
        tell: Teller | None = None,
        rank: int = 0,
    ) -> None:
        """Rows and sets are read here; the model is loaded later."""
        self.config = config
        self.method, self.model, self.output = config.method, config.model, config.output
        self.files, self.seed = config.train, config.seed
        self.settings = config.model_dump(mode="json")
        self.evaluation, self.gate, self.doctor = config.evaluation, config.gate, config.doctor
        self.tell = tell or (lambda _: None)
        self.sets, self.sampled = read_sets(config.evaluation)
        self.rows = read_generation_rows(config.train)
        self.base = native_directory(config.model)
        tokenizer = ChatGLM3Tokenizer.from_directory(self.base)
        self.examples = read_examples(self.rows, tokenizer, max_tokens=config.max_tokens, language=config.language)
        self._dev = sampled_rows(self.sets[DEV], config.evaluation.interval_rows, seed=config.evaluation.seed)
        self._observe = observe
        self._device, self._dtype = device_and_dtype(config, rank)

    def training(self) -> dict[str, Any]:
        """Settings, rows and base."""
        return {**settings_of(self.config), "rows": examples_digest(self.examples), "base": digest(self.base)}

    def measuring(self) -> dict[str, Any]:
        """The sets, the prompt's language and how much is answered."""
        sets = {name: _digest(rows) for name, rows in self.sets.items()}
        evaluation = self.config.evaluation
        return {"sets": sets, "language": self.config.language, "max_new_tokens": evaluation.max_new_tokens}

    def examine(self) -> list[Finding]:
        """Labels, lengths, leaks, sizes and memory."""
        return in_order(
            examine(
                self.config,
                self.examples,
                self.sets[DEV],
                ModelSizes.of(self.base),
                device=self._device,
                number_bytes=self._dtype.itemsize,
                steps=self._steps,
            )
        )

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """Through `ChatGLM3` as it will serve; the answers are kept in `answers_<directory>.jsonl`."""
        model = self._generator(tuned)
        scores: dict[str, Scores] = {}
        records: list[dict[str, Any]] = []
        for name, rows in self.sets.items():
            answers = answer_rows(model, rows, language=self.config.language, concurrency=self.evaluation.concurrency)
            scores[name] = score_answers(rows, answers)
            records += [_record(name, row, answer) for row, answer in zip(rows, answers, strict=True)]
        del model
        _make_room()
        self.output.mkdir(parents=True, exist_ok=True)
        write_records(self.output / f"answers_{'base' if tuned is None else tuned.name}.jsonl", records)
        return Measured(scores)

    def score(self, model: Any) -> float:
        """What checkpoints go by: the metric on a part of dev, of the model that is being trained."""
        chat = ChatGLM3.from_model(model, self.base, **self._answering)
        scores = evaluate_rows(chat, self._dev, language=self.config.language, concurrency=self.evaluation.concurrency)
        return counted_mean(scores.by_metric[self.evaluation.metric])

    def train(self, watch: Watch) -> Trained:
        """By `finetune.chatglm3.train`."""

        def observe(event: TrainingEvent) -> None:
            if self._observe is not None:
                self._observe(event)
            if event.loss is not None:
                watch(step=event.step, loss=event.loss, gradient_norm=event.gradient_norm, overflowed=event.skipped)

        result = train(self.config, self.examples, self.base, evaluate=self.score, observe=observe)
        _make_room()
        return Trained(
            steps=result.steps,
            planned_steps=self._steps,
            best_step=result.best_step,
            seconds=result.seconds,
            rows_per_s=result.rows_per_s,
            losses=result.losses,
            scores=result.scores,
        )

    def mix(self, share: float, target: Path) -> None:
        """The adapter scaled, or the weights."""
        candidate = self.output / CANDIDATE
        if self.method != "full":
            write_mixture(cast("Any", None), candidate, share, target)  # an adapter needs no base for it
            return
        mixed = load_causal_model(ModelOptions(candidate, device="cpu", dtype="float32"))
        mix(mixed, load_causal_model(ModelOptions(self.base, device="cpu", dtype="float32")), share)
        shutil.rmtree(target, ignore_errors=True)
        save_model(mixed, target, self.base)

    @property
    def _steps(self) -> int:
        return plan_of(self.config, len(self.examples)).steps

    @property
    def _answering(self) -> dict[str, Any]:
        """How answers are generated for a measurement: the likeliest token always."""
        evaluation = self.config.evaluation
        return {"temperature": 0, "max_new_tokens": evaluation.max_new_tokens, "max_rows": evaluation.concurrency}

    def _generator(self, tuned: Path | None) -> ChatGLM3:
        """The base, or what came of it, with the quantisation it was trained over."""
        adapter = tuned is not None and self.method != "full"
        return ChatGLM3(
            model=str(self.base if tuned is None or adapter else tuned),
            adapter=str(tuned) if adapter else None,
            quantization=serving_quantization(self.config),
            device=self._device,
            dtype=cast("Any", str(self._dtype).removeprefix("torch.")),  # one of the names it knows
            **self._answering,
        )


def read_sets(
    evaluation: GenerationEvaluationConfig,
) -> tuple[dict[str, Sequence[GenerationRow]], dict[str, bool]]:
    """(rows by set as they are measured, dev first; which of the sets are samples).

    Raises:
        ConfigError: there is no dev set, or another one has its name.
        RowsError: lists bad rows.
    """
    if not evaluation.dev:
        raise ConfigError(
            "缺少 evaluation.dev：没有评测数据就无法判断训练是否有效；可写 evaluation.dev=[generation_dev.jsonl]",
            "evaluation.dev is missing: without it nobody knows whether training helps; set evaluation.dev to a list of"
            " files of generation rows",
        )
    if DEV in evaluation.extra:
        raise ConfigError("evaluation.extra 中的评测集不能叫 dev", "no set of evaluation.extra can be called dev")
    sections: Mapping[str, list[Path]] = {DEV: evaluation.dev, **dict(sorted(evaluation.extra.items()))}
    whole = {name: read_generation_rows(paths) for name, paths in sections.items()}
    sets = {name: sampled_rows(rows, evaluation.max_rows, seed=evaluation.seed) for name, rows in whole.items()}
    return sets, {name: len(sets[name]) < len(whole[name]) for name in sets}


def _digest(rows: Sequence[GenerationRow]) -> str:
    content = json.dumps([row.as_dict() for row in rows], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _record(name: str, row: GenerationRow, answer: Answered) -> dict[str, Any]:
    return {"set": name, "answered": answer.result, "refused": answer.refused, **row.as_dict()}


def _make_room() -> None:
    """Let go of the weights of a model that is no longer needed, before the next is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
