"""ChatGLM3's tensors by their original and their native names: which is which, their shapes, one as the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Computed anew by the native model; every release of the original has it in its files.
DROPPED = ("transformer.rotary_pos_emb.inv_freq",)

_TOP = {
    "transformer.embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "transformer.encoder.final_layernorm.weight": ("model.norm.weight",),
    "transformer.output_layer.weight": ("lm_head.weight",),
}
# Of a layer. Where several native names stand, their rows lie one after the other in the original.
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "self_attention.query_key_value.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.query_key_value.bias": (
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ),
    "self_attention.dense.weight": ("self_attn.o_proj.weight",),
    "mlp.dense_h_to_4h.weight": ("mlp.gate_up_proj.weight",),
    "mlp.dense_4h_to_h.weight": ("mlp.down_proj.weight",),
}
_ORIGINAL_LAYER = "transformer.encoder.layers.{}."
_NATIVE_LAYER = "model.layers.{}."


def name_map(layers: int) -> dict[str, tuple[str, ...]]:
    """Original name -> native names, in the order of the model; 7 a layer and 3 more."""
    names: dict[str, tuple[str, ...]] = {**_TOP}
    for layer in range(layers):
        for original, natives in LAYER_NAMES.items():
            names[_ORIGINAL_LAYER.format(layer) + original] = tuple(
                _NATIVE_LAYER.format(layer) + native for native in natives
            )
    return names


def projection_rows(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows of q, k and v in `query_key_value`: 4096, 256 and 256 for the 6B model."""
    groups = config["num_key_value_heads"] * config["head_dim"]
    return config["num_attention_heads"] * config["head_dim"], groups, groups


def native_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Native name -> shape, for a native config.json."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, key, value = projection_rows(config)
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (value, hidden),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.bias": (value,),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes.update({_NATIVE_LAYER.format(layer) + name: shape for name, shape in of_layer.items()})
    return shapes


def original_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Original name -> shape, for a native config.json; 199 of them for the 6B model."""
    natives = native_shapes(config)
    shapes = {}
    for original, names in name_map(config["num_hidden_layers"]).items():
        parts = [natives[name] for name in names]
        shapes[original] = (sum(part[0] for part in parts), *parts[0][1:])
    return shapes


def to_native(tensor: Tensor, natives: tuple[str, ...], rows: tuple[int, ...]) -> dict[str, Tensor]:
    """The native tensors of an original one: itself under its new name, or its rows cut into q, k and v."""
    if len(natives) == 1:
        return {natives[0]: tensor}
    # clones: files hold each tensor by itself, never a view into another's memory
    return {name: part.clone() for name, part in zip(natives, tensor.split(list(rows)), strict=True)}


def to_original(natives: tuple[str, ...], get: Callable[[str], Tensor]) -> Tensor:
    """The original tensor of its native parts."""
    import torch

    parts = [get(name) for name in natives]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def account(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    """What is wrong with the tensors found, in Chinese and English: missing, unexpected, of another shape."""
    for name in expected.keys() - found.keys():
        yield f"缺少 {name}", f"{name} is missing"
    for name in sorted(found.keys() - expected.keys()):
        yield f"多出 {name}", f"{name} is not known"
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            yield (
                f"{name} 的形状是 {found[name]}，应为 {expected[name]}",
                (f"{name} has shape {found[name]}, expected {expected[name]}"),
            )
