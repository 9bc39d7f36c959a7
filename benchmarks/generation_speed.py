"""ChatGLM3 as served against bare `model.generate`, what the chain adds, and what a conversion takes.

    python -m benchmarks.generation_speed
    python -m benchmarks.generation_speed --users 1 4 --hidden 256 --results DIR

Random weights, in the shape of ChatGLM3 and of the size asked for; every user has a prompt of another length. `one by
one` is what a wrapper around `model.generate` with a lock does: the next user waits for the last. `static batch` is
`generate` over all prompts at once, padded: the fastest that can be had, but nobody sees anything before the end. Chain
overhead is `invoke` of the whole chain over a retriever and a model that answer at once. Conversion runs in a process
of its own, over shards of random numbers; its memory is what it takes beyond one that has only imported torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.retrievers import BaseRetriever

from benchmarks.machine import RESULTS, Report
from benchmarks.measuring import latency, run_child, serve_child
from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.settings import generation_config, native_config
from chains.chatglm3.tokenizer import Piece, SentencePieceModel, write_tokenizer
from chains.chatglm3.weights import original_shapes

USERS = (1, 4, 16)
PROMPT, ANSWER = 200, 32  # tokens, about
CHAIN_BAR_MS = 5.0
OVERHEAD_BAR = 1.15  # of bare generate's time, for one user
SHARDS, SHARD_MB = 6, 64
_CONTEXT = 1024
_HAN = [chr(0x4E00 + place) for place in range(4000)]


def settings(hidden: int, layers: int) -> dict[str, Any]:
    """An original config.json of that size."""
    return {
        "model_type": "chatglm", "num_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64,
        "multi_query_group_num": 2, "kv_channels": 64, "ffn_hidden_size": hidden * 3, "padded_vocab_size": 4352,
        "seq_length": _CONTEXT, "layernorm_epsilon": 1e-5, "attention_dropout": 0.0, "torch_dtype": "float32",
    }  # fmt: skip


def tokenizer() -> SentencePieceModel:
    """Bytes and 4,000 Han characters, no merges."""
    texts = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    texts += [("▁", 1), *((character, 1) for character in _HAN)]
    pieces = [Piece(text, -float(place), kind) for place, (text, kind) in enumerate(texts)]
    return SentencePieceModel(pieces, 2, True, b"", True, False, True)


def build_model(target: Path, hidden: int, layers: int) -> Path:
    """Write a native directory of random weights, which say nothing but Han characters: each token is a text."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    vocabulary = tokenizer()
    pieces = len(vocabulary.pieces)
    config = native_config(settings(hidden, layers), pieces=pieces, where="benchmark")
    torch.manual_seed(0)
    model = GlmForCausalLM(GlmConfig(**config))
    with torch.no_grad():  # bytes and special tokens: a logit of 0 is never the highest of thousands
        model.lm_head.weight[: pieces - len(_HAN)] = 0
        model.lm_head.weight[pieces:] = 0
    model.save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps(generation_config(config)), encoding="utf-8")
    write_tokenizer(vocabulary, target, context=_CONTEXT, where="benchmark")
    return target


def prompts(users: int) -> list[str]:
    """A text for each user, of 75 to 125 % of PROMPT characters, which are tokens here."""
    lengths = [int(PROMPT * (0.75 + 0.5 * user / max(1, users - 1))) for user in range(users)]
    return ["".join(_HAN[(user * 37 + place * 11) % len(_HAN)] for place in range(n)) for user, n in enumerate(lengths)]


