"""A whole training run of ChatGLM3, judged on its answers through the chain that serves."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from chains.bge.directory import digest
from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.checkpoints import read_json
from chains.chatglm3.directories import native_directory
from chains.chatglm3.loading import ModelOptions, load_causal_model
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.blend import mix, write_scaled_adapter
from finetune.chatglm3.checks import Hardware, ModelSizes, examine, longest_prompt
from finetune.chatglm3.config import ChatGlm3TrainingConfig, GenerationEvaluationConfig
from finetune.chatglm3.data import read_examples
from finetune.chatglm3.evaluation import (
    Answered,
    GenerationSetReport,
    answer_rows,
    check_askable,
    counted_mean,
    evaluate_rows,
    sampled_rows,
    score_answers,
)
from finetune.chatglm3.model import device_and_dtype, save_model, serving_quantization
from finetune.chatglm3.train import examples_digest, schedule_of, train
from finetune.data.jsonl import write_records
from finetune.data.rows import GenerationRow, read_generation_rows
from finetune.directories import replaced
from finetune.distributed import Processes, joined
from finetune.doctor import Finding, Monitor, in_order
from finetune.evaluation import Scores
from finetune.gate import DEV
from finetune.measurement import Measured
from finetune.memory import available_memory
from finetune.report import SetReport
from finetune.run import Outcome, Task, Teller, run_together, set_sections
from finetune.training_loop import CANDIDATE, Observe, TrainingResult


def finetune_chatglm3(
    config: ChatGlm3TrainingConfig, *, observe: Observe | None = None, tell: Teller | None = None
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
        return run_together(GenerationTask(config, processes, observe=observe, tell=tell), processes)


class GenerationTask(Task):
    """What a run is about: read once, changed by no stage."""

    kind = "chatglm3"
    config: ChatGlm3TrainingConfig
    rows: Sequence[GenerationRow]
    set_report: ClassVar[type[SetReport]] = GenerationSetReport

    def __init__(
        self,
        config: ChatGlm3TrainingConfig,
        processes: Processes | None = None,
        *,
        observe: Observe | None = None,
        tell: Teller | None = None,
    ) -> None:
        """Rows and sets are read here; the model is loaded later."""
        super().__init__(observe=observe, tell=tell)
        self.config, self.method = config, config.method
        self.sets, self.sampled = read_sets(config.evaluation)
        self.rows = read_generation_rows(config.train)
        self.base = native_directory(config.model)
        self._tokenizer = ChatGLM3Tokenizer.from_directory(self.base)
        self.examples = read_examples(
            self.rows, self._tokenizer, max_tokens=config.max_tokens, language=config.language
        )
        self._steps = schedule_of(config, len(self.examples)).steps
        dev = self.sets[DEV]
        choosing = [dev[number] for number in self.dev_parts(len(dev)).choosing]
        self._dev = sampled_rows(choosing, config.evaluation.interval_rows, seed=config.evaluation.seed)
        processes = processes or Processes()
        self._device, self._dtype = device_and_dtype(config, processes.local_rank)
        self._processes = processes.count

    def training(self) -> dict[str, Any]:
        """Settings, rows, base and the questions that choose among the weights."""
        return {
            **self.config.deciding(),
            "dev": _digest(self._dev),
            "rows": examples_digest(self.examples),
            "base": digest(self.base),
        }

    def measuring(self) -> dict[str, Any]:
        """The sets, the prompt's language, how much is answered, and in what numbers."""
        return {
            "sets": {name: _digest(rows) for name, rows in self.sets.items()},
            "language": self.config.language,
            "max_new_tokens": self.config.evaluation.max_new_tokens,
            "quantization": serving_quantization(self.config),
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    def examine(self) -> list[Finding]:
        """Labels, lengths, leaks, sizes and memory."""
        context, language = read_json(self.base / "config.json")["max_position_embeddings"], self.config.language
        asked = [row for rows in self.sets.values() for row in rows]
        memory = available_memory(self._device, self._processes)
        found = examine(
            self.config,
            self.examples,
            self.sets[DEV],
            ModelSizes.of(self.base),
            hardware=Hardware(self._device, self._dtype.itemsize, memory),
            steps=self._steps,
            prompt_tokens=longest_prompt(asked, self._tokenizer, context=context, language=language),
        )
        for name, rows in self.sets.items():
            found += check_askable(name, rows, self._tokenizer, context=context, language=language)
        return in_order(found)

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        """Through `ChatGLM3` as it will serve; the answers are kept in `answers_<directory>.jsonl`."""
        model = self._generator(tuned)
        config = self.config
        scores: dict[str, Scores] = {}
        records: list[dict[str, Any]] = []
        for name, rows in self.sets.items():
            answers = answer_rows(model, rows, language=config.language, concurrency=config.evaluation.concurrency)
            scores[name] = score_answers(rows, answers)
            records += [_record(name, row, answer) for row, answer in zip(rows, answers, strict=True)]
        del model
        _make_room()
        self.output.mkdir(parents=True, exist_ok=True)
        write_records(self.output / f"answers_{'base' if tuned is None else tuned.name}.jsonl", records)
        return Measured(scores)

    def score(self, model: Any) -> float:
        """What checkpoints go by: the metric on the part of dev that chooses, of the model that is being trained."""
        chat = ChatGLM3.from_model(model, self.base, **self._answering)
        language, evaluation = self.config.language, self.config.evaluation
        scores = evaluate_rows(chat, self._dev, language=language, concurrency=evaluation.concurrency)
        return counted_mean(scores.by_metric[evaluation.metric])

    def train(self, observe: Observe, monitor: Monitor | None) -> TrainingResult:
        """By `finetune.chatglm3.train`."""
        dev = _digest(self._dev)
        result = train(
            self.config, self.examples, self.base, evaluate=self.score, observe=observe, monitor=monitor, dev=dev
        )
        _make_room()
        return result

    def mix(self, share: float, target: Path) -> None:
        """The adapter scaled, or the weights."""
        candidate = self.output / CANDIDATE
        if self.method != "full":
            write_scaled_adapter(candidate, share, target)
            return
        mixed = load_causal_model(ModelOptions(candidate, device="cpu", dtype="float32"))
        mix(mixed, load_causal_model(ModelOptions(self.base, device="cpu", dtype="float32")), share)
        with replaced(target) as folder:
            save_model(mixed, folder, self.base)

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
    sections = set_sections(evaluation.dev, evaluation.extra, example="evaluation.dev=[generation_dev.jsonl]")
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
