"""How fast passages and questions are embedded on a CPU: our engines, FlagModel and sentence-transformers.

    python -m benchmarks.embedding_speed                    # bge-base shape, 128 passages; 15 minutes on 2 quiet cores
    python -m benchmarks.embedding_speed --passages 24 --once --only passages         # 4 minutes

The same random weights, the same CMRC passages, the same cut at 512 tokens; each contender has a process of its own
and embeds a few passages before the clock starts. Tokens are those that reach the model, without padding. Cosines are
to sentence-transformers in float32. Every contender runs twice, in turn, its quicker run counts; processor time tells
how much a neighbour on the machine disturbed the clock.

FlagModel (FlagEmbedding 1.4.2) runs as it comes, at batch 256, and with batches of 4, which suit a CPU better. It
computes its first batch twice, the first time to try the memory: up to 256 passages cost it double as it comes, while
batches of 4 make that a fraction. Both ratios are judged by the same bar.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, Report
from benchmarks.material import DATA
from benchmarks.measuring import latency, run_child, serve_child
from benchmarks.random_models import build_bert
from chains.bge.directory import CHINESE_INSTRUCTION
from chains.bge.engines import has_vnni

_OPENVINO = ("openvino", "openvino_int8") if has_vnni() and importlib.util.find_spec("openvino") else ()
ENGINES = ("torch", "onnx_int8", *_OPENVINO)
PEERS = {
    "FlagModel as it comes, batch 256": ("flag", 256),
    "FlagModel, batch 4": ("flag", 4),
    "sentence-transformers": ("st", 32),
}
SPEED_BAR, COSINE_BAR = 5.0, 0.999
LATENCY_BARS_MS = {"base": 25.0, "small": 8.0}  # UER's small is bge-small's shape: 4 layers of 512
QUESTIONS = 40


def cmrc_passages(count: int) -> list[str]:
    """Passages of the CMRC development set, evenly spread over it."""
    texts = column("cmrc2018_dev_passages.jsonl", "text")
    return [texts[round(at)] for at in np.linspace(0, len(texts) - 1, count)]


def column(file: str, key: str) -> list[str]:
    """One key of every row of a data file."""
    with (DATA / file).open(encoding="utf-8") as lines:
        return [json.loads(line)[key] for line in lines]


def embed_with(contender: str, batch: int, model: str, passages: int, output: str) -> dict[str, float]:
    """Seconds and processor seconds for the passages, their vectors written to a file."""
    texts = cmrc_passages(passages)
    function: Any
    if contender == "flag":
        from FlagEmbedding import FlagModel

        peer = FlagModel(model, use_fp16=False, devices="cpu", batch_size=batch)
        function = peer.encode
    elif contender == "st":
        from sentence_transformers import SentenceTransformer

        other = SentenceTransformer(model, device="cpu")
        function = lambda given: other.encode(given, batch_size=batch)  # noqa: E731
    else:
        from chains.bge.embeddings import BGEEmbeddings

        ours = BGEEmbeddings(model, engine=contender)  # type: ignore[arg-type]
        function = ours.embed_documents_array
        assert ours.engine.name.startswith(contender), f"{contender} refused itself"
    function(texts[:2])
    started, spent = time.perf_counter(), time.process_time()
    vectors = function(texts)
    took, spent = time.perf_counter() - started, time.process_time() - spent
    np.save(output, vectors)
    return {"seconds": took, "cpu_s": spent}


def ask_with(engine: str, model: str) -> dict[str, Any]:
    """Milliseconds of one question, median and 95th percentile of the quietest round, and the engine chosen."""
    from chains.bge.embeddings import BGEEmbeddings

    ours = BGEEmbeddings(model, engine=engine)  # type: ignore[arg-type]
    asked = column("cmrc2018_devtest.jsonl", "question")[:QUESTIONS]
    measured = latency(ours.embed_query, asked)
    tokens = [len(ids) for ids in ours.tokenizer.encode([ours.query_instruction + question for question in asked], 512)]
    return {"engine": ours.engine.name, "tokens": sum(tokens) / len(tokens), "p50": measured.p50, "p95": measured.p95}


TASKS = {"embed": embed_with, "ask": ask_with}


def measure_passages(report: Report, model: Path, passages: int, scratch: Path, rounds: int) -> None:
    """Every contender in turn, the whole turn repeated."""
    from chains.bge.directory import read_model_directory
    from chains.bge.tokenizer import BgeTokenizer

    directory = read_model_directory(model)
    ids = BgeTokenizer.from_directory(directory).encode(cmrc_passages(passages), directory.max_tokens)
    tokens = sum(map(len, ids))
    contenders = PEERS | {engine: (engine, 0) for engine in ENGINES}
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, (contender, batch) in contenders.items():
            arguments = {"contender": contender, "batch": batch, "model": model, "passages": passages}
            run = run_child("benchmarks.embedding_speed", "embed", **arguments, output=scratch / f"{name}.npy")
            figures = run.result | {"peak_mb": run.peak_mb}
            print(f"{name}: {figures['seconds']:.1f} s", flush=True)
            if name not in best or figures["seconds"] < best[name]["seconds"]:
                best[name] = figures
    reference = np.load(scratch / "sentence-transformers.npy")
    flags = [name for name in PEERS if name.startswith("FlagModel")]
    quickest = 0.0
    for name, figures in best.items():
        cosine = float((np.load(scratch / f"{name}.npy") * reference).sum(axis=1).min())
        speed = tokens / figures["seconds"]
        if name in ENGINES and cosine >= COSINE_BAR:
            quickest = max(quickest, speed)
        ratios = {f"to_{flag}": best[flag]["seconds"] / figures["seconds"] for flag in flags}
        row = {"tokens_s": speed, **ratios, "tokens_cpu_s": tokens / figures["cpu_s"], "peak_mb": figures["peak_mb"]}
        report.add(f"passages: {passages}, {tokens} tokens", contender=name, **row, min_cosine=cosine)
    for flag in flags:
        ratio = quickest * best[flag]["seconds"] / tokens
        report.bar(f"fastest engine, times {flag}", ratio, SPEED_BAR, "x", at_least=True)


def measure_questions(report: Report, models: dict[str, Path]) -> None:
    """One question after another, by every engine."""
    for shape, model in models.items():
        quickest = float("inf")
        for engine in ENGINES:
            figures = run_child("benchmarks.embedding_speed", "ask", engine=engine, model=model).result
            report.add("one question, ms", shape=shape, **figures)
            quickest = min(quickest, figures["p50"])
        report.bar(f"one question, bge-{shape} shape, median", quickest, LATENCY_BARS_MS[shape], "ms")


def main(arguments: list[str]) -> None:
    """Measure and report."""
    if serve_child(arguments, TASKS):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=128)
    parser.add_argument("--once", action="store_true", help="each contender once instead of twice")
    parser.add_argument("--only", choices=["questions", "passages"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    sizes = {"passages": options.passages, "once": options.once, "only": options.only}
    with tempfile.TemporaryDirectory() as folder, Report("embedding_speed", sizes, options.results) as report:
        scratch = Path(folder)
        models = {
            shape: build_bert(scratch / shape, shape, pooling="cls", max_tokens=512, instruction=CHINESE_INSTRUCTION)
            for shape in LATENCY_BARS_MS
        }
        if options.only != "passages":
            measure_questions(report, models)
        if options.only != "questions":
            measure_passages(report, models["base"], options.passages, scratch, 1 if options.once else 2)


if __name__ == "__main__":
    main(sys.argv[1:])
