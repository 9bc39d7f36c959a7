"""A step's table of words gives the gradient that the embedding itself would have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training_tasks import training_config

from chains.bge.directory import read_model_directory
from chains.bge.encoder import embed, load_encoder, pad
from finetune.bge.encoder import training_encoder
from finetune.bge.word_table import word_table

PIECES = [pad([[2, 40, 41, 41, 3], [2, 50, 3]], 0), pad([[2, 41, 60, 3]], 0)]


def gradients(encoder: Any, directory: Any) -> dict[str, torch.Tensor]:
    for ids, mask in PIECES:
        embed(encoder, ids, mask, directory)[:, 0].sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def test_all_gradients_are_those_without_a_table(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    encoder = load_encoder(directory)
    expected = gradients(encoder, directory)
    encoder.zero_grad()
    with word_table([encoder], [ids for ids, _ in PIECES]):
        gradients(encoder, directory)
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    # words 2, 3, 40, 41, 50 and 60 were read, padding learns nothing
    touched = found["embeddings.word_embeddings.weight"].abs().sum(dim=1).nonzero().flatten()
    assert touched.tolist() == [2, 3, 40, 41, 50, 60]


def test_afterwards_words_outside_the_table_are_read_again(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    encoder: Any = load_encoder(directory)
    ids, mask = pad([[2, 70, 3]], 0)
    before = embed(encoder, ids, mask, directory)
    with word_table([encoder], [ids for ids, _ in PIECES]):
        pass
    assert torch.equal(embed(encoder, ids, mask, directory), before)
    assert encoder.get_input_embeddings().weight.grad is None


def test_a_frozen_embedding_stays_as_it_is(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    encoder: Any = training_encoder(training_config(tiny_model, Path("o"), method="lora"), directory, "cpu")
    with word_table([encoder], []):
        found = gradients(encoder, directory)
    assert found
    assert all("lora_" in name for name in found)
