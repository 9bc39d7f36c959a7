"""The word embeddings of one step.

A gradient of an embedding is as large as the vocabulary, and every micro-batch would fill one with zeros and add it to
the last. Here the few thousand words of a step stand in a small table, whose gradient goes back once at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from chains.bge.encoder import base_model

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def word_table(encoder: nn.Module, input_ids: Sequence[Tensor]) -> Iterator[None]:
    """The encoder looks words up in a table of those in `input_ids`; on leaving their gradient is the embedding's.

    Without an embedding that is trained nothing changes.
    """
    import torch

    embedding = cast("Any", base_model(encoder)).get_input_embeddings()
    weight = embedding.weight
    if not weight.requires_grad:
        yield
        return
    words = torch.cat([ids.flatten() for ids in input_ids]).unique()
    table = weight.detach()[words].requires_grad_()
    places = torch.empty(len(weight), dtype=torch.long, device=weight.device)
    places[words] = torch.arange(len(words), device=weight.device)
    embedding.forward = lambda ids: torch.nn.functional.embedding(places[ids], table)
    try:
        yield
    finally:
        del embedding.forward  # the class's own shows again
    if table.grad is None:
        return
    if embedding.padding_idx is not None:
        table.grad[words == embedding.padding_idx] = 0.0
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.index_add_(0, words, table.grad)