class Served:
    """Streams of `ChatGLM3`, one thread a user."""

    def __init__(self, model: ChatGLM3) -> None:
        self._model = model

    def run(self, texts: list[str]) -> tuple[float, list[float]]:
        """(seconds for all, seconds to the first text of each)."""
        first = [0.0] * len(texts)
        started = time.perf_counter()

        def read(user: int) -> None:
            for chunk in self._model.stream(texts[user]):
                if chunk.text and not first[user]:
                    first[user] = time.perf_counter() - started

        threads = [threading.Thread(target=read, args=(user,)) for user in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started, first


class Bare:
    """`model.generate` on the same weights."""

    def __init__(self, model: ChatGLM3) -> None:
        runtime = model._loaded()
        self._model, self._format = runtime.engine._model, runtime.format

    def one_by_one(self, texts: list[str]) -> tuple[float, list[float]]:
        """(seconds for all, seconds to the end of each): a user sees the answer when it is done."""
        started, ends = time.perf_counter(), []
        for text in texts:
            self._generate([text])
            ends.append(time.perf_counter() - started)
        return ends[-1], ends

    def static_batch(self, texts: list[str]) -> tuple[float, list[float]]:
        """(seconds for all, the same for each)."""
        started = time.perf_counter()
        self._generate(texts)
        took = time.perf_counter() - started
        return took, [took] * len(texts)

    def _generate(self, texts: list[str]) -> None:
        import torch
        from langchain_core.messages import HumanMessage

        rows = [self._format.prompt([HumanMessage(text)], ()) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self._model.generate(ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)


def compare(report: Report, directory: Path, users: list[int]) -> None:
    """Time to the first token and tokens a second, the ways in turn."""
    model = ChatGLM3(
        model=str(directory), device="cpu", dtype="float32", temperature=0, max_new_tokens=ANSWER, max_rows=max(users)
    )
    engine = model._loaded().engine
    engine._stop_ids = frozenset()  # random weights would stop anywhere; everyone gets ANSWER tokens
    served, bare = Served(model), Bare(model)
    served.run(prompts(2))
    bare.static_batch(prompts(2))
    for count in users:
        texts = prompts(count)
        seconds = {}
        ways = {
            "ChatGLM3": served.run,
            "generate, one by one": bare.one_by_one,
            "generate, static batch": bare.static_batch,
        }
        for way, run in ways.items():
            took, first = min((run(texts) for _ in range(2)), key=lambda measured: measured[0])
            seconds[way] = took
            report.add(
                f"{count} users, prompts of about {PROMPT} tokens, answers of {ANSWER}",
                way=way,
                seconds=took,
                tokens_s=count * ANSWER / took,
                first_text_mean_s=statistics.mean(first),
                first_text_last_s=max(first),
            )
        ratio = seconds["generate, one by one"] / seconds["ChatGLM3"]
        if count == 1:
            report.bar("time of one user against generate", 1 / ratio, OVERHEAD_BAR, "x")
        else:
            report.bar(f"throughput of {count} users against one by one", ratio, 1.0, "x", at_least=True)


class Ready(BaseRetriever):
    """Has five passages at hand."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return self.documents


def chain_overhead(report: Report) -> None:
    """Milliseconds of the chain over parts that take no time."""
    from chains import build_retrieval_qa
    from chains.config import RagConfig

    text = "第{}条规定，入职满一年的员工每年享有十天带薪年假，年假须在当年十二月三十一日前休完。"
    passages = [
        Document(page_content=text.format(n) * 5, metadata={"source": f"{n}.txt", "start": 0}) for n in range(1, 6)
    ]
    answer = "员工每年享有十天带薪年假。[1] 年假须在当年十二月三十一日前休完。[2][3]"
    model = FakeListChatModel(responses=[answer])
    qa = build_retrieval_qa(RagConfig(), retriever=Ready(documents=passages), llm=model)
    questions = [f"年假有几天？{n}" for n in range(50)]
    parts = {"all": qa.invoke, "the model's own stream": lambda question: list(model.stream(question))}
    measured = {part: latency(call, questions) for part, call in parts.items()}
    for part, call in parts.items():
        spent = time.process_time()
        for question in questions:
            call(question)
        cpu = 1e3 * (time.process_time() - spent) / len(questions)  # hardly depends on what else the machine does
        report.add("chain, five passages", part=part, p50_ms=measured[part].p50, p95_ms=measured[part].p95, cpu_ms=cpu)
    whole, generation = measured.values()
    report.bar("chain beyond retrieval and generation", whole.p95 - generation.p50, CHAIN_BAR_MS, "ms p95")


def write_original(folder: str, suffix: str) -> dict[str, float]:
    """Task: a checkpoint in the original layout of SHARDS files of about SHARD_MB each; megabytes of the largest."""
    import torch
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True)
    config = {**settings(1024, 8), "torch_dtype": "float16"}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = original_shapes(native_config(config, pieces=len(tokenizer().pieces), where="benchmark"))
    names = list(shapes)
    stem = "pytorch_model" if suffix == "bin" else "model"
    weight_map, largest = {}, 0
    for number in range(SHARDS):
        file = f"{stem}-{number + 1:05d}-of-{SHARDS:05d}.{suffix}"
        shard = {name: torch.randn(shapes[name]).half() for name in names[number::SHARDS]}
        torch.save(shard, target / file) if suffix == "bin" else save_file(shard, target / file)
        weight_map.update(dict.fromkeys(shard, file))
        largest = max(largest, (target / file).stat().st_size)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    (target / "tokenizer.model").write_bytes(_proto(tokenizer()))
    return {"largest_mb": largest / 1e6, "total_mb": sum(f.stat().st_size for f in target.glob(f"*.{suffix}")) / 1e6}


def _proto(model: SentencePieceModel) -> bytes:
    """As much of a SentencePiece file as the reader wants."""
    import struct

    def field(number: int, data: bytes) -> bytes:
        size, length = b"", len(data)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + data

    pieces = [
        field(1, field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + bytes([0x18, piece.kind]))
        for piece in model.pieces
    ]
    return b"".join(pieces) + field(2, b"\x18\x02\x98\x02\x01") + field(3, b"\x18\x01\x20\x00\x28\x01")


def convert(folder: str, target: str) -> None:
    """Task: the conversion."""
    from chains.chatglm3.convert import convert_chatglm3

    convert_chatglm3(Path(folder), Path(target))


def import_only() -> None:
    """Task: what any conversion needs, nothing converted."""
    import safetensors.torch
    import torch

    safetensors.torch.save({"x": torch.zeros(1)})


TASKS = {"write_original": write_original, "convert": convert, "import_only": import_only}


def conversion_memory(report: Report, work: Path) -> None:
    """Memory and time of a conversion of several shards."""
    module = "benchmarks.generation_speed"
    base = run_child(module, "import_only")
    for suffix in ("safetensors", "bin"):
        sizes = run_child(module, "write_original", folder=work / suffix, suffix=suffix).result
        run = run_child(module, "convert", folder=work / suffix, target=work / f"{suffix}-native")
        extra = run.peak_mb - base.peak_mb
        report.add(
            "conversion",
            source=suffix,
            total_mb=sizes["total_mb"],
            largest_shard_mb=sizes["largest_mb"],
            seconds=run.seconds,
            cpu_s=run.cpu_s - base.cpu_s,
            memory_mb=extra,
            shards_of_memory=extra / sizes["largest_mb"],
        )
        # the shard read, which is mapped from its file, and the shard being written
        report.bar(f"memory of a conversion from {suffix}", extra / sizes["largest_mb"], 2.5, "shards")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    options = {"users": arguments.users, "hidden": arguments.hidden, "layers": arguments.layers}
    with tempfile.TemporaryDirectory() as work, Report("generation_speed", options, folder=arguments.results) as report:
        chain_overhead(report)
        conversion_memory(report, Path(work))
        directory = build_model(Path(work) / "model", arguments.hidden, arguments.layers)
        compare(report, directory, arguments.users)


if __name__ == "__main__":
    import sys

    if not serve_child(sys.argv[1:], TASKS):
        main()
