"""Attention over packed rows, one row at a time: no mask, and no work on pairs of different rows.

transformers' own way to keep packed rows apart is a mask over the whole pack, which costs the square of its length:
half of the time of a small model on a CPU. Row by row it is the sum of the squares, and the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NAME = "ragproj_rows"


def use_row_attention(model: Any) -> None:
    """Let a model of transformers take `row_lengths` in its forward pass; without them it works as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def has_row_attention(model: Any) -> bool:
    """Whether a model was given to `use_row_attention`."""
    return bool(model.config._attn_implementation == NAME)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; with `row_lengths` causal within each of these rows, which lie end to end.

    Args:
        module: the layer's attention.
        query, key, value: (1, heads, tokens, size).
        attention_mask: not looked at where there are `row_lengths`.
        row_lengths: tokens of each row.
        kwargs: dropout, scaling and others.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = True
    rows = zip(*(tensor.split(list(row_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in rows]  # (1, tokens, heads, size)
    return torch.cat(found, dim=1), None
