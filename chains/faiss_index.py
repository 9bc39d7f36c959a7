"""FaissIndex: nearest vectors of one generation, a cache of the knowledge base that follows it and can be lost."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chains.caches import beside, read_cache, write_cache
from chains.embeddings import Vectors
from chains.faiss_gpu import MOST_HITS, copy_to_gpu, gpu_is_there
from chains.knowledge_base import Changes, Generation, Ids, KnowledgeBase
from loaders.config import Config

logger = logging.getLogger(__name__)

Kind = Literal["flat", "sq8", "hnsw", "pq"]

_TRAINING_VECTORS = 50_000
_TRAINING_LEAST = 1_000  # FAISS refuses to find sixteen centres in fewer vectors, and warns below 39 each
_LEAST_TRAINED = 1_000
_DEAD_AT_ONCE = 64
_COMPACTED_AT_ONCE = 5_000  # positions, up to which the files are written anew in milliseconds when one dies
_GRAPH_REBUILT_UP_TO = 200_000  # a graph cannot give up a point, only be built without it; so many take minutes
_DEAD_SHARE = 0.2  # of the positions, from which on the next search waits until they are taken out
_GPU_TIMES = 50  # as many vectors are searched exactly where a GPU does it: 2 GB of its memory
_CANDIDATES = 600  # rescored by the second stage of `pq`; recall@10 .99 on 118k, .98 on 1M lexical vectors


@dataclass(frozen=True)
class _Kind:
    factory: str
    """FAISS's index factory string, with {d} for the dimensions and {quarter} for a quarter of them"""
    reason: str


# Measured on 2 cores with 1,024 dimensions, see benchmarks/results: one query over 118k / 1M vectors.
_KINDS: dict[Kind, _Kind] = {
    "flat": _Kind("SQfp16", "exact over half-precision vectors, 4 ms at 20k"),
    "sq8": _Kind("SQ8", "8 bits a dimension, half the memory of flat, recall@10 .99"),
    "hnsw": _Kind("HNSW32,SQ8", "a graph: fastest to search, slow to build; for semantic embeddings only"),
    # Turned at random first, so that codes learned from some vectors suit others. RaBitQfs, with as many bits, finds
    # as much in twice the time: it corrects every distance by a factor of its own (FAISS 1.15).
    "pq": _Kind("RR{d},PQ{quarter}x4fs,Refine(SQ8)", "1 bit a dimension, the best 600 rescored with 8 bits"),
}


class FaissConfig(Config):
    """The FAISS index over the knowledge base's vectors."""

    type: Literal["faiss"] = Field(default="faiss", alias="_type")
    index: Literal["auto"] | Kind = Field(default="auto", description="kind of index; auto chooses by size")
    exact_up_to: int = Field(
        default=20_000, ge=0, description="vectors of 1,024 dimensions (more shorter ones) that auto searches exactly"
    )


