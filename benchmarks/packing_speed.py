"""QLoRA on RAG-shaped rows: packed end to end against padded batches of 8, in one run; real tokens/s, memory, loss.

    python -m benchmarks.packing_speed                           # a small Glm on a CPU
    python -m benchmarks.packing_speed --device cuda --sizes 6b  # the full 6B shape with random weights

Every way trains the same rows in the same steps from the same weights, so that losses can be compared step by step;
`padded` takes 8 rows at a time as they come, as training scripts do, `grouped` pads batches of like lengths. Each way
runs in a process of its own, in turn, so that peaks of memory are its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, Report

WAYS = ("padded", "grouped", "packed")
BAR, AIM = 1.5, 2.0
SIZES = {"small": {"hidden": 256, "layers": 4, "heads": 8}, "6b": {"hidden": 4096, "layers": 28, "heads": 32}}
_LENGTHS = (40, 900)  # characters of references together: short facts to several passages


def main() -> None:
    """Each way in turn, several times; the best of each counts."""
    options = _options()
    if options.way:
        print(json.dumps(_measure(options, options.way, options.work)))
        return
    with tempfile.TemporaryDirectory() as folder, Report("packing_speed", _shown(options), options.results) as report:
        _prepare(options, Path(folder))
        best: dict[str, dict[str, Any]] = {}
        for turn in range(options.turns):
            for way in WAYS:
                found = _in_process(options, way, Path(folder))
                report.add("runs", turn=turn + 1, way=way, **found)
                if way not in best or found["tokens_per_s"] > best[way]["tokens_per_s"]:
                    best[way] = found
        for way in WAYS:
            report.add("best", way=way, ratio=best[way]["tokens_per_s"] / best["padded"]["tokens_per_s"], **best[way])
        ratio = best["packed"]["tokens_per_s"] / best["padded"]["tokens_per_s"]
        report.bar("packed against padded batches of 8, real tokens/s", ratio, BAR, "x", at_least=True)
        apart = abs(best["packed"]["last_loss"] - best["padded"]["last_loss"])
        report.bar("last loss, packed against padded", apart, 1e-2, "apart")


def _prepare(options: argparse.Namespace, folder: Path) -> None:
    """The model and the rows, read by every way."""
    from finetune.chatglm3.copy_task import build_tiny_model
    from finetune.data.rows import write_rows

    rows = rag_rows(options.batch * options.steps, seed=0)
    texts = [text for row in rows for text in (row.question, row.answer, *row.references)]
    build_tiny_model(folder / "model", texts=texts, context=2048, **SIZES[options.sizes])
    write_rows(folder / "rows.jsonl", rows)


def rag_rows(count: int, *, seed: int) -> list[Any]:
    """Rows of mixed lengths: a short question, references of 40 to 900 characters together, an answer of 10 to 80."""
    from finetune.data.rows import GenerationRow

    draw = random.Random(seed)
    letters = [chr(0x4E00 + 20 * number) for number in range(400)]

    def text(length: int) -> str:
        return "".join(draw.choices(letters, k=length))

    rows = []
    for _ in range(count):
        length = round(_LENGTHS[0] * (_LENGTHS[1] / _LENGTHS[0]) ** draw.random())  # many short, few long
        parts = draw.randint(1, 5)
        references = tuple(text(max(5, length // parts)) for _ in range(parts))
        rows.append(GenerationRow(f"{text(12)}？", references, f"{text(draw.randint(10, 80))}[1]"))
    return rows


def _in_process(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.packing_speed", "--way", way, "--work", str(folder)]
    for name in ("steps", "batch", "threads", "tokens", "device", "sizes"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _measure(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """One way, in this process."""
    import torch

    from chains.chatglm3.prompt import ChatGLM3Tokenizer
    from chains.chatglm3.settings import PAD_ID
    from finetune.chatglm3.batches import answer_loss, packed, padded, plan
    from finetune.chatglm3.data import read_examples
    from finetune.chatglm3.model import device_and_dtype, training_model
    from finetune.data.rows import read_generation_rows

    torch.set_num_threads(options.threads)
    config = _config(options, folder)
    tokenizer = ChatGLM3Tokenizer.from_directory(folder / "model")
    rows = read_generation_rows([folder / "rows.jsonl"])
    examples = read_examples(rows, tokenizer, max_tokens=config.max_tokens, language="zh")
    device, dtype = device_and_dtype(config)
    model = training_model(config, folder / "model", device, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    seconds, tokens, positions, losses = 0.0, 0, 0, []
    for step in range(options.steps):
        batch = examples[step * options.batch : (step + 1) * options.batch]
        lengths = [len(example.ids) for example in batch]
        if way == "padded":
            parts = [list(range(start, min(start + 8, len(batch)))) for start in range(0, len(batch), 8)]
        else:
            parts = plan(lengths, batching=way, capacity=options.tokens)  # type: ignore[arg-type]
        learned = sum(example.learned for example in batch)
        began, total = time.perf_counter(), 0.0
        for part in parts:
            chosen = [batch[index] for index in part]
            piece = packed(chosen, device) if way == "packed" else padded(chosen, device, pad_id=PAD_ID)
            with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32):
                loss = answer_loss(model, piece) / learned
            loss.backward()
            total += float(loss.detach())
            positions += piece.input_ids.numel() if step else 0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if step:  # the first warms up
            seconds, tokens = seconds + time.perf_counter() - began, tokens + sum(lengths)
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _peak()
    return {
        "tokens_per_s": tokens / seconds,
        "real_share": tokens / positions,
        "peak_gb": peak / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "longest": max(len(example.ids) for example in examples),
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _config(options: argparse.Namespace, folder: Path) -> Any:
    from finetune.chatglm3.config import ChatGlm3TrainingConfig

    return ChatGlm3TrainingConfig.from_dict(
        {
            "model": str(folder / "model"),
            "output": str(folder / "run"),
            "train": [str(folder / "rows.jsonl")],
            "method": "qlora",
            "lora": {"dropout": 0.0},
            "max_tokens": options.tokens,
            "device": options.device,
        },
        where="benchmark",
    )


def _shown(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is measured."""
    return {name: value for name, value in vars(options).items() if name not in ("results", "work", "way")}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="positions of a packed or grouped forward pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", choices=SIZES, default="small")
    parser.add_argument("--way", choices=WAYS, help="measure this one here and print it as JSON")
    parser.add_argument("--work", type=Path, help="folder that holds model and rows, with --way")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
