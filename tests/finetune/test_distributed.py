"""What one process's part of a batch is. Two real processes train in bge/test_train.py and reranker/test_run.py."""

from __future__ import annotations

import torch

from finetune.distributed import Processes, joined


def test_parts_of_a_batch_are_contiguous_and_whole() -> None:
    parts = [Processes(rank, 3).share(list(range(6))) for rank in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5]]


def test_alone_nothing_is_exchanged() -> None:
    with joined("cpu") as processes:
        assert processes.first
        own = torch.ones(2, 3)
        assert processes.gather(own) is own
        assert processes.total(2.5, "cpu") == 2.5
