"""Int8Encoder: the encoder with its linear layers in 8 bits, by torch's own kernels, for CPUs.

Weights are symmetric per output row, activations are measured batch by batch (dynamic quantisation). Three things
make it fast beside the arithmetic: query, key and value are one product, whose input is quantised once; the tokens of a
batch stand behind each other without padding; the last layer computes the first token alone where that is the vector.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chains.bge.directory import ModelDirectory
from chains.bge.encoder import base_model

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Linear = Callable[[torch.Tensor], torch.Tensor]

Part = Literal["attention", "output", "up", "down"]


class Int8Encoder:
    """Vectors of token ids, close to those of `encoder.embed` over the same weights."""

    def __init__(
        self, encoder: torch.nn.Module, directory: ModelDirectory, *, exact_parts: Collection[Part] = ()
    ) -> None:
        """Quantise a float32 encoder from `load_encoder` (its adapter merged); `exact_parts` stay in float32."""
        model: Any = base_model(encoder)
        self._embeddings = model.embeddings
        self._directory = directory
        self._layers = [_Layer(layer, exact_parts) for layer in model.encoder.layer]

    def embed(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Pooled vectors (n, dimensions) of token ids, of unit length where the directory says so."""
        import torch

        lengths = [len(row) for row in rows]
        starts = list(itertools.accumulate(lengths[:-1], initial=0))
        first_only = self._directory.pooling == "cls"
        with torch.inference_mode():
            states = torch.cat([self._embeddings(input_ids=torch.tensor([row]))[0] for row in rows])
            for layer in self._layers[:-1]:
                states = layer.all_tokens(states, lengths)
            if first_only:
                vectors = self._layers[-1].first_tokens(states, lengths, starts)
            else:
                states = self._layers[-1].all_tokens(states, lengths)
                vectors = torch.stack([text.mean(dim=0) for text in states.split(lengths)])
            return torch.nn.functional.normalize(vectors, dim=-1) if self._directory.normalize else vectors


class _Layer:
    """One transformer layer over packed tokens (tokens, hidden)."""

    def __init__(self, layer: Any, exact_parts: Collection[Part]) -> None:
        attention = layer.attention.self
        self._head_size = attention.attention_head_size
        self._scaling = attention.scaling
        exact = "attention" in exact_parts
        self._qkv = _linear([attention.query, attention.key, attention.value], exact=exact)
        self._query = _linear([attention.query], exact=exact)
        self._key_value = _linear([attention.key, attention.value], exact=exact)
        self._output = _linear([layer.attention.output.dense], exact="output" in exact_parts)
        self._attention_norm = layer.attention.output.LayerNorm
        self._up = _linear([layer.intermediate.dense], exact="up" in exact_parts)
        self._activation = layer.intermediate.intermediate_act_fn
        self._down = _linear([layer.output.dense], exact="down" in exact_parts)
        self._norm = layer.output.LayerNorm

    def all_tokens(self, states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """The layer's output (tokens, hidden)."""
        import torch

        query, key, value = self._qkv(states).chunk(3, dim=-1)
        texts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return self._feed_forward(torch.cat([self._attend(*text) for text in texts]), states)

    def first_tokens(self, states: torch.Tensor, lengths: list[int], starts: list[int]) -> torch.Tensor:
        """The layer's output for the first token of each text (texts, hidden)."""
        import torch

        firsts = states[starts]
        key, value = self._key_value(states).chunk(2, dim=-1)
        texts = zip(self._query(firsts).split(1), key.split(lengths), value.split(lengths), strict=True)
        return self._feed_forward(torch.cat([self._attend(*text) for text in texts]), firsts)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        import torch

        def heads(part: torch.Tensor) -> torch.Tensor:
            return part.reshape(len(part), -1, self._head_size).transpose(0, 1)[None]

        attended = torch.nn.functional.scaled_dot_product_attention(
            heads(query), heads(key), heads(value), scale=self._scaling
        )
        return attended[0].transpose(0, 1).flatten(1)

    def _feed_forward(self, attended: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        states = self._attention_norm(self._output(attended) + states)
        result: torch.Tensor = self._norm(self._down(self._activation(self._up(states))) + states)
        return result


def _linear(layers: Sequence[Any], *, exact: bool) -> Linear:
    """A function that multiplies by the layers' weights put together, (n, in) -> (n, out of all)."""
    import torch

    weight = torch.cat([layer.weight.detach().float() for layer in layers]).contiguous()
    bias = torch.cat([layer.bias.detach().float() for layer in layers])
    if exact:
        return lambda states: torch.nn.functional.linear(states, weight, bias)
    # one step for each row; a row of zeros gets a step all the same
    steps = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).double()
    zeros = torch.zeros(len(steps), dtype=torch.long)
    with warnings.catch_warnings():  # 2.13 announces the end of these tensors; the kernels have no other way in yet
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, steps, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    # 7-bit activations without VNNI: kernels then add two products of 8 bits in 16, which 8-bit ones would overflow
    seven_bits = not has_vnni()
    return lambda states: torch.ops.quantized.linear_dynamic(states, packed, seven_bits)


def has_vnni() -> bool:
    """Whether the CPU adds up 8-bit products in 32 bits; false where that cannot be told."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
