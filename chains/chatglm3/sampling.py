"""The next token from a row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the options mean what they mean to transformers' `generate`."""

    temperature: float = 0.0
    """0: always the likeliest"""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit"""
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    seed: int | None = None
    """the same seed gives the same answer"""

    def generator(self) -> Generator:
        """The source of chance of one answer. On the CPU, so that a seed means the same on every device."""
        import torch

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits: Tensor, sampling: Sampling, seen: Sequence[int], generator: Generator) -> int:
    """The id of the next token.

    Args:
        logits: of one sequence, shape (vocabulary,).
        sampling: options.
        seen: ids of the prompt and of the answer so far, for the repetition penalty.
        generator: on the CPU; not used where the temperature is 0.
    """
    import torch

    if sampling.repetition_penalty != 1.0:
        logits = _penalised(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, ids = _candidates(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p)
    drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator)
    return int(ids[drawn])


def _penalised(logits: Tensor, penalty: float, seen: Sequence[int]) -> Tensor:
    """Logits of tokens seen before made smaller: divided where positive, multiplied where negative (CTRL, 2019)."""
    import torch

    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    scores = logits[ids]
    return logits.index_copy(0, ids, torch.where(scores < 0, scores * penalty, scores / penalty))


def _candidates(scores: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(scores, ids), the likeliest first: the best `top_k`, of those the fewest that together reach `top_p`."""
    scores, ids = scores.topk(min(top_k or len(scores), len(scores)))
    if top_p < 1:
        before = scores.softmax(-1).cumsum(-1) - scores.softmax(-1)
        keep = before < top_p  # the first one always: nothing is before it
        keep[0] = True
        scores, ids = scores[keep], ids[keep]
    return scores, ids.cpu()
