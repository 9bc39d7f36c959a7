"""The word embeddings of one step.

A gradient of an embedding is as large as the vocabulary, and every micro-batch would fill one with zeros and add it to
the last. Here the few thousand words of a step stand in a small table, whose gradient goes back once at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from chains.bge.encoder import base_model

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def word_table(encoders: Sequence[nn.Module], input_ids: Sequence[Tensor]) -> Iterator[None]:
    """The encoders look words up in a table of those in `input_ids`; on leaving its gradient is that of the first.

    Without an embedding that is trained nothing changes.

    Args:
        encoders: a model and views of it with gradients of their own; each has a table of its own.
        input_ids: all that they will be asked.
    """
    import torch

    embeddings = [cast("Any", base_model(encoder)).get_input_embeddings() for encoder in encoders]
    weight, padding = embeddings[0].weight, embeddings[0].padding_idx
    if not weight.requires_grad:
        yield
        return
    words = torch.cat([ids.flatten() for ids in input_ids]).unique()
    places = torch.empty(len(weight), dtype=torch.long, device=weight.device)
    places[words] = torch.arange(len(words), device=weight.device)
    tables = []
    for embedding in embeddings:
        tables.append(weight.detach()[words].requires_grad_())
        embedding.forward = functools.partial(_looked_up, places, tables[-1])
    try:
        yield
    finally:
        for embedding in embeddings:
            del embedding.forward  # the class's own shows again
    for table in tables:
        if table.grad is None:
            continue
        if padding is not None:
            table.grad[words == padding] = 0.0
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, words, table.grad)


def _looked_up(places: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.embedding(places[ids], table)
