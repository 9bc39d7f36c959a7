"""Engines: what runs a BGE encoder, how each is held to the reference, and which one `auto` takes."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from chains.bge.directory import ModelDirectory, ModelDirectoryError, digest
from chains.bge.tokenizer import BgeTokenizer
from chains.caches import beside
from chains.embeddings import Vectors
from loaders.errors import UsageError

if TYPE_CHECKING:
    import torch

    from chains.bge.onnx_graph import Part

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "onnx_int8", "openvino", "openvino_int8"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

LEAST_COSINE = 0.999
"""Of an engine's vectors to the reference's, the lowest over the probe; an engine below it refuses itself."""


@dataclass(frozen=True)
class _Library:
    """What has to be installed for an engine."""

    modules: tuple[str, ...]
    extra: str
    """of ragproj, which brings them"""

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.modules)


_LIBRARIES: dict[str, _Library] = {
    "onnx_int8": _Library(("onnxruntime", "onnx"), extra="models"),
    "openvino": _Library(("openvino",), extra="openvino"),
    "openvino_int8": _Library(("openvino",), extra="openvino"),
}

# With all layers in 8 bits first; what a model's outliers spoil most often is computed in float32 then.
_INT8_ATTEMPTS: tuple[tuple[Part, ...], ...] = ((), ("down",), ("down", "output"))
# float16 first: a BERT's states mostly stay far below its limit, and it keeps three more bits than bfloat16
_GPU_DTYPES: tuple[DtypeName, ...] = ("float16", "bfloat16")
_PROBE_TOKENS = 128


@dataclass(frozen=True)
class BatchLimits:
    """How much an engine takes at once."""

    token_budget: int
    """Tokens, padding included."""
    rows: int


# bge-base shape in 8 bits, tokens/s of a core: 508 with batches of 512 tokens, 480 with 1,024, 411 with 8,192, whose
# activations leave the cache
CPU_LIMITS = BatchLimits(token_budget=512, rows=32)
# enough to fill an accelerator; at bge-large's width about 2 GB of activations in 16 bits
GPU_LIMITS = BatchLimits(token_budget=65536, rows=1024)


class Engine(Protocol):
    """Something that turns token ids into vectors; safe to share between threads."""

    name: str
    limits: BatchLimits
    parallel: bool
    """Whether several threads with a core each beat one batch on all cores."""
    ahead: int
    """Batches that are prepared and sent while one is computed: a GPU must not wait for them."""

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch of token ids, (n, dimensions) float32."""


class TorchEngine:
    """The reference: torch in float32 on a CPU, in 16 bits on a GPU."""

    def __init__(self, encoder: torch.nn.Module, directory: ModelDirectory, *, pad_id: int) -> None:
        """Args are an encoder from `load_encoder`, its directory and the id that pads."""
        self._encoder = encoder
        self._directory = directory
        self._pad_id = pad_id
        self._device = next(encoder.parameters()).device
        self.name = f"torch {self._device} {next(encoder.parameters()).dtype}".replace("torch.", "")
        self.parallel = self._device.type == "cpu"
        self.ahead = 0 if self.parallel else 1
        self.limits = CPU_LIMITS if self.parallel else GPU_LIMITS

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch of token ids, (n, dimensions) float32."""
        import torch

        from chains.bge.encoder import embed, pad

        ids, mask = pad(rows, self._pad_id)
        with torch.inference_mode():
            mask = None if mask is None else mask.to(self._device)
            vectors = embed(self._encoder, ids.to(self._device), mask, self._directory)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)


class SimpleEngine:
    """An engine for the CPU made of a function from token ids to vectors."""

    def __init__(self, name: str, compute: Callable[[Sequence[Sequence[int]]], Vectors], *, parallel: bool) -> None:
        self.name = name
        self.limits = CPU_LIMITS
        self.parallel = parallel
        self.ahead = 0
        self._compute = compute

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch of token ids, (n, dimensions) float32."""
        return self._compute(rows)


