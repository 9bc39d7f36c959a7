"""One step's gradient over a batch of any size in the memory of a few micro-batches.

Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): encode
everything without a graph, take the loss's gradient with respect to the vectors, then encode again piece by piece and
send each piece's gradient back. Here the pieces whose graphs fit into a budget of tokens keep them and are not encoded
twice, so a small batch costs no more than the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.order import seeded

if TYPE_CHECKING:
    from torch import Tensor


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
    encode: Callable[[MicroBatch], Tensor],
    pieces: Sequence[MicroBatch],
    loss_of: Callable[[Tensor], Tensor],
    *,
    graph_tokens: int,
    seed: int,
) -> Tensor:
    """The loss of a batch, detached; its gradient is added to that of the parameters.

    Args:
        encode: vectors of a piece, (n, d), with a graph where gradients are enabled.
        pieces: all texts of the batch.
        loss_of: the loss, already scaled, from the vectors of all texts, (texts, d), in the order of their places.
        graph_tokens: positions whose graph is kept. More: less is encoded twice, more memory.
        seed: of dropout. Every piece has its own, so that both passes drop the same, whatever the budget is.
    """
    import torch

    kept: list[Tensor | None] = []
    spent = 0
    for number, piece in enumerate(pieces):
        spent += piece.tokens
        torch.manual_seed(seeded(seed, number))
        with torch.set_grad_enabled(spent <= graph_tokens):
            kept.append(encode(piece))
    places = torch.tensor([place for piece in pieces for place in piece.places])
    found = [vectors.detach() for vectors in kept if vectors is not None]
    order = places.argsort().to(found[0].device)  # the vectors back in the order of the batch
    leaf = torch.cat(found)[order].requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    assert leaf.grad is not None
    # In the same order whatever was kept, so that the budget does not change a bit of the sum.
    for number, piece in enumerate(pieces):
        vectors, kept[number] = kept[number], None  # its graph is freed right after
        if vectors is None or not vectors.requires_grad:
            torch.manual_seed(seeded(seed, number))
            vectors = encode(piece)
        vectors.backward(leaf.grad[torch.as_tensor(piece.places, device=leaf.device)].to(vectors.dtype))
        del vectors
    return loss.detach()
