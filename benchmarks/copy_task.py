"""A tiny ChatGLM3 trained from random weights to find, quote and cite the right reference, and to refuse.

    python -m benchmarks.copy_task                     # minutes on one CPU core
    python -m benchmarks.copy_task --work DIR          # a run that was broken off there goes on

The task is `finetune.chatglm3.copy_task`: rows, prompt, labels, trainer, generation, parsing of citations and metrics
are the project's own, nothing is stubbed. Held-out rows ask for facts that no training row has. All weights are random
but the biases by which the first layer begins with its neighbours in sight.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import RESULTS, Report
from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.copy_task import build_tiny_model, copy_rows
from finetune.chatglm3.data import read_examples
from finetune.chatglm3.evaluation import evaluate_rows, means
from finetune.chatglm3.train import train

BAR = 0.95
_ROWS: dict[str, Any] = {"references": (1, 4), "asked": 3, "refusals": 0.35}
_MAX_TOKENS = 64


def main() -> None:
    """Train, answer, judge."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, Report("copy_task", _shown(options), options.results) as report:
        work = options.work or Path(folder)
        base = work / "base"
        if not (base / "tokenizer.json").is_file():
            build_tiny_model(base, hidden=options.hidden, layers=options.layers, context=256)
        rows = copy_rows(options.rows, seed=1, **_ROWS)
        tokenizer = ChatGLM3Tokenizer.from_directory(base)
        examples = read_examples(rows, tokenizer, max_tokens=_MAX_TOKENS, language="zh")
        started = time.perf_counter()
        trained = train(_config(options, base, work), examples, base)
        for step in range(0, len(trained.losses), max(1, len(trained.losses) // 10)):
            report.add("training", step=step + 1, loss=trained.losses[step])
        report.add(
            "training", step=trained.steps, loss=trained.losses[-1], rows_per_s=trained.rows_per_s,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(trained.candidate).eval()
        chat = ChatGLM3.from_model(model, base, temperature=0, max_new_tokens=24)
        for name, held_out in (("as trained on", False), ("held out", True)):
            asked = copy_rows(options.questions, seed=2, held_out=held_out, **_ROWS)
            found = means(evaluate_rows(chat, asked, language="zh", concurrency=16))
            report.add("answers", rows=name, questions=len(asked), **found)
        for metric in ("exact_match", "citation_precision", "citation_recall", "refusal_precision", "refusal_recall"):
            report.bar(f"{metric} on held-out rows", found[metric], BAR, "", at_least=True)


def _config(options: argparse.Namespace, base: Path, work: Path) -> ChatGlm3TrainingConfig:
    return ChatGlm3TrainingConfig(
        model=str(base),
        output=work / "run",
        train=[Path("copy_task")],
        method="full",
        max_steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.rate,
        warmup_share=0.02,
        max_tokens=_MAX_TOKENS,
        micro_batch_tokens=4096,
        batching="grouped",
        gradient_checkpointing=False,
        checkpoint_steps=250,
        dtype="float32",
        device="cpu",
    )


def _shown(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is measured."""
    return {name: value for name, value in vars(options).items() if name not in ("results", "work", "way")}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