class FaissIndex:
    """Inner-product search over one generation's vectors.

    It follows the knowledge base at the cost of what changed. The vectors of removed chunks are found no more at once:
    they stay as dead positions, which a search passes over and of which the state file tells. `compact` takes them out
    of memory and file, for whoever removed something to call when the user has his answer; a small index does it when
    it is saved, and any index before the next search when a fifth of it is dead.
    """

    def __init__(
        self, knowledge_base: KnowledgeBase, generation: Generation, config: FaissConfig | None = None
    ) -> None:
        self._kb = knowledge_base
        self._generation = generation
        self._config = config or FaissConfig()
        self._file = knowledge_base.path / f"faiss-{generation.id}.index"
        self._state = knowledge_base.path / f"faiss-{generation.id}.state"
        self._lock = threading.Lock()
        self._revision = self._saved = ""
        self._kind: Kind = "flat"
        self._ids: Ids = np.zeros(0, np.int64)  # chunk id by position, -1 where dead
        self._alive = 0  # positions that are not dead
        self._whole = False  # whether it had a vector of every chunk of its revision
        self._index: Any = None
        self._gpu: Any = None  # a copy of an exact index; None where there is no GPU
        # whether the index file is what is in memory; positions that died are told by the state file alone
        self._file_is_current = False
        self._checksum = 0
        self._written: tuple[int, ...] = ()  # the signature of the index file that is in memory
        self._threads = os.cpu_count() or 1
        self._load()

    def search(self, vector: Vectors, k: int, allowed: Ids | None = None) -> list[tuple[int, float]]:
        """(chunk id, cosine) of the k nearest chunks, nearest first, ties by id; only `allowed` ids where given."""
        with self._lock:
            self._refresh()
            if k <= 0 or self._index is None:
                return []
            query = vector.reshape(1, -1)
            # FAISS shares queries out among threads, never one query (1.15): a second thread would only wait for the
            # first, spinning on the processor that BM25 works on
            with _omp_threads(1):
                found = self._search_alive(query, k) if allowed is None else self._search_allowed(query, k, allowed)
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]

    def save(self) -> None:
        """Write the cache files where they are behind: after a removal the small state file, after an addition both."""
        with self._lock:
            self._refresh()
            if self._dead and len(self._ids) <= _COMPACTED_AT_ONCE:
                self._take_out_dead()
            self._write()

    def compact(self) -> None:
        """Take what was removed out of memory and files for good, and save; nothing to do where nothing was.

        Takes a second for 100,000 vectors. A graph (`hnsw`) is built anew, up to 200,000 vectors; a bigger one keeps
        its dead positions until they are a fifth of it.
        """
        with self._lock:
            self._refresh()
            if self._dead and (self._kind != "hnsw" or len(self._ids) <= _GRAPH_REBUILT_UP_TO):
                self._take_out_dead()
            self._write()

    def _write(self) -> None:
        import faiss

        if self._saved == self._revision and (self._index is None or self._file_is_current):
            return
        if self._index is None:  # nothing is left to find, nor to keep
            self._file.unlink(missing_ok=True)
            self._state.unlink(missing_ok=True)
            self._saved = self._revision
            return
        try:
            if not self._file_is_current or _signature(self._file) != self._written:  # another process may have saved
                with beside(self._file) as temporary:
                    faiss.write_index(self._index, str(temporary))
                    self._checksum = _checksum(temporary)
                    self._written = _signature(temporary)
                self._file_is_current = True
            header = {"revision": self._revision, "kind": self._kind, "crc32": self._checksum, "whole": self._whole}
            write_cache(self._state, header, self._ids.tobytes())
        except (OSError, RuntimeError) as error:  # the cache can always be made again; FAISS tells RuntimeError
            logger.warning("cannot save %s (%s); it will be rebuilt when next opened", self._file.name, error)
            return
        self._saved = self._revision

    def ids(self) -> Ids:
        """Ids of the chunks it finds, ascending."""
        with self._lock:
            self._refresh()
            return np.sort(self._ids[self._ids >= 0])

    @property
    def kind(self) -> Kind:
        """The kind of index in use."""
        with self._lock:
            self._refresh()
            return self._kind

    # -- following the knowledge base ------------------------------------------------------------------------------

    def _load(self) -> None:
        import faiss

        cached = read_cache(self._state)
        if cached is None:
            return
        header, payload = cached
        if not self._kb.knows_revision(header["revision"]):
            logger.info("%s belongs to another state of the knowledge base; rebuilding it", self._file.name)
            return
        try:
            self._written = _signature(self._file)
            if _checksum(self._file) != header["crc32"]:
                logger.warning("%s is damaged or of another moment; rebuilding it", self._file.name)
                return
            index = faiss.read_index(str(self._file))
        except (OSError, RuntimeError) as error:
            logger.warning("%s cannot be read (%s); rebuilding it", self._file.name, error)
            return
        if _signature(self._file) != self._written:  # another process saved it since it was checked
            logger.info("%s was replaced while it was read; rebuilding it", self._file.name)
            return
        self._index = index
        self._ids, self._kind = np.frombuffer(payload, np.int64).copy(), header["kind"]
        self._alive, self._whole = int((self._ids >= 0).sum()), header.get("whole", False)
        if self._choose_kind(self._alive) != self._kind:
            logger.info("%s is of another kind than the config asks for; rebuilding it", self._file.name)
            self._index = None
            return
        self._revision = self._saved = header["revision"]
        self._checksum, self._file_is_current = header["crc32"], True
        self._copy_to_gpu()

    @property
    def _dead(self) -> int:
        return len(self._ids) - self._alive

    def _refresh(self) -> None:
        if self._kb.revision() == self._revision:
            return
        known = self._kb.changes_since(self._revision) if self._index is not None and self._whole else None
        if known is not None and self._choose_kind(self._alive + len(known.shown) - len(known.hidden)) == self._kind:
            self._follow(known)
        else:
            self._compare()
        if self._dead > _DEAD_SHARE * len(self._ids):
            self._take_out_dead()

    def _follow(self, changes: Changes) -> None:
        """Catch up with changes, at their cost."""
        self._whole = False  # until it is done
        self._drop(np.isin(self._ids, changes.hidden))
        self._whole = self._add(changes.shown) == len(changes.shown)
        self._revision = changes.revision

    def _compare(self) -> None:
        """Catch up by comparing all ids."""
        revision, active = self._kb.snapshot()
        kind = self._choose_kind(len(active))
        if self._index is None or kind != self._kind:
            self._build(kind, active)
        else:
            self._whole = False
            self._drop(~np.isin(self._ids, active) & (self._ids >= 0))
            self._add(np.setdiff1d(active, self._ids, assume_unique=not self._dead))
        self._whole = self._index is not None and self._alive == len(active)
        self._revision = revision

    def _choose_kind(self, vectors: int) -> Kind:
        if self._config.index != "auto":
            # the others learn their codes from the vectors, which takes some
            return self._config.index if vectors >= _LEAST_TRAINED else "flat"
        limit = self._config.exact_up_to * 1024 / self._generation.dimensions
        if gpu_is_there():
            limit *= _GPU_TIMES
        if self._kind == "pq" and self._index is not None:
            limit *= 0.8  # not back and forth at the limit
        # the fast scan packs eight dimensions into a byte
        return "flat" if vectors <= limit or self._generation.dimensions % 8 else "pq"

    def _build(self, kind: Kind, active: Ids) -> None:
        import faiss

        self._file_is_current = False
        dimensions = self._generation.dimensions
        factory = _KINDS[kind].factory.format(d=dimensions, quarter=dimensions // 4)
        logger.info("FAISS index %s for %d vectors: %s", kind, len(active), _KINDS[kind].reason)
        if kind == "hnsw" and self._generation.fingerprint.startswith("lexical"):
            logger.warning("index hnsw finds six of ten neighbours among lexical vectors; choose auto for all of them")
        self._kind, self._ids, self._alive = kind, np.zeros(0, np.int64), 0
        self._index = self._gpu = None
        if not len(active):
            return
        self._index = faiss.index_factory(dimensions, factory, faiss.METRIC_INNER_PRODUCT)
        if not self._index.is_trained and not self._train(active):
            self._index = None
            return
        self._add(active)
        self._copy_to_gpu()

    def _train(self, active: Ids) -> bool:
        """Learn codes from some of the vectors; False where this generation has none yet."""
        sample = np.random.default_rng(0).choice(active, min(len(active), _TRAINING_VECTORS), replace=False)
        rows = [vectors for _, vectors in self._kb.vectors(self._generation.id, sample)]
        if not rows:
            return False
        training = np.concatenate(rows)
        del rows  # as much memory again, while FAISS makes a turned copy
        if len(training) < _TRAINING_LEAST:  # the vectors of other chunks are yet to come
            training = np.resize(training, (_TRAINING_LEAST, self._generation.dimensions))
        with _omp_threads(self._threads):
            self._index.train(training)
        return True

    def _copy_to_gpu(self) -> None:
        exact = self._kind in {"flat", "sq8"} and self._index is not None
        self._gpu = copy_to_gpu(self._index) if exact else None

    def _drop(self, gone: npt.NDArray[np.bool_]) -> None:
        """Positions die: a search passes over them."""
        self._ids[gone] = -1
        self._alive -= int(gone.sum())

    def _take_out_dead(self) -> None:
        """The index without its dead positions: the others move up, or a graph is built anew."""
        if not self._alive or self._kind == "hnsw":
            alive = np.sort(self._ids[self._ids >= 0])
            self._build(self._kind, alive)
            self._whole = self._whole and self._alive == len(alive) > 0
            return
        import faiss

        gone = self._ids < 0
        bits = np.packbits(gone, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(gone), faiss.swig_ptr(bits))
        self._file_is_current = False
        if self._kind == "pq":  # two indexes of the same vectors, and IndexRefine itself removes nothing (1.15)
            for part in (self._index.base_index, self._index.refine_index):
                faiss.downcast_index(part).remove_ids(selector)
            self._index.ntotal = self._index.base_index.ntotal
            _clear_behind_last(self._index)
        else:
            self._index.remove_ids(selector)
        self._ids = self._ids[~gone]
        self._copy_to_gpu()

    def _add(self, ids: Ids) -> int:
        """Take in the vectors of chunks; how many there were."""
        before = self._alive
        for found, vectors in self._kb.vectors(self._generation.id, ids):
            self._index.add(vectors)
            if self._gpu is not None:
                self._gpu.add(vectors)
            self._file_is_current = False
            self._ids = np.concatenate([self._ids, found])
            self._alive += len(found)
        return self._alive - before

    # -- searching -----------------------------------------------------------------------------------------------

    def _search_alive(self, query: Vectors, k: int) -> list[tuple[int, float]]:
        total = len(self._ids)
        # a few dead ones are likely among the nearest: asked for at once, instead of a second search
        fetch = min(k + min(self._dead, _DEAD_AT_ONCE), total)
        while fetch:
            if self._gpu is not None and fetch <= MOST_HITS:
                scores, positions = self._gpu.search(query, fetch)
            else:
                scores, positions = self._index.search(query, fetch, params=self._parameters(fetch))
            found = self._hits(scores[0], positions[0])
            if len(found) >= k or fetch == total:
                return found
            fetch = min(total, fetch * 4)
        return []

    def _search_allowed(self, query: Vectors, k: int, allowed: Ids) -> list[tuple[int, float]]:
        """Exact search over the allowed positions only, in the part of the index that holds whole vectors."""
        import faiss

        mask = np.isin(self._ids, allowed) & (self._ids >= 0)
        count = int(mask.sum())
        if not count:
            return []
        bits = np.packbits(mask, bitorder="little")
        whole = self._index
        if self._kind in {"hnsw", "pq"}:
            whole = faiss.downcast_index(whole.storage if self._kind == "hnsw" else whole.refine_index)
        selector = faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(bits))
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg] # SWIG adds it
        scores, positions = whole.search(query, min(k, count), params=parameters)
        return self._hits(scores[0], positions[0])

    def _parameters(self, k: int) -> Any:
        import faiss

        if self._kind == "pq":
            return faiss.IndexRefineSearchParameters(k_factor=max(6.0, _CANDIDATES / k))  # type: ignore[call-arg]
        if self._kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(128, 2 * k))  # type: ignore[attr-defined]
        return None

    def _hits(self, scores: npt.NDArray[np.float32], positions: Ids) -> list[tuple[int, float]]:
        ids = self._ids[positions]  # a position of -1 stands for no hit; what it takes is left out
        alive = (positions >= 0) & (ids >= 0)
        return list(zip(ids[alive].tolist(), scores[alive].tolist(), strict=True))


def _clear_behind_last(refined: Any) -> None:
    """Zero codes behind the last vector of a `pq` index, whose vectors are packed in blocks.

    IndexPQFastScan leaves those of removed vectors there, and mixes them with the codes of what is added next (1.15).
    """
    import faiss

    turned: Any = faiss.downcast_index(refined.base_index)
    codes: Any = faiss.downcast_index(turned.index)
    packer = codes.get_CodePacker()
    blocks = faiss.rev_swig_ptr(codes.codes.get(), codes.codes.size()).reshape(-1, packer.block_size)
    full, used = divmod(codes.ntotal, packer.nvec)
    for offset in range(used, packer.nvec if used else 0):
        packer.pack_1(np.zeros(packer.code_size, np.uint8), offset, blocks[full : full + 1])


def _signature(path: Path) -> tuple[int, ...]:
    """What changes when another process puts its file in place."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _omp_threads(count: int) -> Iterator[None]:
    """FAISS on that many threads; afterwards as before, since torch shares the setting (OpenMP keeps it by thread)."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read piece by piece."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum
