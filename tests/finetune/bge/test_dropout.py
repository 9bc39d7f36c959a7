"""Cheap dropout against torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from training_tasks import training_config

from chains.bge.directory import read_model_directory
from chains.bge.encoder import embed, pad
from finetune.bge.dropout import attention, cheap_dropout
from finetune.bge.encoder import training_encoder


def test_the_share_is_dropped_and_the_rest_is_scaled_up() -> None:
    torch.manual_seed(0)
    found = cheap_dropout(torch.ones(1000, 1001), 0.1)
    dropped = (found == 0).float()
    # of a million draws the share strays by .0003, one standard deviation
    assert dropped.mean().item() == pytest.approx(0.1, abs=0.0015)
    assert found.mean().item() == pytest.approx(1.0, abs=0.0015)
    assert found.max().item() == pytest.approx(1 / 0.9, abs=1e-4)
    # neighbours come out of one draw and must not fall together: .01 of the pairs
    assert (dropped[:, 1:] * dropped[:, :-1]).mean().item() == pytest.approx(0.01, abs=0.001)


def test_the_gradient_passes_where_the_value_did() -> None:
    values = torch.randn(7, 3, requires_grad=True)
    found = cheap_dropout(values, 0.5)
    found.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.where(found == 0, 0.0, 2.0))


def test_the_same_seed_drops_the_same_and_another_does_not() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(cheap_dropout(torch.ones(100), 0.3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_drops_next_to_nothing_is_torchs(masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.tensor([5, 2])[:, None, None, None] > torch.arange(5) if masked else None
    module = torch.nn.Module()
    # 1e-6 rounds to no step at all, but goes the way of one
    ours, _ = attention(module, query, key, value, mask, dropout=1e-6, scaling=0.3)
    plain, _ = attention(module, query, key, value, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain, expected.transpose(1, 2), rtol=0, atol=0)


def test_an_encoder_drops_in_training_and_not_in_evaluation(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    encoder = training_encoder(training_config(tiny_model, Path("o"), dropout=0.2), directory, "cpu")
    calls: list[float] = []
    layer = cast("Any", encoder).encoder.layer[0]
    layer.attention.output.dropout.register_forward_hook(
        lambda _, __, output: calls.append((output == 0).float().mean().item())
    )
    ids, mask = pad([[2, *range(10, 60), 3], [2, *range(20, 40), 3]], 0)
    torch.manual_seed(0)
    one, other = (embed(encoder, ids, mask, directory) for _ in range(2))
    assert (one - other).abs().max() > 1e-3
    encoder.eval()
    assert torch.equal(*(embed(encoder, ids, mask, directory) for _ in range(2)))
    # 104 positions of 64: the share strays by .005
    assert calls == [pytest.approx(0.2, abs=0.025)] * 2 + [0.0] * 2
