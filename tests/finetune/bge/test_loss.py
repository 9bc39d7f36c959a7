"""The loss against FlagEmbedding's own functions, and what masking takes out of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune.bge.loss import Objective, loss_of


@pytest.fixture(scope="module")
def flag() -> Any:
    """FlagEmbedding's model around nothing: its losses take vectors."""
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel

    return BiEncoderOnlyEmbedderModel(torch.nn.Identity(), temperature=0.02, normalize_embeddings=True)


def vectors(count: int, *, seed: int, size: int = 16) -> torch.Tensor:
    made = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(made, dim=-1)


QUERIES, PASSAGES = vectors(5, seed=1), vectors(15, seed=2)  # groups of three
TEACHER = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)) * 3


def test_in_batch_loss_is_flagembeddings(flag: Any) -> None:
    _, expected = flag._compute_in_batch_neg_loss(QUERIES, PASSAGES)
    assert loss_of(QUERIES, PASSAGES, Objective()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_loss_over_the_group_alone_is_flagembeddings(flag: Any) -> None:
    _, expected = flag._compute_no_in_batch_neg_loss(QUERIES, PASSAGES)
    found = loss_of(QUERIES, PASSAGES, Objective(in_batch_negatives=False))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("in_batch", [True, False])
def test_distillation_is_flagembeddings_kl_div(flag: Any, in_batch: bool) -> None:
    theirs = flag._compute_in_batch_neg_loss if in_batch else flag._compute_no_in_batch_neg_loss
    _, expected = theirs(QUERIES, PASSAGES, teacher_targets=functional.softmax(TEACHER, dim=-1))
    found = loss_of(QUERIES, PASSAGES, Objective(in_batch_negatives=in_batch), teacher=TEACHER)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_matryoshka_is_the_mean_over_prefixes_of_unit_length(flag: Any) -> None:
    expected = []
    for size in (4, 16):
        parts = [functional.normalize(part[:, :size], dim=-1) for part in (QUERIES, PASSAGES)]
        expected.append(flag._compute_in_batch_neg_loss(*parts)[1].item())
    found = loss_of(QUERIES, PASSAGES, Objective(dimensions=(4, 16)))
    assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_a_masked_passage_weighs_nothing() -> None:
    # by hand: scores 1/.5 = 2 for the positive, 0 for the other row's; without the latter one choice is left
    queries, passages = torch.eye(2), torch.eye(2)
    objective = Objective(temperature=0.5)
    assert loss_of(queries, passages, objective).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert loss_of(queries, passages, objective, masked=~torch.eye(2, dtype=torch.bool)).item() == 0.0


def test_a_masked_passage_of_the_own_group_weighs_nothing() -> None:
    masked = torch.zeros(5, 15, dtype=torch.bool)
    masked[0, 1] = masked[0, 2] = True
    objective = Objective(in_batch_negatives=False)
    rest = loss_of(QUERIES[1:], PASSAGES[3:], objective).item() * 4 / 5  # the first query has one choice: loss 0
    assert loss_of(QUERIES, PASSAGES, objective, masked=masked).item() == pytest.approx(rest, rel=1e-6)


def test_masking_and_distillation_together_stay_finite() -> None:
    masked = torch.zeros(5, 15, dtype=torch.bool)
    masked[0, 1] = True
    queries = QUERIES.clone().requires_grad_()
    loss_of(queries, PASSAGES, Objective(), masked=masked, teacher=TEACHER).backward()
    assert queries.grad is not None and torch.isfinite(queries.grad).all()


def test_one_row_without_negatives_has_loss_zero() -> None:
    assert loss_of(QUERIES[:1], PASSAGES[:1], Objective()).item() == 0.0
