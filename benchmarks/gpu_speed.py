"""BGE on a GPU: passages embedded and training steps, us and our peers in one process, with the share of the peak.

    python -m benchmarks.gpu_speed                         # bge-base and bge-large shapes; 4 minutes on an H100
    python -m benchmarks.gpu_speed --shapes base --only passages

The same random weights, the same CMRC and medical passages, the same cut at 512 tokens, every contender in 16 bits as
its users run it: FlagModel with `use_fp16` and its batch of 256, sentence-transformers in float16 with batches of 32
(as it comes) and 256. Cosines are to sentence-transformers in float32. Training: FlagEmbedding's runner in bfloat16
against ours, as `training_speed` compares them on a CPU; both keep dropout, neither recomputes layers.

The peak is what a large product of 16-bit matrices reaches on the same card in the same run. Work is counted from the
tokens that are there, padding and work that an engine saves itself not: 2 operations per weight of a layer and token,
4 x width x length for its attention; three times that for a training step. The vectors of a step, the embeddings and
the optimizer are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import training_speed
from benchmarks.embedding_speed import column
from benchmarks.machine import RESULTS, Report
from benchmarks.random_models import build_bert
from chains.bge.directory import CHINESE_INSTRUCTION

FILES = ("cmrc2018_dev", "cmrc2018_trial", "cmrc2018_cluetest", "medfaq_train")
LAYERS = {"base": 12, "large": 24}
WIDTHS = {"base": 768, "large": 1024}
TRAINED_ROWS = {"base": 64, "large": 32}  # what FlagEmbedding's whole graph leaves room for on 80 GB
GROUP = 8
COMPARED = 1_000  # passages whose vectors are compared with float32
DEVICE = "cuda:0"


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass."""

    shape: str

    def of(self, lengths: Sequence[int]) -> float:
        """For texts of these lengths, in operations."""
        layers, width = LAYERS[self.shape], WIDTHS[self.shape]
        weights = 12 * width**2  # four square matrices, two of four times the width
        return sum(layers * length * (2 * weights + 4 * width * length) for length in lengths)


def peaks(report: Report) -> float:
    """Operations and bytes per second that this card reaches, noted; returns the operations."""
    import torch

    size = 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.float16) for _ in range(2))
    product = 2 * size**3 / _median_seconds(lambda: left @ right)
    block = torch.empty(2 << 30, dtype=torch.int8, device=DEVICE)
    moved = 2 * block.numel() / _median_seconds(block.clone)
    name = torch.cuda.get_device_name(DEVICE)
    report.add("card", name=name, fp16_tflops=product / 1e12, copy_gb_s=moved / 1e9, torch=torch.__version__)
    return product


def _median_seconds(function: Callable[[], object], repeats: int = 20) -> float:
    import torch

    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))


def flag_model(model: Path) -> Callable[[list[str]], Any]:
    """FlagModel as it comes: batches of 256."""
    from FlagEmbedding import FlagModel

    encode: Callable[[list[str]], Any] = FlagModel(str(model), use_fp16=True, devices=DEVICE).encode
    return encode


def sentence_transformers(model: Path, batch: int) -> Callable[[list[str]], Any]:
    """SentenceTransformer in float16."""
    from sentence_transformers import SentenceTransformer

    half = SentenceTransformer(str(model), device=DEVICE).half()
    return lambda texts: half.encode(texts, batch_size=batch)


def ours(model: Path) -> Callable[[list[str]], Any]:
    """BGEEmbeddings as it comes."""
    from chains.bge.embeddings import BGEEmbeddings

    embeddings = BGEEmbeddings(model, device=DEVICE)
    print(f"engine: {embeddings.engine.name}")
    return embeddings.embed_documents_array


CONTENDERS: dict[str, Callable[[Path], Callable[[list[str]], Any]]] = {
    "FlagModel, fp16, batch 256": flag_model,
    "sentence-transformers, fp16, batch 32": lambda model: sentence_transformers(model, 32),
    "sentence-transformers, fp16, batch 256": lambda model: sentence_transformers(model, 256),
    "ours": ours,
}


