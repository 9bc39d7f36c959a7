"""The loss over the vectors of a batch: InfoNCE, distillation, Matryoshka; equal to FlagEmbedding's for the same rows.

InfoNCE: van den Oord et al. 2018, with in-batch negatives as in Karpukhin et al. 2020 (DPR).
Matryoshka: Kusupati et al. 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    temperature: float = 0.02
    in_batch_negatives: bool = True
    dimensions: tuple[int, ...] = ()
    """prefixes of the vector that must each rank well; empty: the whole vector alone"""
    normalize: bool = True
    """whether a prefix is brought to unit length again, as the whole vector is"""


def loss_of(
    queries: Tensor,
    passages: Tensor,
    objective: Objective,
    *,
    masked: Tensor | None = None,
    teacher: Tensor | None = None,
) -> Tensor:
    """The mean loss of the queries, a scalar.

    Args:
        queries: (n, d); passages: (n x group, d), each query's own in one block, its positive first.
        objective: temperature, negatives, dimensions.
        masked: (n, n x group) bool, True where a passage must not count as a negative.
        teacher: (n, group) scores of a reranker; their softmax is what the scores of the group shall follow. Added to
            InfoNCE with weight 1, as FlagEmbedding's `kl_div` (which leaves out the constant entropy of the teacher).
    """
    if not objective.dimensions:
        return _contrastive(queries, passages, objective, masked, teacher)
    losses = [
        _contrastive(
            _prefix(queries, size, objective.normalize),
            _prefix(passages, size, objective.normalize),
            objective,
            masked,
            teacher,
        )
        for size in objective.dimensions
    ]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total / len(losses)


def _prefix(vectors: Tensor, size: int, normalize: bool) -> Tensor:
    """The first `size` numbers of each vector; of unit length where the whole vector is."""
    from torch.nn import functional

    prefix = vectors[:, :size]
    return functional.normalize(prefix, dim=-1) if normalize else prefix


def _contrastive(
    queries: Tensor, passages: Tensor, objective: Objective, masked: Tensor | None, teacher: Tensor | None
) -> Tensor:
    import torch
    from torch.nn import functional

    group = len(passages) // len(queries)
    rows = torch.arange(len(queries), device=queries.device)
    own = rows[:, None] * group + torch.arange(group, device=queries.device)  # (n, group): each query's passages
    if objective.in_batch_negatives:
        scores = queries @ passages.T / objective.temperature  # (n, n x group)
        group_scores, targets, hidden = scores.gather(1, own), rows * group, masked
    else:
        grouped = passages.view(len(queries), group, -1)  # (n, group, d)
        scores = (queries[:, None] * grouped).sum(-1) / objective.temperature  # (n, group)
        group_scores, targets = scores, torch.zeros_like(rows)
        hidden = None if masked is None else masked.gather(1, own)
    visible = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
    loss = functional.cross_entropy(visible, targets)
    if teacher is not None:
        wanted = functional.softmax(teacher, dim=-1)  # (n, group)
        loss = loss - (functional.log_softmax(group_scores, dim=-1) * wanted).sum(-1).mean()
    return loss


def largest_dimension_problem(dimensions: Sequence[int], size: int) -> int | None:
    """The first Matryoshka dimension that the model does not have, or None."""
    return next((dimension for dimension in dimensions if dimension > size), None)
