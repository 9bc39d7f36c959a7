"""OnnxEngine: a model in 8 bits through ONNX Runtime, on CPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from chains.bge.directory import ModelDirectory, ModelDirectoryError
from chains.bge.exports import exported
from chains.embeddings import Vectors

if TYPE_CHECKING:
    from chains.bge.onnx_graph import Part

_EXPORT_VERSION = 1  # of the graph: counted up when `onnx_graph` writes another one

_Row = TypeVar("_Row")


class OnnxEngine(Generic[_Row]):
    """A graph from `onnx_graph`, ready to compute; several threads may ask at once."""

    def __init__(self, graph: Path, inputs: Callable[[_Row], Mapping[str, Sequence[int]]]) -> None:
        """Weights are laid out for this CPU with the first text.

        Args:
            graph: its file.
            inputs: what it reads of a text, by the names of its inputs.
        """
        self._graph = graph
        self._inputs = inputs
        self._sessions: dict[int, Any] = {}
        self._lock = threading.Lock()

    def compute(self, rows: Sequence[_Row]) -> Vectors:
        """What the graph makes of each text, (n, numbers of each) float32, each computed alone.

        So a text's numbers do not depend on what stands beside it, nothing is padded, and activations are quantised in
        steps of their own. A batch is hardly faster: 12% with 34 tokens, not at all with 128 (bge-base shape).

        With as many threads as torch has in the thread that asks: all cores, or one in a pool that has more threads.
        """
        import torch

        session = self._session(torch.get_num_threads())
        return np.concatenate([session.run(None, self._fed(row))[0] for row in rows])

    def _fed(self, row: _Row) -> dict[str, Any]:
        return {name: np.array([numbers], np.int64) for name, numbers in self._inputs(row).items()}

    def _session(self, threads: int) -> Any:
        """The session that computes with so many threads; ONNX Runtime fixes their number when it opens one."""
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = _open(self._graph, threads)
            return self._sessions[threads]


class _WriteGraph(Protocol):
    def __call__(self, path: Path, *, wide_sums: bool, exact_parts: Collection[Part]) -> None: ...


def exported_graph(
    directory: ModelDirectory,
    name: str,
    digest: str,
    write: _WriteGraph,
    *,
    wide_sums: bool,
    exact_parts: Collection[Part] = (),
) -> Path:
    """The exported graph of a model, made now where no earlier run left it.

    Args:
        directory: of the model.
        name: of the file, with its suffix.
        digest: of weights and adapter; other weights are another file.
        write: a function of `onnx_graph`, called where there is something to export.
        wide_sums: the CPU adds up 8-bit products in 32 bits.
        exact_parts: linear layers that stay in float32.
    """
    made_of = (digest, wide_sums, tuple(exact_parts), _EXPORT_VERSION)
    return exported(directory, name, made_of, lambda path: write(path, wide_sums=wide_sums, exact_parts=exact_parts))


def _open(graph: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The graph is fused already; what ONNX Runtime 1.31 would fuse more is slower: its sum with layer norm takes eight
    # times as long, quantisation inside the wide product a quarter longer.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    # its errors have no base of their own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(
            f"导出的模型 {graph} 无法载入：{reason}；请删除目录 {graph.parent}，它会重新生成",
            f"the exported model {graph} cannot be loaded: {reason}; delete {graph.parent}, it will be made again",
        ) from error
