"""The encoder as an ONNX graph with its linear layers in 8 bits, made of ONNX Runtime's own fused operators.

Weights are symmetric per output column, activations are measured text by text (dynamic quantisation). Nothing is
padded, so there is no mask; query, key and value share one quantised input; the last layer asks and feeds forward the
first token alone where that is the vector, or what a reranker's head reads. The head itself stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from chains.bge.directory import ModelDirectory, ModelDirectoryError
from chains.bge.encoder import base_model

if TYPE_CHECKING:
    import onnx
    import torch

Part = Literal["attention", "output", "up", "down"]

_OPSET, _IR_VERSION = 17, 8  # old enough for every ONNX Runtime since 1.14
_MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
# `hidden_act` of a BERT config -> operator and domain; FastGelu is the tanh form
_ACTIVATIONS = {
    "gelu": ("Gelu", _MICROSOFT),
    "gelu_new": ("FastGelu", _MICROSOFT),
    "gelu_pytorch_tanh": ("FastGelu", _MICROSOFT),
    "relu": ("Relu", ""),
}
_ALIGNMENT = 64  # bytes: what vector instructions like to read from
_LARGEST_PAIR = 128  # of two neighbouring weights of one sign: times 255, the largest activation, it is 32,640


def write_graph(
    path: Path,
    encoder: torch.nn.Module,
    directory: ModelDirectory,
    *,
    wide_sums: bool,
    exact_parts: Collection[Part] = (),
) -> None:
    """Write the graph of `encoder.embed`: `ids` (texts, tokens) int64 -> vectors (texts, dimensions) float32.

    Args:
        path: of the graph; the numbers go into a file beside it with the suffix `.bin`, which stays there.
        encoder: from `load_encoder` in float32, its adapter merged.
        directory: pooling and normalisation.
        wide_sums: the CPU adds up 8-bit products in 32 bits (VNNI); without it weights are kept so small that no sum of
            two products leaves 16 bits.
        exact_parts: linear layers that stay in float32.

    Raises:
        ModelDirectoryError: the model has an activation that is not supported.
    """

    def vectors(graph: _Graph) -> str:
        made = _Encoder(graph, base_model(encoder), wide_sums=wide_sums, exact_parts=exact_parts)
        return made.vectors(directory)

    _write(path, vectors, inputs=["ids"], width=directory.dimensions)


def write_cross_encoder_graph(path: Path, network: Any, *, wide_sums: bool, exact_parts: Collection[Part] = ()) -> None:
    """Write the graph of a reranker: `ids`, and BERT's `types`, (texts, tokens) int64 -> logits (texts, 1) float32.

    Args:
        path: as of `write_graph`.
        network: from `load_cross_encoder` in float32, its adapter merged.
        wide_sums, exact_parts: as of `write_graph`.

    Raises:
        ModelDirectoryError: the model has an activation that is not supported.
    """
    bert = network.config.model_type == "bert"
    dense = network.bert.pooler.dense if bert else network.classifier.dense
    score = network.classifier if bert else network.classifier.out_proj

    def logits(graph: _Graph) -> str:
        made = _Encoder(graph, network.base_model, wide_sums=wide_sums, exact_parts=exact_parts, typed=bert)
        return made.logits(dense, score)

    _write(path, logits, inputs=["ids", "types"] if bert else ["ids"], width=1)


def eight_bits(
    weight: npt.NDArray[np.float32], *, wide_sums: bool
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Whole numbers (in, out) and the step of each column (out,), whose product is nearly the weight (in, out).

    AVX2 multiplies activations of 8 bits by weights of 8 bits and adds neighbouring products in 16 bits, where the sum
    is cut off at 32,767. The largest activation is 255, so two neighbours of one sign may be 128 together. Bounding
    that sum instead of each weight by 64 leaves a step half as coarse, and a third of the error's square.
    """
    largest = np.abs(weight).max(axis=0) / 127
    if not wide_sums:
        even = np.pad(weight, ((0, len(weight) % 2), (0, 0))).reshape(-1, 2, weight.shape[1])
        sums = np.maximum(np.maximum(even, 0).sum(axis=1), np.maximum(-even, 0).sum(axis=1)).max(axis=0)
        # rounding adds a half to each of the two
        largest = np.maximum(largest, sums / (_LARGEST_PAIR - 1))
    steps = np.maximum(largest, 1e-12).astype(np.float32)  # a column of zeros gets a step all the same
    return np.round(weight / steps).astype(np.int8), steps


