"""Dropout that costs little on a CPU: the distribution of torch's, drawn sixteen bits at a time.

torch draws each value on its own and leaves its fused attention where attention drops something: together a quarter of
a training step. Here one draw of 64 bits decides four values. It comes from torch's generator, or from one of the
thread's own, seeded alike: torch has a single one for all threads, whose draws would fall to each by chance.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from chains.bge.encoder import base_model

if TYPE_CHECKING:
    from torch import Tensor, nn

_STEPS = 1 << 16  # the share is rounded to one of them: .1 is .100006
_ATTENTION = "ragproj_cheap_dropout"
_of_thread = threading.local()


def use_cheap_dropout(encoder: nn.Module) -> None:
    """Give every dropout of an encoder, that of its attention included, the cheap way of drawing."""
    from torch import nn
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)  # without one the model's own forward drops its mask
    cast("Any", base_model(encoder)).set_attn_implementation(_ATTENTION)


def draw_in_this_thread() -> None:
    """From now on dropouts in this thread draw from a generator of its own."""
    import torch

    _of_thread.generator = torch.Generator()


def seed_dropout(seed: int) -> None:
    """Seed what dropouts in this thread draw from; on a GPU that is torch's."""
    import torch

    own = getattr(_of_thread, "generator", None)
    torch.manual_seed(seed) if own is None else own.manual_seed(seed)


def cheap_dropout(values: Tensor, share: float) -> Tensor:
    """The values, a share of them zero at random and the rest scaled up so that the mean stays."""
    import torch

    dropped = round(share * _STEPS)
    if dropped == 0:
        return values
    count = values.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=getattr(_of_thread, "generator", None))
    keep = draws.view(torch.int16)[:count].view(values.shape) >= dropped - _STEPS // 2
    return torch.where(keep, values, 0.0) * (_STEPS / (_STEPS - dropped))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (n, tokens, heads, size); torch's fused one where nothing is dropped.

    Args:
        module: the layer that asks.
        query: (n, heads, tokens, size), as are `key` and `value`.
        key: what it is compared with.
        value: what is mixed.
        attention_mask: (n, 1, 1 or tokens, tokens), false where nothing may be taken from.
        dropout: share of the attention that is dropped.
        scaling: of the scores.
    """
    import torch

    if dropout == 0.0:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
        return mixed.transpose(1, 2).contiguous(), None
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        # added: filling in place by a mask takes several times as long
        scores = scores + torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill(~attention_mask, -torch.inf)
    shares = cheap_dropout(scores.softmax(dim=-1), dropout)
    return (shares @ value).transpose(1, 2).contiguous(), None


def _forward(module: nn.Dropout, values: Tensor) -> Tensor:
    return cheap_dropout(values, module.p) if module.training else values
