"""The cached gradient is the plain one, and memory does not follow the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chains.bge.directory import ModelDirectory, read_model_directory
from chains.bge.encoder import embed, load_encoder
from finetune.bge.dropout import use_cheap_dropout
from finetune.bge.gradient_cache import MicroBatch, backward, micro_batches
from finetune.bge.loss import Objective, loss_of
from finetune.bge.workers import Workers


@pytest.fixture(scope="module")
def directory(tiny_model: Path) -> ModelDirectory:
    return read_model_directory(tiny_model)


def texts(count: int, *, shortest: int = 4) -> list[list[int]]:
    """Token ids of 20 different lengths."""
    draw = torch.Generator().manual_seed(count)
    return [torch.randint(5, 90, (shortest + number % 20,), generator=draw).tolist() for number in range(count)]


def pieces_of(ids: list[list[int]]) -> list[MicroBatch]:
    return micro_batches(ids, pad_id=0, token_budget=64, max_rows=8, device="cpu")


def in_batch_loss(vectors: torch.Tensor) -> torch.Tensor:
    """Every third text is a query, the two behind it are its passages."""
    groups = vectors.view(-1, 3, vectors.shape[1])
    return loss_of(groups[:, 0], groups[:, 1:].flatten(0, 1), Objective(temperature=0.1))


def gradient(
    directory: ModelDirectory, ids: list[list[int]], graph_tokens: int, *, workers: int = 1
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradient by parameter) with dropout on."""
    encoder = load_encoder(directory).train()
    use_cheap_dropout(encoder)
    loss = backward(
        lambda model, piece: embed(model, piece.input_ids, piece.attention_mask, directory),
        pieces_of(ids),
        in_batch_loss,
        Workers(encoder, workers),
        graph_tokens=graph_tokens,
        seed=7,
    )
    return loss.item(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def test_the_cached_gradient_is_that_of_one_graph_over_the_batch(directory: ModelDirectory) -> None:
    ids = texts(30)
    encoder = load_encoder(directory)  # eval mode: no dropout, since one graph cannot seed each piece
    vectors = torch.empty(len(ids), directory.dimensions)
    for piece in pieces_of(ids):
        vectors[piece.places] = embed(encoder, piece.input_ids, piece.attention_mask, directory)
    plain = in_batch_loss(vectors)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    loss = backward(
        lambda model, piece: embed(model, piece.input_ids, piece.attention_mask, directory),
        pieces_of(ids),
        in_batch_loss,
        Workers(encoder),
        graph_tokens=0,
        seed=0,
    )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, parameter in encoder.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("graph_tokens", [0, 200, 10**6])
def test_how_much_is_cached_does_not_change_a_bit_with_dropout_on(
    directory: ModelDirectory, graph_tokens: int, workers: int
) -> None:
    ids = texts(30)
    expected_loss, expected = gradient(directory, ids, 100, workers=workers)
    loss, found = gradient(directory, ids, graph_tokens, workers=workers)
    assert loss == expected_loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_find_the_gradient_of_one_with_dropout_on(directory: ModelDirectory, workers: int) -> None:
    ids = texts(30)
    expected_loss, expected = gradient(directory, ids, 200)
    loss, found = gradient(directory, ids, 200, workers=workers)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_batch_sixteen_times_as_large_needs_no_more_memory(directory: ModelDirectory) -> None:
    small, large = (peak_of_saved_tensors(directory, texts(count, shortest=40)) for count in (12, 12 * 16))
    assert large <= 1.3 * small


def peak_of_saved_tensors(directory: ModelDirectory, ids: list[list[int]]) -> int:
    """Most bytes that graphs hold at once while a batch is worked on, weights not counted."""
    live = peak = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal live, peak
            self.tensor = tensor
            self.size = 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        gradient(directory, ids, 400)  # of 570 in the small batch
    return peak


def test_pieces_cover_every_text_once_and_are_padded_to_their_longest() -> None:
    ids = texts(30)
    pieces = pieces_of(ids)
    assert sorted(place for piece in pieces for place in piece.places) == list(range(30))
    for piece in pieces:
        assert piece.tokens <= 64
        assert piece.input_ids.shape[1] == max(len(ids[place]) for place in piece.places)
        for line, place in enumerate(piece.places):
            assert piece.input_ids[line, : len(ids[place])].tolist() == ids[place]
