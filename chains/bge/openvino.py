"""OpenVinoEngine: the encoder through OpenVINO, exported once by `encoder.embed` itself and kept beside the model.

bfloat16 where the CPU computes in it, else float32; the 8-bit form keeps weights in 8 bits and lets OpenVINO quantise
activations token by token, which it does on CPUs with VNNI (2026.4: elsewhere it computes those in float32).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chains.bge.directory import ModelDirectory
from chains.bge.exports import exported
from chains.embeddings import Vectors

if TYPE_CHECKING:
    import torch

_EXPORT_VERSION = 1  # of the graph: counted up when `encoder.embed` computes in another way


class OpenVinoEngine:
    """An exported encoder, compiled for this CPU."""

    def __init__(self, graph: Path, *, pad_id: int, threads: int) -> None:
        """Args are the exported file, the id that pads and the threads to compute with (0: as many as cores)."""
        import openvino

        core = openvino.Core()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            settings["INFERENCE_PRECISION_HINT"] = "bf16"
        self._compiled = core.compile_model(core.read_model(graph), "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._pad_id = pad_id
        self._lock = threading.Lock()  # a request computes one batch at a time, with all threads

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch of token ids, (n, dimensions) float32."""
        shape = (len(rows), max(map(len, rows)))
        ids, mask = np.full(shape, self._pad_id, np.int64), np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        with self._lock:
            return np.array(self._request.infer([ids, mask])[0], dtype=np.float32)


def exported_model(directory: ModelDirectory, digest: str, load: Callable[[], torch.nn.Module], *, int8: bool) -> Path:
    """The exported graph of a model, made now where no earlier run left it.

    Args:
        directory: of the model.
        digest: of weights and adapter; other weights are another file.
        load: gives the float32 encoder, called where there is something to export.
        int8: keep weights in 8 bits.
    """
    import openvino

    def write(path: Path) -> None:
        model = _convert(load(), directory)
        if int8:
            _compress(model)
        openvino.save_model(model, path, compress_to_fp16=False)

    name = f"openvino-{'int8' if int8 else 'fp32'}.xml"
    return exported(directory, name, (digest, int8, openvino.__version__, _EXPORT_VERSION), write)


def _convert(encoder: torch.nn.Module, directory: ModelDirectory) -> Any:
    """The OpenVINO model of `encoder.embed`, for batches of any shape."""
    import openvino
    import torch

    from chains.bge.encoder import embed

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return embed(self.encoder, input_ids, attention_mask, directory)

    example = torch.ones(2, 16, dtype=torch.long)
    any_shape = openvino.PartialShape([-1, -1])
    return openvino.convert_model(Embedder(), example_input=(example, example), input=[any_shape, any_shape])


def _compress(model: Any) -> None:
    """Put the weights of every linear layer into 8 bits, symmetric per output row."""
    from openvino import opset13 as operations

    for node in model.get_ordered_ops():
        constant = node.input_value(1).get_node() if node.get_type_name() == "MatMul" else None
        if constant is None or constant.get_type_name() != "Constant":
            continue
        weight = constant.data.astype(np.float32)  # (out, in)
        steps = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
        rounded = np.round(weight / steps).astype(np.int8)
        restored = operations.multiply(
            operations.convert(operations.constant(rounded), "f32"), operations.constant(steps)
        )
        node.input(1).replace_source_output(restored.output(0))