def measure_passages(report: Report, shape: str, model: Path, peak: float) -> None:
    """Every contender over all passages."""
    import torch
    from sentence_transformers import SentenceTransformer

    from chains.bge.directory import read_model_directory
    from chains.bge.tokenizer import BgeTokenizer

    texts = [text for file in FILES for text in column(f"{file}_passages.jsonl", "text")]
    directory = read_model_directory(model)
    lengths = list(map(len, BgeTokenizer.from_directory(directory).encode(texts, directory.max_tokens)))
    compared = texts[:: len(texts) // COMPARED]
    exact = SentenceTransformer(str(model), device=DEVICE).encode(compared, batch_size=64)
    speeds: dict[str, float] = {}
    for name, opened in CONTENDERS.items():
        function = opened(model)
        function(texts[:300])
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        vectors = function(texts)
        took = time.perf_counter() - started
        speeds[name] = sum(lengths) / took
        cosines = (np.asarray(vectors, np.float32)[:: len(texts) // COMPARED] * exact).sum(axis=1)
        report.add(
            f"passages, bge-{shape} shape: {len(texts)}, {sum(lengths)} tokens",
            contender=name,
            seconds=took,
            tokens_s=speeds[name],
            to_flag=speeds[name] / next(iter(speeds.values())),
            tflops=Work(shape).of(lengths) / took / 1e12,
            share_of_peak=Work(shape).of(lengths) / took / peak,
            gpu_peak_mb=torch.cuda.max_memory_allocated() / 1e6,
            min_cosine=float(cosines.min()),
        )


def measure_training(report: Report, shape: str, model: Path, peak: float, scratch: Path, steps: int) -> None:
    """FlagEmbedding's runner and ours over the same rows."""
    import torch

    rows = training_speed.write_training_rows(scratch / f"rows-{shape}.jsonl", group=GROUP)
    batch = TRAINED_ROWS[shape]
    work = 3 * Work(shape).of(_lengths_of_rows(model, rows, batch * steps)) / steps
    common = {"model": str(model), "rows": str(rows), "batch": batch, "steps": steps, "device": DEVICE, "group": GROUP}

    def our_run(name: str, **settings: Any) -> dict[str, Any]:
        return training_speed.ours(output=str(scratch / name), settings=settings, **common)

    def theirs() -> dict[str, Any]:
        return training_speed.flag_embedding(output=str(scratch / f"flag-{shape}"), **common)

    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "FlagEmbedding, bf16": theirs,
        "ours, bf16": lambda: our_run(f"ours-{shape}"),
        "ours, bf16, no dropout": lambda: our_run(f"dry-{shape}", dropout=0.0),
    }
    first = 0.0
    for name, task in tasks.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with noting_failures(report, name):
            found = task()
            first = first or found["rows_per_s"]
            report.add(
                f"training, bge-{shape} shape: batch {batch} x group {GROUP}, {steps} steps",
                who=name,
                rows_per_s=found["rows_per_s"],
                to_theirs=found["rows_per_s"] / first,
                tflops=work * found["rows_per_s"] / batch / 1e12,
                share_of_peak=work * found["rows_per_s"] / batch / peak,
                gpu_peak_mb=torch.cuda.max_memory_allocated() / 1e6,
                last_loss=found["loss"],
            )


def _lengths_of_rows(model: Path, path: Path, count: int) -> list[int]:
    """Tokens of every query and passage of the first rows, as both contenders cut them."""
    from chains.bge.directory import read_model_directory
    from chains.bge.tokenizer import BgeTokenizer
    from finetune.data.rows import read_retrieval_rows

    tokenizer = BgeTokenizer.from_directory(read_model_directory(model))
    rows = read_retrieval_rows([path])[:count]
    queries = tokenizer.encode([CHINESE_INSTRUCTION + row.query for row in rows], training_speed.QUERY_TOKENS)
    passages = [text for row in rows for text in (*row.pos, *row.neg)][: len(rows) * GROUP]
    return [len(ids) for ids in (*queries, *tokenizer.encode(passages, training_speed.PASSAGE_TOKENS))]


@contextlib.contextmanager
def noting_failures(report: Report, what: str) -> Iterator[None]:
    """A contender that fails, for want of memory say, is a line of the report, and the others go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 whatever ended it is told
        report.add("failures", what=what, error=f"{type(error).__name__}: {error}"[:400])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["base", "large"], choices=list(LAYERS))
    parser.add_argument("--only", choices=["passages", "training"], default=None)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    sizes = {"shapes": options.shapes, "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder, Report("gpu_speed", sizes, options.results) as report:
        scratch = Path(folder)
        peak = peaks(report)
        models = {
            shape: build_bert(scratch / shape, shape, pooling="cls", max_tokens=512, instruction=CHINESE_INSTRUCTION)
            for shape in options.shapes
        }
        for shape, model in models.items():
            if options.only != "training":
                with noting_failures(report, f"passages, {shape}"):
                    measure_passages(report, shape, model, peak)
            if options.only != "passages":
                measure_training(report, shape, model, peak, scratch, options.steps)


if __name__ == "__main__":
    main()
