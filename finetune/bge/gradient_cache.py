"""One step's gradient over a batch of any size in the memory of a few micro-batches.

Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): encode
everything without a graph, take the loss's gradient with respect to the vectors, then encode again piece by piece and
send each piece's gradient back. Here the pieces whose graphs fit into a budget of tokens keep them and are not encoded
twice, so a small batch costs no more than the plain way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.bge.dropout import seed_dropout
from finetune.bge.workers import Workers
from finetune.order import seeded

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class MicroBatch:
    """Texts encoded in one forward pass."""

    input_ids: Tensor
    """(n, length)"""
    attention_mask: Tensor | None
    """(n, length); None where nothing is padded"""
    places: list[int]
    """index of each text in its batch"""

    @property
    def tokens(self) -> int:
        """Positions computed, padding included."""
        return self.input_ids.numel()


def micro_batches(
    texts: Sequence[Sequence[int]], *, pad_id: int, token_budget: int, max_rows: int, device: str
) -> list[MicroBatch]:
    """Token ids in padded pieces of like lengths, the longest first, so that a lack of memory shows at once."""
    from chains.bge.batching import length_sorted_batches
    from chains.bge.encoder import pad

    pieces = []
    for places in length_sorted_batches([len(text) for text in texts], token_budget, max_rows):
        ids, mask = pad([texts[place] for place in places], pad_id)
        pieces.append(MicroBatch(ids.to(device), None if mask is None else mask.to(device), places))
    return pieces


def backward(
    encode: Callable[[nn.Module, MicroBatch], Tensor],
    pieces: Sequence[MicroBatch],
    loss_of: Callable[[Tensor], Tensor],
    workers: Workers,
    *,
    graph_tokens: int,
    seed: int,
) -> Tensor:
    """The loss of a batch, detached; its gradient is added to that of the parameters.

    Args:
        encode: vectors of a piece by a worker's model, (n, d), with a graph where gradients are enabled.
        pieces: all texts of the batch.
        loss_of: the loss, already scaled, from the vectors of all texts, (texts, d), in the order of their places.
        workers: who computes the pieces.
        graph_tokens: positions whose graph is kept. More: less is encoded twice, more memory.
        seed: of dropout. Every piece has its own, so that both passes drop the same, whatever the budget is.
    """
    import torch

    spent = list(itertools.accumulate(piece.tokens for piece in pieces))
    kept: list[Tensor | None] = [None] * len(pieces)
    shares = workers.shares([piece.tokens for piece in pieces])

    def forward(model: nn.Module, numbers: list[int]) -> None:
        for number in numbers:
            seed_dropout(seeded(seed, number))
            with torch.set_grad_enabled(spent[number] <= graph_tokens):
                kept[number] = encode(model, pieces[number])

    workers.run(forward, shares)
    places = torch.tensor([place for piece in pieces for place in piece.places])
    found = [vectors.detach() for vectors in kept if vectors is not None]
    order = places.argsort().to(found[0].device)  # the vectors back in the order of the batch
    leaf = torch.cat(found)[order].requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    gradient = leaf.grad
    assert gradient is not None

    def send_back(model: nn.Module, numbers: list[int]) -> None:
        # in the same order whatever was kept, so that the budget does not change a bit of the sum
        for number in numbers:
            piece = pieces[number]
            vectors, kept[number] = kept[number], None  # its graph is freed right after
            if vectors is None or not vectors.requires_grad:
                seed_dropout(seeded(seed, number))
                vectors = encode(model, piece)
            vectors.backward(gradient[torch.as_tensor(piece.places, device=gradient.device)].to(vectors.dtype))
            del vectors

    workers.run(send_back, shares)
    workers.add_up()
    return loss.detach()
