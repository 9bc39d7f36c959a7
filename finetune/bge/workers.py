"""Workers: the cores of a CPU, each computing a share of a step's texts on its own.

Two threads that share every operation wait for each other at the end of each, and in a small model that is most of the
time: BERT-mini trains 1.35 times as fast on two cores as on one. Two threads with a core each and texts of their own
wait once a step.

The result is the same in every run with as many workers: a worker's texts, their order and the order in which the
workers' gradients are added up depend on the batch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from chains.bge.pool import cores
from finetune.bge.dropout import draw_in_this_thread

if TYPE_CHECKING:
    from torch import nn

MOST_WORKERS = 4
"""Each has gradients of its own, as large as the model; more cores than that share a worker's operations."""


class Workers:
    """A few threads over one model; a single one computes in the thread that asks."""

    def __init__(self, model: nn.Module, count: int = 1) -> None:
        """Args are the model as it is trained, and how many work at once; weights that change later are seen by all."""
        self.models = [model, *(_view(model) for _ in range(count - 1))]
        self._cores = cores()
        self._cores_each = max(1, self._cores // count)
        self._threads = ThreadPoolExecutor(count, initializer=self._begin) if count > 1 else None

    @staticmethod
    def fitting(device: str) -> int:
        """How many suit a device: one for a GPU, a few for the cores that torch may use."""
        return min(MOST_WORKERS, cores()) if device == "cpu" else 1

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Numbers of pieces for each worker, in order, about equally costly: each goes to who has least."""
        shares: list[list[int]] = [[] for _ in self.models]
        sums = [0] * len(shares)
        for number, cost in enumerate(costs):
            least = sums.index(min(sums))
            shares[least].append(number)
            sums[least] += cost
        return shares

    def run(self, work: Callable[[nn.Module, list[int]], None], shares: Sequence[list[int]]) -> None:
        """Each worker does its share with its model, all at once."""
        if self._threads is None:
            work(self.models[0], shares[0])
            return
        import torch

        # of the thread and, in MKL, of the whole process: workers' products must not be split among all cores
        torch.set_num_threads(self._cores_each)
        try:
            list(self._threads.map(work, self.models, shares))  # an error of one is raised here
        finally:
            torch.set_num_threads(self._cores)

    def add_up(self) -> None:
        """Bring the gradients of all workers into the model, where the optimizer finds them."""
        for other in self.models[1:]:
            for mine, its in zip(self.models[0].parameters(), other.parameters(), strict=True):
                if its.grad is None:
                    continue
                mine.grad = its.grad if mine.grad is None else mine.grad.add_(its.grad)
                its.grad = None

    def _begin(self) -> None:
        import torch

        torch.set_num_threads(self._cores_each)
        draw_in_this_thread()


def _view(model: nn.Module) -> nn.Module:
    """A copy of a model's modules over the same numbers, with gradients of its own."""
    import torch

    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
