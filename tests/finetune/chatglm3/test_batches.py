"""Packed and padded batches: nothing leaks between rows, and the loss is transformers' own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.chatglm3.attention import use_row_attention
from finetune.chatglm3.batches import answer_loss, pack, packed, padded, plan, share
from finetune.chatglm3.copy_task import copy_rows
from finetune.chatglm3.data import Example, read_examples


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples(tiny: Path) -> list[Example]:
    tokenizer = ChatGLM3Tokenizer.from_directory(tiny)
    return read_examples(copy_rows(6, seed=4, references=(1, 5)), tokenizer, max_tokens=200, language="zh")


def alone(model: Any, example: Example) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([example.ids])).logits[0]


def test_a_packed_row_has_the_logits_of_the_row_alone(model: Any, examples: list[Example]) -> None:
    batch = packed(examples, "cpu")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
    start = 0
    for example in examples:
        found = logits[start : start + len(example.ids)]
        assert (found - alone(model, example)).abs().max() <= 1e-5
        start += len(example.ids)


def test_a_packed_row_is_blind_to_what_its_neighbours_say(model: Any, examples: list[Example]) -> None:
    """Were rows to leak, another first row would change the last one."""
    others = [examples[1], examples[-1]], [examples[2], examples[-1]]
    tails = []
    for pair in others:
        batch = packed(pair, "cpu")
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        tails.append(logits[-len(examples[-1].ids) :])
    assert (tails[0] - tails[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_the_loss_is_the_sum_that_transformers_computes_row_by_row(
    model: Any, examples: list[Example], form: str
) -> None:
    batch = packed(examples, "cpu") if form == "packed" else padded(examples, "cpu", pad_id=0)
    with torch.no_grad():
        found = answer_loss(model, batch)
        wanted = sum(
            model(input_ids=torch.tensor([ex.ids]), labels=torch.tensor([ex.labels])).loss * ex.learned
            for ex in examples
        )
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_row_attention_gives_the_loss_and_the_gradient_of_the_masked_pack(tiny: Path, examples: list[Example]) -> None:
    from transformers import AutoModelForCausalLM

    masked = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    by_row = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    use_row_attention(by_row)
    losses = [answer_loss(model, packed(examples, "cpu")) for model in (masked, by_row)]
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    for one, other in zip(masked.parameters(), by_row.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() <= 1e-4
    assert (alone(masked, examples[0]) - alone(by_row, examples[0])).abs().max() <= 1e-5  # as before without rows


def test_packs_hold_every_row_once_and_never_too_much() -> None:
    draw = random.Random(5)
    lengths = [draw.randint(1, 100) for _ in range(300)]
    packs = pack(lengths, 100)
    assert sorted(index for one in packs for index in one) == list(range(300))
    assert all(sum(lengths[index] for index in one) <= 100 for one in packs)
    # best-fit decreasing needs at most 11/9 of the packs that the sum alone demands, and one more
    assert len(packs) <= sum(lengths) / 100 * 11 / 9 + 2


def test_packing_by_hand() -> None:
    assert pack([60, 30, 50, 40, 20], 100) == [[0, 3], [2, 1, 4]]
    assert pack([], 100) == []


def test_grouped_batches_count_their_padding() -> None:
    batches = plan([10, 90, 20, 80], batching="grouped", capacity=200)
    assert batches == [[1, 3], [2, 0]]


def test_processes_share_the_forward_passes_of_a_step() -> None:
    batches = [[0], [1], [2], [3], [4]]
    sizes = [50, 40, 30, 20, 10]
    shares = [share(batches, sizes, rank=rank, count=2) for rank in range(2)]
    assert sorted(one for own in shares for one in own) == batches
    assert [sum(sizes[one[0]] for one in own) for own in shares] == [80, 70]  # 50+20+10 and 40+30
    assert share(batches[:1], sizes[:1], rank=1, count=2) == []