class EngineFactory:
    """Opens engines over one model and holds them to its float32 vectors."""

    def __init__(
        self,
        directory: ModelDirectory,
        adapter: Path | None,
        tokenizer: BgeTokenizer,
        *,
        device: str = "cpu",
        dtype: DtypeName = "auto",
    ) -> None:
        """Args are as of `BGEEmbeddings`, with one device; weights load when the first engine needs them."""
        self._directory = directory
        self._adapter = adapter
        self._tokenizer = tokenizer
        self._device = device
        self._dtype = dtype

    def open(self, name: EngineName) -> Engine:
        """The engine of that name, or the float32 one, with a log line, where that one refuses itself.

        Raises:
            ModelDirectoryError: weights are missing, or the engine's library is not installed.
        """
        if name in ("torch", "auto") and (self._device != "cpu" or name == "torch"):
            return self._torch()
        if name == "auto":
            return self._fastest()
        engine = self._build(name)
        cosine = self._cosine(engine)
        if cosine >= LEAST_COSINE:
            return engine
        logger.warning(
            "engine %s refuses itself: cosine %.5f to float32, below %s; torch takes its place",
            engine.name, cosine, LEAST_COSINE,
        )  # fmt: skip
        return self._torch()

    def _fastest(self) -> Engine:
        """The fastest engine on this CPU that agrees; measured once, then remembered beside the model."""
        notes = _notes_path(self._directory, self._digest, self._candidates)
        remembered = _read_note(notes)
        if remembered is not None:
            logger.info("engine %s: the fastest of an earlier run on this machine, %s", remembered, notes.name)
            return self._torch() if remembered == "torch" else self._build(remembered)
        best: tuple[float, EngineName, Engine] = (self._speed(self._reference), "torch", self._reference)
        measured = {"torch": best[0]}
        for name in self._candidates:
            try:
                engine = self._build(name)
            except ModelDirectoryError as error:
                logger.info("engine %s is left out: %s", name, error)
                continue
            cosine = self._cosine(engine)
            if cosine < LEAST_COSINE:
                logger.info("engine %s refuses itself: cosine %.5f, below %s", engine.name, cosine, LEAST_COSINE)
                continue
            measured[name] = self._speed(engine)
            if measured[name] > best[0]:
                best = (measured[name], name, engine)
        figures = ", ".join(f"{name} {speed:.0f}" for name, speed in measured.items())
        logger.info("engine %s is the fastest here that agrees (tokens/s: %s)", best[2].name, figures)
        _write_note(notes, best[1], measured)
        return best[2]

    @property
    def _candidates(self) -> tuple[EngineName, ...]:
        """Engines for a CPU whose libraries are installed."""
        # without VNNI OpenVINO computes 8-bit weights in float32, which takes twice as long
        names: tuple[EngineName, ...] = ("onnx_int8", "openvino_int8") if has_vnni() else ("onnx_int8",)
        return tuple(name for name in names if _LIBRARIES[name].installed)

    def _build(self, name: EngineName) -> Engine:
        library = _LIBRARIES[name]
        if not library.installed:
            extra, modules = f"pip install 'ragproj[{library.extra}]'", " ".join(library.modules)
            raise ModelDirectoryError(
                f"engine {name} 需要 {modules}：{extra}，或改用 engine: auto",
                f"engine {name} needs {modules}: {extra}, or set engine: auto",
            )
        return self._onnx_int8() if name == "onnx_int8" else self._openvino(name)

    def _openvino(self, name: EngineName) -> Engine:
        import torch

        from chains.bge.openvino import OpenVinoEngine, exported_model

        graph = exported_model(self._directory, self._digest, lambda: self._encoder, int8=name == "openvino_int8")
        engine = OpenVinoEngine(graph, pad_id=self._tokenizer.pad_id, threads=torch.get_num_threads())
        return SimpleEngine(name, engine.embed, parallel=False)

    def _torch(self) -> Engine:
        """torch in the numbers asked for; where those do not agree with float32, in float32."""
        import torch

        encoder = self._encoder if self._device == "cpu" else self._load(self._device)
        exact = self._torch_engine(encoder)
        for name in _GPU_DTYPES if self._dtype == "auto" and self._device != "cpu" else (self._dtype,):
            if name in ("auto", "float32"):
                break
            engine = self._torch_engine(copy.deepcopy(encoder).to(getattr(torch, name)))
            cosine = self._cosine(engine, self._vectors_of_probe(exact))
            if cosine >= LEAST_COSINE:
                return engine
            logger.warning(
                "engine %s refuses itself: cosine %.5f to float32, below %s", engine.name, cosine, LEAST_COSINE
            )
        return exact

    def _onnx_int8(self) -> Engine:
        """The 8-bit engine with as few layers in float32 as agreement takes; the last attempt where none agrees."""
        from chains.bge.onnx_engine import OnnxEngine, exported_graph

        for exact_parts in _INT8_ATTEMPTS:
            graph = exported_graph(
                self._directory, self._digest, lambda: self._encoder, wide_sums=has_vnni(), exact_parts=exact_parts
            )
            suffix = "".join(f", {part} in float32" for part in exact_parts)
            engine = SimpleEngine(f"onnx_int8{suffix}", OnnxEngine(graph).embed, parallel=True)
            cosine = self._cosine(engine)
            if cosine >= LEAST_COSINE:
                break
            logger.info("engine %s: cosine %.5f, below %s", engine.name, cosine, LEAST_COSINE)
        return engine

    @functools.cached_property
    def _encoder(self) -> torch.nn.Module:
        return self._load("cpu")

    def _load(self, device: str) -> torch.nn.Module:
        """The weights in float32."""
        from chains.bge.encoder import load_encoder

        return load_encoder(self._directory, self._adapter, device=device, merge=True)

    def _torch_engine(self, encoder: torch.nn.Module) -> Engine:
        return TorchEngine(encoder, self._directory, pad_id=self._tokenizer.pad_id)

    @functools.cached_property
    def _reference(self) -> Engine:
        return self._torch_engine(self._encoder)

    @functools.cached_property
    def _digest(self) -> str:
        return digest(self._directory.path) + ("" if self._adapter is None else digest(self._adapter))

    @functools.cached_property
    def _probe(self) -> list[list[int]]:
        """Token ids of texts that no engine was fitted to: two short ones and two of a passage's length."""
        limit = min(self._directory.max_tokens, _PROBE_TOKENS)
        return self._tokenizer.encode([*_PROBE, "".join(_PROBE * 4), "".join(reversed(_PROBE * 4))], limit)

    @functools.cached_property
    def _expected(self) -> Vectors:
        return self._vectors_of_probe(self._reference)

    def _vectors_of_probe(self, engine: Engine) -> Vectors:
        """Each text alone: no padding touches them."""
        return np.concatenate([engine.embed([row]) for row in self._probe])

    def _cosine(self, engine: Engine, expected: Vectors | None = None) -> float:
        """The lowest cosine of the engine's vectors of the probe to the reference's; 0 where they are no numbers."""
        vectors, expected = engine.embed(self._probe), self._expected if expected is None else expected
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        cosines = (vectors * expected).sum(axis=1) / np.maximum(lengths, 1e-12)
        return float(np.nan_to_num(cosines, nan=0.0).min())

    def _speed(self, engine: Engine) -> float:
        """Tokens per second on the probe, the better of two runs after one to warm up."""
        engine.embed(self._probe)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            engine.embed(self._probe)
            times.append(time.perf_counter() - started)
        return sum(map(len, self._probe)) / min(times)