def _write(path: Path, compute: Callable[[_Graph], str], *, inputs: Sequence[str], width: int) -> None:
    """The model that computes (texts, width), and its numbers beside it."""
    numbers = path.with_suffix(".bin")
    with numbers.open("wb") as file:
        graph = _Graph(file, numbers.name)
        model = graph.model(inputs, compute(graph), width)
    path.write_bytes(model.SerializeToString())


class _Graph:
    """Operators one after another, and the numbers they use in a file."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._file_name = name
        self._constants: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def constant(self, values: Any) -> str:
        """The name of an array of numbers, written to the file."""
        import onnx

        array = np.ascontiguousarray(values)
        tensor = onnx.TensorProto(
            name=f"c{len(self._constants)}",
            dims=array.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        place = {"location": self._file_name, "offset": str(self._file.tell()), "length": str(array.nbytes)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        self._file.write(array.tobytes())
        self._constants.append(tensor)
        return str(tensor.name)

    def small(self, values: Any) -> str:
        """The name of a few whole numbers inside the graph, which shapes are computed from when it is loaded."""
        import onnx

        name = f"c{len(self._constants)}"
        self._constants.append(onnx.numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def add(self, operator: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> list[str]:
        """The names of an operator's outputs."""
        import onnx

        names = [f"n{len(self._nodes)}_{index}" for index in range(outputs)]
        self._nodes.append(onnx.helper.make_node(operator, inputs, names, domain=domain, **attributes))
        return names

    def model(self, inputs: Sequence[str], output: str, width: int) -> onnx.ModelProto:
        """The whole model, for batches of any shape."""
        import onnx
        from onnx import helper

        given = [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["texts", "tokens"]) for name in inputs]
        made = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["texts", width])
        graph = helper.make_graph(self._nodes, "encoder", given, [made], self._constants)
        versions = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=_IR_VERSION)


