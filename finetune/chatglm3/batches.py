"""Examples as tensors: rows packed end to end without padding, or padded batches of like lengths.

Packed rows do not see each other: position ids begin anew with each, there is no attention mask and no cache, which is
how transformers (5.23, `masking_utils.find_packed_sequence_indices`) tells where a row ends; a model with row attention
is told the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chains.bge.batching import length_sorted_batches
from chains.chatglm3.prompt import IGNORED
from finetune.chatglm3.attention import has_row_attention
from finetune.chatglm3.config import Batching
from finetune.chatglm3.data import Example

if TYPE_CHECKING:
    from torch import Tensor

_MAX_ROWS = 256  # of a padded batch; its positions are what is bounded


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass works on."""

    input_ids: Tensor
    """(rows, length); packed: (1, tokens)"""
    position_ids: Tensor
    """of the same shape"""
    attention_mask: Tensor | None
    """of the same shape, 0 on padding; None where rows are packed"""
    places: Tensor
    """(labels,): where in the flattened batch the hidden state stands that predicts each label"""
    targets: Tensor
    """(labels,)"""
    row_lengths: tuple[int, ...] | None = None
    """tokens of each packed row"""


def plan(lengths: Sequence[int], *, batching: Batching, capacity: int) -> list[list[int]]:
    """Which examples share a forward pass, by index; each once, none longer than `capacity` positions together."""
    if batching == "packed":
        return pack(lengths, capacity)
    return length_sorted_batches(lengths, capacity, _MAX_ROWS)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in packs of at most `capacity` tokens: the longest first, each into the fullest pack that holds it.

    Best-fit decreasing (Johnson 1973): never more than 11/9 of the fewest packs possible, and one.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        fits = [number for number, free in enumerate(room) if free >= lengths[index]]
        if not fits:
            packs.append([])
            room.append(capacity)
            fits = [len(packs) - 1]
        best = min(fits, key=lambda number: (room[number], number))
        packs[best].append(index)
        room[best] -= lengths[index]
    return packs


def share(batches: Sequence[list[int]], sizes: Sequence[int], *, rank: int, count: int) -> list[list[int]]:
    """One process's part of a step: the batches dealt out so that all have about the same to do.

    Args:
        batches: indices of each forward pass.
        sizes: tokens of each of them.
        rank: this process's number.
        count: of processes.
    """
    loads = [0] * count
    own = []
    for number in sorted(range(len(batches)), key=lambda place: (-sizes[place], place)):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        if least == rank:
            own.append(batches[number])
    return own


def packed(examples: Sequence[Example], device: str) -> MicroBatch:
    """Examples end to end in one row."""
    import torch

    ids = [number for example in examples for number in example.ids]
    positions = [place for example in examples for place in range(len(example.ids))]
    places, targets, start = [], [], 0
    for example in examples:
        for place, label in _predictions(example):
            places.append(start + place)
            targets.append(label)
        start += len(example.ids)
    return MicroBatch(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=None,
        places=torch.tensor(places, device=device),
        targets=torch.tensor(targets, device=device),
        row_lengths=tuple(len(example.ids) for example in examples),
    )


def padded(examples: Sequence[Example], device: str, *, pad_id: int) -> MicroBatch:
    """Examples one below the other, padded on the right to the longest."""
    import torch

    width = max(len(example.ids) for example in examples)
    rows = [[*example.ids, *[pad_id] * (width - len(example.ids))] for example in examples]
    mask = [[1] * len(example.ids) + [0] * (width - len(example.ids)) for example in examples]
    found = [(row * width + place, label) for row, ex in enumerate(examples) for place, label in _predictions(ex)]
    return MicroBatch(
        input_ids=torch.tensor(rows, device=device),
        position_ids=torch.arange(width, device=device).expand(len(rows), -1),
        attention_mask=torch.tensor(mask, device=device),
        places=torch.tensor([place for place, _ in found], device=device),
        targets=torch.tensor([label for _, label in found], device=device),
    )


def answer_loss(model: Any, batch: MicroBatch) -> Tensor:
    """The sum of the labels' cross entropies; logits are computed for these alone.

    Args:
        model: a GlmForCausalLM, with or without a PEFT adapter.
        batch: what to work on.
    """
    from torch.nn.functional import cross_entropy

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask, rows = batch.attention_mask, {}
    if batch.row_lengths is not None and has_row_attention(inner):
        # a mask of four dimensions is taken as it is, so that none is made; row by row it is not looked at
        mask, rows = batch.input_ids.new_zeros(1, 1, 1, 1), {"row_lengths": batch.row_lengths}
    hidden = inner.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False, **rows
    ).last_hidden_state
    logits = inner.lm_head(hidden.flatten(0, 1)[batch.places])
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


def _predictions(example: Example) -> list[tuple[int, int]]:
    """(place whose state predicts it, label) of every token that is learned."""
    return [(place, label) for place, label in enumerate(example.labels[1:]) if label != IGNORED]
