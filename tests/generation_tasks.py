"""Trainings of tiny generators that run in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.copy_task import copy_rows
from finetune.chatglm3.data import Example, read_examples


def make_examples(model: Path, count: int) -> list[Example]:
    """Examples of rows of different lengths."""
    tokenizer = ChatGLM3Tokenizer.from_directory(model)
    return read_examples(copy_rows(count, seed=6, references=(1, 4)), tokenizer, max_tokens=100, language="zh")


def generation_config(model: Path, output: Path, **settings: Any) -> ChatGlm3TrainingConfig:
    """Four steps of four rows in float32 on a CPU, unless told otherwise."""
    given = {
        "model": str(model), "output": output, "train": ["rows.jsonl"], "method": "lora", "batch_size": 4,
        "max_steps": 4, "learning_rate": 1e-3, "max_tokens": 100, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return ChatGlm3TrainingConfig.model_validate({**given, **settings})


def train_generator(model: Path, output: Path, settings: dict[str, Any], rows: int) -> None:
    """Train; the first process writes the losses."""
    from finetune.chatglm3.train import train

    result = train(generation_config(model, output, **settings), make_examples(model, rows), model)
    if os.environ.get("RANK", "0") == "0":
        (output / "losses.json").write_text(json.dumps(result.losses), encoding="utf-8")


def finetune_generator(model: Path, output: Path, settings: dict[str, Any], rows: Path, kill_at: int = 0) -> None:
    """A whole run of `finetune chatglm3`; each step done is a line of `steps.txt`. SIGKILL after step `kill_at`."""
    from finetune.chatglm3.run import finetune_chatglm3
    from finetune.training_loop import TrainingEvent

    def observe(event: TrainingEvent) -> None:
        if event.loss is None:
            return
        with (output / "steps.txt").open("a", encoding="utf-8") as file:
            file.write(f"{event.step}\n")
        if event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    output.mkdir(exist_ok=True)
    given = {"train": [rows], "evaluation": {"dev": [rows], "every_steps": 4, "max_new_tokens": 4}}
    finetune_chatglm3(generation_config(model, output, **given, **settings), observe=observe)
