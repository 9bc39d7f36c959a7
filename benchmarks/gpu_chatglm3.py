"""ChatGLM3-6B on a GPU, with random weights in its full shape: training with QLoRA and LoRA, and serving.

    python -m benchmarks.gpu_chatglm3 --work DIR      # 13 GB of disk; 3 minutes on an H100

Rows are RAG-shaped (`packing_speed`), packed into passes of 2,048 tokens, layers recomputed, as the configs in
`finetune/configs` have it; real tokens per second, the first step left out, and the peak of GPU memory. The share of
the peak counts 6 operations per weight and token for the frozen layers, whose own gradients are not needed, and not
what checkpointing computes twice. Served: as many users as asked for, each with a prompt of its own, tokens of the
answers per second, and seconds to the first.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation_speed import Served, prompts, tokenizer
from benchmarks.gpu_speed import DEVICE, noting_failures, peaks
from benchmarks.machine import RESULTS, Report
from benchmarks.packing_speed import rag_rows
from chains.chatglm3.settings import generation_config, native_config
from chains.chatglm3.tokenizer import write_tokenizer

# config.json of THUDM/chatglm3-6b, what decides its size
SETTINGS: dict[str, Any] = {
    "model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32,
    "multi_query_group_num": 2, "kv_channels": 128, "ffn_hidden_size": 13696, "padded_vocab_size": 65024,
    "seq_length": 8192, "layernorm_epsilon": 1e-5, "attention_dropout": 0.0, "torch_dtype": "float16",
}  # fmt: skip
TOKENS = 2_048  # of a packed pass: what the configs have
ROWS = 16  # of a step, as in the configs
USERS = (1, 4, 16)
ANSWER = 128


def build_model(target: Path) -> Path:
    """Write a native directory of random 16-bit weights, made on the GPU."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    vocabulary = tokenizer()
    config = native_config(SETTINGS, pieces=len(vocabulary.pieces), where="benchmark")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            torch.manual_seed(0)
            model = GlmForCausalLM(GlmConfig(**config))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # bytes and special tokens are never the likeliest: each token is a text
        han = slice(len(vocabulary.pieces) - 4000, len(vocabulary.pieces))
        kept = model.lm_head.weight[han].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[han] = kept
    model.save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps(generation_config(config)), encoding="utf-8")
    write_tokenizer(vocabulary, target, context=SETTINGS["seq_length"], where="benchmark")
    return target


def measure_training(report: Report, model: Path, work: Path, peak: float, method: str, steps: int) -> None:
    """Steps of packed rows with an adapter."""
    import torch

    from chains.chatglm3.prompt import ChatGLM3Tokenizer
    from finetune.chatglm3.batches import answer_loss, packed, plan
    from finetune.chatglm3.config import ChatGlm3TrainingConfig
    from finetune.chatglm3.data import read_examples
    from finetune.chatglm3.model import device_and_dtype, training_model

    settings = {"model": str(model), "output": str(work / "run"), "train": ["rows.jsonl"], "method": method}
    config = ChatGlm3TrainingConfig.from_dict(
        settings | {"device": DEVICE, "lora": {"rank": 16, "dropout": 0.05}}, where="benchmark"
    )
    rows = rag_rows(ROWS * steps, seed=0)
    examples = read_examples(rows, ChatGLM3Tokenizer.from_directory(model), max_tokens=2048, language="zh")
    device, dtype = device_and_dtype(config)
    started = time.perf_counter()
    network = training_model(config, model, device, dtype)
    loading = time.perf_counter() - started
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-4)
    torch.cuda.reset_peak_memory_stats()
    seconds, tokens, losses = 0.0, 0, []
    for step in range(steps):
        batch = examples[step * ROWS : (step + 1) * ROWS]
        lengths = [len(example.ids) for example in batch]
        torch.cuda.synchronize()
        began, total = time.perf_counter(), 0.0
        for part in plan(lengths, batching="packed", capacity=TOKENS):
            with torch.autocast("cuda", dtype=dtype):
                loss = answer_loss(network, packed([batch[index] for index in part], device))
                loss = loss / sum(example.learned for example in batch)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        torch.cuda.synchronize()
        if step:
            seconds, tokens = seconds + time.perf_counter() - began, tokens + sum(lengths)
    report.add(
        "training",
        method=method,
        tokens_s=tokens / seconds,
        rows_s=ROWS * (steps - 1) / seconds,
        share_of_peak=4 * 5.711e9 * tokens / seconds / peak,  # forward, and the gradient of the states
        gpu_peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        loading_s=loading,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def measure_serving(report: Report, model: Path, quantization: str) -> None:
    """Answers of ANSWER tokens to several users at once."""
    import torch

    from chains.chatglm3.chat_model import ChatGLM3

    served = ChatGLM3(model=str(model), device=DEVICE, quantization=quantization, max_new_tokens=ANSWER, temperature=0)
    for users in USERS:
        served.invoke(prompts(1)[0][:50])
        torch.cuda.reset_peak_memory_stats()
        seconds, first = Served(served).run(prompts(users))
        report.add(
            "serving",
            quantization=quantization,
            users=users,
            tokens_s=users * ANSWER / seconds,
            first_text_s=sum(first) / users,
            gpu_peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, train, serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="keeps the model of 13 GB")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    work = options.work or Path(tempfile.mkdtemp())
    try:
        with Report("gpu_chatglm3", {"steps": options.steps}, options.results) as report:
            import torch

            peak = peaks(report)
            started = time.perf_counter()
            model = work / "model"
            if not (model / "config.json").is_file():
                build_model(model)
            report.add("build", seconds=time.perf_counter() - started)
            for method in ("qlora", "lora"):
                gc.collect()
                torch.cuda.empty_cache()
                with noting_failures(report, method):
                    measure_training(report, model, work, peak, method, options.steps)
            for quantization in ("none", "nf4"):
                gc.collect()
                torch.cuda.empty_cache()
                with noting_failures(report, f"serving, {quantization}"):
                    measure_serving(report, model, quantization)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
