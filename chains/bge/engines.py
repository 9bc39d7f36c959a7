"""Engines: what runs a BGE model, how each is held to the reference, and which one `auto` takes."""

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np

from chains.bge.batching import length_sorted_batches
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
RerankerEngineName = Literal["auto", "torch", "onnx_int8"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

# What a model reads: the token ids of a text, or those of a pair and their types. Its length is its tokens.
Row = TypeVar("Row", bound=Sized)
_Row_contra = TypeVar("_Row_contra", bound=Sized, contravariant=True)


class _RefusalError(Exception):
    """An engine does not agree with float32."""


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


class Engine(Protocol[_Row_contra]):
    """Something that turns token ids into vectors, or pairs into scores; safe to share between threads."""

    name: str
    limits: BatchLimits
    parallel: bool
    """Whether several threads with a core each beat one batch on all cores."""
    ahead: int
    """Batches that are prepared and sent while one is computed: a GPU must not wait for them."""

    def compute(self, rows: Sequence[_Row_contra]) -> Vectors:
        """What the model makes of one batch, (n, numbers of each) float32."""


class TorchEngine(ABC, Generic[Row]):
    """The reference: torch in float32 on a CPU, in 16 bits on a GPU."""

    def __init__(self, model: torch.nn.Module, *, pad_id: int) -> None:
        """Args are a model on its device and the id that pads."""
        weights = next(model.parameters())
        self._device = weights.device
        self._pad_id = pad_id
        self.name = f"torch {self._device} {weights.dtype}".replace("torch.", "")
        self.parallel = self._device.type == "cpu"
        self.ahead = 0 if self.parallel else 1
        self.limits = CPU_LIMITS if self.parallel else GPU_LIMITS

    def compute(self, rows: Sequence[Row]) -> Vectors:
        """What the model makes of one batch, (n, numbers of each) float32."""
        import torch

        with torch.inference_mode():
            return np.asarray(self._forward(rows).float().cpu().numpy(), dtype=np.float32)

    @abstractmethod
    def _forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """The same, on the device."""

    def _padded(self, rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(numbers, mask) on the device; the mask is None where nothing is padded."""
        from chains.bge.encoder import pad

        numbers, mask = pad(rows, pad_id)
        return numbers.to(self._device), None if mask is None else mask.to(self._device)


class SimpleEngine(Generic[Row]):
    """An engine for the CPU made of a function."""

    def __init__(
        self, name: str, compute: Callable[[Sequence[Row]], Vectors], *, parallel: bool, limits: BatchLimits
    ) -> None:
        self.name = name
        self.limits = limits
        self.parallel = parallel
        self.ahead = 0
        self._compute = compute

    def compute(self, rows: Sequence[Row]) -> Vectors:
        """What the model makes of one batch, (n, numbers of each) float32."""
        return self._compute(rows)


class EngineFactory(ABC, Generic[Row]):
    """Opens engines over one model and holds them to what it computes in float32."""

    _kind: ClassVar[str] = ""
    """Before the names of files that are kept for this kind of model."""
    _onnx_limits: ClassVar[BatchLimits] = CPU_LIMITS

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

    # --- what a kind of model brings

    @abstractmethod
    def _load(self, device: str) -> torch.nn.Module:
        """The weights in float32, the adapter merged."""

    @abstractmethod
    def _torch_engine(self, model: torch.nn.Module) -> Engine[Row]:
        """The engine over weights from `_load`."""

    @abstractmethod
    def _write_graph(self, path: Path, *, wide_sums: bool, exact_parts: Collection[Part]) -> None:
        """Write the graph in 8 bits, as `onnx_graph` does."""

    @property
    @abstractmethod
    def _inputs(self) -> Callable[[Row], Mapping[str, Sequence[int]]]:
        """What that graph reads of a row, by the names of its inputs.

        A function that does not hold the factory: engines outlive the weights that only their choice needed.
        """

    @abstractmethod
    def _probe_rows(self) -> list[Row]:
        """Texts that no engine was fitted to, some of a passage's length."""

    @abstractmethod
    def _apart(self, found: Vectors, expected: Vectors) -> str:
        """In which way numbers of the probe are not those of float32; empty where they agree."""

    # --- what all have in common

    def open(self, name: EngineName) -> Engine[Row]:
        """The engine of that name, or the float32 one, with a log line, where that one refuses itself.

        Raises:
            ModelDirectoryError: weights are missing, or the engine's library is not installed.
        """
        if name == "torch" or (name == "auto" and self._device != "cpu"):
            return self._torch()
        return self._fastest() if name == "auto" else self._named(name)

    def _named(self, name: EngineName) -> Engine[Row]:
        """The engine of that name, or torch."""
        try:
            return self._agreeing(name)
        except _RefusalError as refusal:
            logger.warning("engine %s; torch takes its place", refusal)
        return self._torch()

    def _fastest(self) -> Engine[Row]:
        """The fastest engine on this CPU that agrees; measured once, then remembered beside the model."""
        notes = self._notes_path()
        remembered = _read_note(notes)
        if remembered is not None:
            logger.info("engine %s: the fastest of an earlier run on this machine, %s", remembered, notes.name)
            return self._torch() if remembered == "torch" else self._named(remembered)
        engines: dict[EngineName, Engine[Row]] = {"torch": self._torch()}
        for name in self._candidates:
            try:
                engines[name] = self._agreeing(name)
            except (ModelDirectoryError, _RefusalError) as error:
                logger.info("engine %s is left out: %s", name, error)
        speeds = {name: self._speed(engine) for name, engine in engines.items()}
        fastest = max(speeds, key=speeds.__getitem__)
        figures = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
        logger.info("engine %s is the fastest here that agrees (tokens/s: %s)", engines[fastest].name, figures)
        _write_note(notes, fastest, speeds)
        return engines[fastest]

    @property
    def _candidates(self) -> tuple[EngineName, ...]:
        """Engines for a CPU whose libraries are installed."""
        return ("onnx_int8",) if is_installed("onnx_int8") else ()

    @property
    def _chosen_for(self) -> tuple[object, ...]:
        """What a remembered choice depends on besides the machine."""
        return (self._digest, self._candidates)

    def _agreeing(self, name: EngineName) -> Engine[Row]:
        """The engine of that name in the first form that agrees with float32.

        Raises:
            ModelDirectoryError: its library is not installed, or it cannot run the model.
            _RefusalError: no form agrees.
        """
        library = _LIBRARIES[name]
        if not library.installed:
            extra, modules = f"pip install 'ragproj[{library.extra}]'", " ".join(library.modules)
            raise ModelDirectoryError(
                f"engine {name} 需要 {modules}：{extra}，或改用 engine: auto",
                f"engine {name} needs {modules}: {extra}, or set engine: auto",
            )
        for engine in self._forms(name):
            apart = self._disagreement(engine)
            if not apart:
                return engine
            logger.info("engine %s: %s", engine.name, apart)
        raise _RefusalError(f"{engine.name} refuses itself: {apart}")

    def _forms(self, name: EngineName) -> Iterator[Engine[Row]]:
        """The engine of that name, made when asked for: as fast as can be, then nearer to float32."""
        assert name == "onnx_int8"
        from chains.bge.onnx_engine import OnnxEngine, exported_graph

        for exact_parts in _INT8_ATTEMPTS:
            graph = exported_graph(
                self._directory,
                f"{self._kind}onnx-int8.onnx",
                self._digest,
                self._write_graph,
                wide_sums=has_vnni(),
                exact_parts=exact_parts,
            )
            suffix = "".join(f", {part} in float32" for part in exact_parts)
            compute = OnnxEngine(graph, self._inputs).compute
            yield SimpleEngine(f"onnx_int8{suffix}", compute, parallel=True, limits=self._onnx_limits)

    def _torch(self) -> Engine[Row]:
        """torch in the numbers asked for; where those do not agree with float32, in float32."""
        import torch

        model = self._model if self._device == "cpu" else self._load(self._device)
        exact = self._torch_engine(model)
        for name in _GPU_DTYPES if self._dtype == "auto" and self._device != "cpu" else (self._dtype,):
            if name in ("auto", "float32"):
                break
            engine = self._torch_engine(copy.deepcopy(model).to(getattr(torch, name)))
            apart = self._disagreement(engine, self._numbers_of_probe(exact))
            if not apart:
                return engine
            logger.warning("engine %s refuses itself: %s", engine.name, apart)
        return exact

    @functools.cached_property
    def _model(self) -> torch.nn.Module:
        return self._load("cpu")

    @functools.cached_property
    def _digest(self) -> str:
        return digest(self._directory.path) + ("" if self._adapter is None else digest(self._adapter))

    @functools.cached_property
    def _probe(self) -> list[Row]:
        return self._probe_rows()

    @functools.cached_property
    def _expected(self) -> Vectors:
        return self._numbers_of_probe(self._torch_engine(self._model))

    def _numbers_of_probe(self, engine: Engine[Row]) -> Vectors:
        """Each text alone: no padding touches them."""
        return np.concatenate([engine.compute([row]) for row in self._probe])

    def _disagreement(self, engine: Engine[Row], expected: Vectors | None = None) -> str:
        """In which way the engine is not the reference; empty where they agree."""
        return self._apart(engine.compute(self._probe), self._expected if expected is None else expected)

    def _speed(self, engine: Engine[Row]) -> float:
        """Tokens per second on the probe in batches as they come, the better of two runs after one to warm up."""
        lengths = [len(row) for row in self._probe]
        batches = length_sorted_batches(lengths, engine.limits.token_budget, engine.limits.rows)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            for batch in batches:
                engine.compute([self._probe[index] for index in batch])
            times.append(time.perf_counter() - started)
        return sum(lengths) / min(times[1:])

    def _notes_path(self) -> Path:
        """Where the choice for these weights on this machine is noted; other versions or cores choose anew."""
        import torch

        from chains.bge.exports import cache_directory

        machine = (platform.machine(), platform.node(), os.cpu_count(), torch.get_num_threads(), torch.__version__)
        key = hashlib.sha256(repr((*self._chosen_for, machine)).encode()).hexdigest()[:16]
        return cache_directory(self._directory) / f"{self._kind}engine-{key}.json"


def is_installed(engine: EngineName) -> bool:
    """Whether the libraries that an engine needs are there."""
    return _LIBRARIES[engine].installed


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


def _read_note(path: Path) -> EngineName | None:
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if name in ("torch", *_LIBRARIES) else None


def _write_note(path: Path, engine: str, measured: Mapping[EngineName, float]) -> None:
    figures = {name: round(speed) for name, speed in measured.items()}
    with beside(path) as temporary:
        temporary.write_text(json.dumps({"engine": engine, "tokens_per_second": figures}) + "\n", encoding="utf-8")