class _Encoder:
    """Puts the operators of a BertModel or XLMRobertaModel into a graph; states are (texts, tokens, hidden)."""

    def __init__(
        self, graph: _Graph, model: Any, *, wide_sums: bool, exact_parts: Collection[Part], typed: bool = False
    ) -> None:
        self._graph = graph
        self._model = model
        self._typed = typed  # tokens have the types that the input `types` says, not all the first one
        self._wide_sums = wide_sums
        self._exact = exact_parts
        name = model.config.hidden_act
        if name not in _ACTIVATIONS:
            raise ModelDirectoryError(
                f"onnx_int8 不支持激活函数 {name}（可用的是 {'、'.join(_ACTIVATIONS)}）；请改用 engine: torch",
                f"onnx_int8 has no activation {name} (it has {', '.join(_ACTIVATIONS)}); set engine: torch",
            )
        self._activation, self._activation_domain = _ACTIVATIONS[name]

    def vectors(self, directory: ModelDirectory) -> str:
        """The pooled vectors, (texts, dimensions)."""
        pooled = self._pooled(first_only=directory.pooling == "cls")
        return self._graph.add("LpNormalization", pooled, axis=-1, p=2)[0] if directory.normalize else pooled

    def logits(self, dense: Any, score: Any) -> str:
        """What a head's two linear layers, a tanh between them, make of the first token, (texts, 1)."""
        (inner,) = self._graph.add("Tanh", self._product(dense, [self._pooled(first_only=True)]))
        return self._product(score, [inner])

    def _pooled(self, *, first_only: bool) -> str:
        """The last state of the first token, or the mean of all, (texts, hidden)."""
        *layers, last = self._model.encoder.layer
        states = self._embedded()
        for layer in layers:
            states = self._layer(layer, states)
        states = self._layer(last, states, first_only=first_only)
        # the mean of one token is itself
        return self._graph.add("ReduceMean", states, axes=[1], keepdims=0)[0]

    def _embedded(self) -> str:
        graph, embeddings = self._graph, self._model.embeddings
        types = embeddings.token_type_embeddings.weight
        # XLM-RoBERTa numbers positions from behind its padding id, BERT from 0
        first = embeddings.padding_idx + 1 if self._model.config.model_type == "xlm-roberta" else 0
        positions = embeddings.position_embeddings.weight[first:]
        (shape,) = graph.add("Shape", "ids")
        (tokens,) = graph.add("Gather", shape, graph.small([1]))
        zero = graph.small([0])
        (words,) = graph.add("Gather", graph.constant(_array(embeddings.word_embeddings.weight)), "ids")
        if self._typed:
            (kinds,) = graph.add("Gather", graph.constant(_array(types)), "types")
            (words,) = graph.add("Add", words, kinds)
        else:
            positions = positions + types[0]
        (places,) = graph.add("Slice", graph.constant(_array(positions)), zero, tokens, zero)
        return self._normed(words, places, embeddings.LayerNorm)

    def _layer(self, layer: Any, states: str, *, first_only: bool = False) -> str:
        """A layer's output, for the first token alone where that is asked."""
        graph, attention = self._graph, layer.attention.self
        shared = self._input(states, "attention")
        asking, asked = states, shared
        if first_only:
            (asking,) = graph.add("Slice", states, graph.small([0]), graph.small([1]), graph.small([1]))
            asked = self._input(asking, "attention")
        query = self._product(attention.query, asked)
        key, value = self._product(attention.key, shared), self._product(attention.value, shared)
        heads = {"num_heads": attention.num_attention_heads, "scale": float(attention.scaling)}
        (attended,) = graph.add("MultiHeadAttention", query, key, value, domain=_MICROSOFT, **heads)
        attended = self._product(layer.attention.output.dense, self._input(attended, "output"))
        states = self._normed(attended, asking, layer.attention.output.LayerNorm)
        wide = self._product(layer.intermediate.dense, self._input(states, "up"))
        (wide,) = graph.add(self._activation, wide, domain=self._activation_domain)
        narrow = self._product(layer.output.dense, self._input(wide, "down"))
        return self._normed(narrow, states, layer.output.LayerNorm)

    def _input(self, states: str, part: Part) -> list[str]:
        """The states as linear layers of a part take them: whole numbers, step and zero; or as they are, in float32."""
        return [states] if part in self._exact else self._graph.add("DynamicQuantizeLinear", states, outputs=3)

    def _product(self, layer: Any, given: list[str]) -> str:
        """What a linear layer makes of an input from `_input`, in float32."""
        graph = self._graph
        weight, bias = _array(layer.weight).T, graph.constant(_array(layer.bias))
        if len(given) == 1:
            (product,) = graph.add("MatMul", *given, graph.constant(weight))
            return graph.add("Add", product, bias)[0]
        numbers, steps = eight_bits(weight, wide_sums=self._wide_sums)
        states, step, zero = given
        weights, zeros = graph.constant(numbers), graph.constant(np.zeros_like(steps, np.int8))
        inputs = (states, weights, step, graph.constant(steps), zero, zeros, bias)
        return graph.add("MatMulIntegerToFloat", *inputs, domain=_MICROSOFT)[0]

    def _normed(self, left: str, right: str, norm: Any) -> str:
        """Layer norm of a sum; the fused SkipLayerNormalization takes eight times as long (ONNX Runtime 1.31)."""
        graph = self._graph
        (total,) = graph.add("Add", left, right)
        scale, shift = graph.constant(_array(norm.weight)), graph.constant(_array(norm.bias))
        return graph.add("LayerNormalization", total, scale, shift, axis=-1, epsilon=norm.eps)[0]


def _array(parameter: torch.Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(parameter.detach().float().numpy(), dtype=np.float32)