# Made up for this purpose: prose, figures, Latin words, a question.
_PROBE = (
    "知识库的备份怎样做？把整个目录复制到别处即可，数据库文件 kb.sqlite 是唯一需要保留的。",
    "2023年第一季度营业收入为1,284.5万元，同比增长12.3%；毛利率由38%升至41%，主要因为原材料价格下降。",
    "The encoder returns one vector per passage; cosine similarity ranks them, and BM25 finds exact terms.",
    "患者三天前出现发热、咳嗽，体温最高39度，自行服用退烧药后缓解，无胸痛，无呼吸困难，既往体健。",
)


def has_vnni() -> bool:
    """Whether the CPU adds up 8-bit products in 32 bits; false where that cannot be told."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def devices(named: str | None) -> list[str]:
    """The devices to compute on: those named, separated by commas; "cuda" is all GPUs; None is them or the CPU."""
    if named is not None and named != "cuda":
        return [name.strip() for name in named.split(",")]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and named == "cuda":
        raise UsageError(
            "device 是 cuda，但 torch 找不到显卡；请检查驱动，或写 device: cpu",
            "device is cuda but torch finds no GPU; check the driver, or set device: cpu",
        )
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]


def _notes_path(directory: ModelDirectory, weights: str, candidates: Sequence[str]) -> Path:
    """Where the choice for these weights on this machine is noted; other versions or cores choose anew."""
    import torch

    from chains.bge.exports import cache_directory

    machine = (platform.machine(), platform.node(), os.cpu_count(), torch.get_num_threads(), torch.__version__)
    key = hashlib.sha256(repr((weights, machine, tuple(candidates))).encode()).hexdigest()[:16]
    return cache_directory(directory) / f"engine-{key}.json"


def _read_note(path: Path) -> EngineName | None:
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if name in ("torch", *_LIBRARIES) else None


def _write_note(path: Path, engine: str, measured: dict[str, float]) -> None:
    figures = {name: round(speed) for name, speed in measured.items()}
    with beside(path) as temporary:
        temporary.write_text(json.dumps({"engine": engine, "tokens_per_second": figures}) + "\n", encoding="utf-8")
