"""A copy of an exact FAISS index on a GPU, for searching; the index itself stays in memory, and is what is saved."""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

MOST_HITS = 2048  # that FAISS gives from a GPU in one search (1.15)
_BLOCK = 50_000  # vectors copied at once


@functools.cache
def gpu_is_there() -> bool:
    """Whether FAISS was built for GPUs and finds one; says so once in the log."""
    import faiss

    count = int(getattr(faiss, "get_num_gpus", lambda: 0)())
    if count:
        logger.info("exact FAISS indexes are searched on the GPU: FAISS finds %d", count)
    return count > 0


def copy_to_gpu(index: Any) -> Any | None:
    """An inner-product index on the first GPU with the index's vectors, in half precision.

    None, with the reason in the log, where there is no GPU or the vectors do not fit: search the index itself then.
    """
    if not gpu_is_there():
        return None
    import faiss

    try:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        copy = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), index.d, config)
        for start in range(0, index.ntotal, _BLOCK):
            copy.add(index.reconstruct_n(start, min(_BLOCK, index.ntotal - start)))
    except (RuntimeError, MemoryError) as error:  # FAISS tells a full GPU as RuntimeError
        logger.warning("the FAISS index is searched on the CPU: it could not be copied to the GPU (%s)", error)
        return None
    return copy
