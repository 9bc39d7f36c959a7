"""Several processes that train one model: started by torchrun, joined over nccl (GPU) or gloo (CPU)."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Every method is a plain no-op where it is the only one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """number on its machine, which is the number of its GPU"""

    @property
    def first(self) -> bool:
        """Whether this process writes, logs and evaluates."""
        return self.rank == 0

    def share(self, items: list[_T]) -> list[_T]:
        """This process's part of a batch: a contiguous one, so that gathered parts are in the batch's order."""
        size = len(items) // self.count
        return items[self.rank * size : (self.rank + 1) * size]

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes, (count x n, d), in the order of ranks; gradients flow to this process's own.

        Each process computes the loss of the whole batch. The sum of what flows back to each is the whole gradient.
        """
        if self.count == 1:
            return own
        import torch
        from torch import distributed

        parts = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(parts, own.detach().contiguous())
        parts[self.rank] = own
        return torch.cat(parts)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the sum over the processes."""
        if self.count == 1:
            return
        from torch import distributed

        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    def total(self, value: float, device: str) -> float:
        """The sum of a number over the processes, the same on all of them."""
        if self.count == 1:
            return value
        import torch
        from torch import distributed

        summed = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(summed)
        return float(summed)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that torchrun started; alone where it was started plainly.

    Args:
        device: "auto", "cpu", "cuda" ...: decides between nccl and gloo.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    import torch
    from torch import distributed

    on_gpu = device != "cpu" and torch.cuda.is_available()
    started_here = not distributed.is_initialized()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if started_here:
        # the others wait while the first evaluates, which may take longer than nccl's ten minutes
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=12))
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), local_rank)
    logger.info("process %d of %d", processes.rank + 1, processes.count)
    try:
        yield processes
    finally:
        if started_here:
            distributed.destroy_process_group()
