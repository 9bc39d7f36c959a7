"""Sampling against transformers' own processors."""

from __future__ import annotations

import pytest

from chains.chatglm3.sampling import Sampling, _candidates, _penalised, choose

torch = pytest.importorskip("torch", reason="needs the extra [models]")
transformers = pytest.importorskip("transformers", reason="needs the extra [models]")

LOGITS = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.3, 20, 1.0), (0.9, 50, 0.5)]
)
def test_probabilities_are_transformers(temperature: float, top_k: int, top_p: float) -> None:
    from transformers.generation import logits_process

    scores = logits_process.TemperatureLogitsWarper(temperature)(None, LOGITS[None])
    if top_k:
        scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    kept, ids = _candidates(LOGITS / temperature, top_k, top_p)
    ours = torch.zeros(500).index_put((ids,), kept.softmax(-1))
    assert torch.allclose(ours, scores[0].softmax(-1), atol=1e-6)


def test_repetition_penalty_is_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    seen = [3, 7, 7, 499]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), LOGITS[None].clone())[0]
    assert torch.equal(_penalised(LOGITS, 1.3, seen), theirs)


def test_temperature_0_takes_the_likeliest() -> None:
    sampling = Sampling(temperature=0)
    assert choose(LOGITS, sampling, [], sampling.generator()) == int(LOGITS.argmax())


def test_the_smallest_top_p_leaves_one() -> None:
    sampling = Sampling(temperature=1, top_p=1e-9, seed=1)
    assert choose(LOGITS, sampling, [], sampling.generator()) == int(LOGITS.argmax())


def test_the_same_seed_draws_the_same() -> None:
    def draw(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        generator = sampling.generator()
        return [choose(LOGITS, sampling, [], generator) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)
