"""EnginePool: batches spread over the cores of a CPU, or over several GPUs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from chains.bge.batching import length_sorted_batches
from chains.bge.engines import Engine, Row
from chains.embeddings import Vectors

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class EnginePool(Generic[Row]):
    """One or more engines over the same weights, batches going to whichever is free."""

    def __init__(self, engines: Sequence[Engine[Row]]) -> None:
        """Args are the engines, one for each device."""
        self.engines = list(engines)

    def compute(self, rows: Sequence[Row], width: int) -> Vectors:
        """What the engines make of rows, `width` numbers of each, in order: (n, width) float32."""
        found = np.zeros((len(rows), width), np.float32)
        limits = self.engines[0].limits
        batches = length_sorted_batches([len(row) for row in rows], limits.token_budget, limits.rows)
        slots = self._slots(len(batches))

        def compute(batch: list[int]) -> None:
            engine = slots.get()
            try:
                found[batch] = engine.compute([rows[index] for index in batch])
            finally:
                slots.put(engine)

        if slots.qsize() <= 1:  # one batch: all cores on it
            for batch in batches:
                compute(batch)
            return found
        if self._one_core_each:  # they wait for nobody; one batch on all cores waits at the end of every product
            threads = ThreadPoolExecutor(slots.qsize(), initializer=_use_one_core, initargs=(cores(),))
        else:
            threads = ThreadPoolExecutor(slots.qsize())
        with threads:
            list(threads.map(compute, batches))
        return found

    @property
    def _one_core_each(self) -> bool:
        return len(self.engines) == 1 and self.engines[0].parallel

    def _slots(self, batches: int) -> queue.SimpleQueue[Engine[Row]]:
        """Each engine as often as it may compute at once."""
        slots: queue.SimpleQueue[Engine[Row]] = queue.SimpleQueue()
        copies = cores() if self._one_core_each else 1 + self.engines[0].ahead
        for _ in range(min(copies, batches)):
            for engine in self.engines:
                slots.put(engine)
        return slots


def ahead(function: Callable[[_In], _Out], inputs: Iterable[_In]) -> Iterator[_Out]:
    """`map(function, inputs)`, the next result computed in another thread while the caller is busy with one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in inputs:
            coming = thread.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def cores() -> int:
    """Threads that torch computes with: cores this process may use, or fewer where OMP_NUM_THREADS says so."""
    import torch

    return int(torch.get_num_threads())


def _use_one_core(usual: int) -> None:
    """Let this thread compute alone, and threads to come with the usual number.

    torch keeps a number for each thread, and one that new threads begin with: setting the first sets both, so another
    thread puts the second one back. It is given, not read here, where it may be that of a thread just beginning.
    """
    import torch

    torch.get_num_threads()  # what a thread begins with is set when it first asks: later it would undo the next line
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restoring.start()
    restoring.join()
