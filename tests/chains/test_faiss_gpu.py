"""The GPU copy of an exact index, with an index of FAISS on the CPU in the place of the one on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from chains import faiss_gpu
from chains.embeddings import Vectors
from chains.faiss_index import FaissConfig, FaissIndex
from chains.knowledge_base import KnowledgeBase
from chains.knowledge_base_writer import NewChunk, NewDocument


class StandIn:
    """What FAISS for GPUs offers, on the CPU; remembers what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.full = False

    def index(self, _: object, dimensions: int, config: Any) -> Any:
        assert config.useFloat16
        if self.full:
            raise RuntimeError("out of memory")
        return _Copy(dimensions, self.asked)


class _Copy:
    def __init__(self, dimensions: int, asked: list[int]) -> None:
        self._index, self._asked = faiss.IndexFlatIP(dimensions), asked

    def add(self, vectors: Vectors) -> None:
        self._index.add(vectors)

    def search(self, query: Vectors, k: int) -> tuple[Any, Any]:
        self._asked.append(k)
        scores, positions = self._index.search(query, k)
        return scores, positions


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", lambda: type("Config", (), {})(), raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", stand_in.index, raising=False)
    faiss_gpu.gpu_is_there.cache_clear()
    yield stand_in
    monkeypatch.undo()
    faiss_gpu.gpu_is_there.cache_clear()


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase(tmp_path / "kb", create=True) as opened:
        opened.writer().first_generation("fake", np.eye(8, dtype=np.float32)[0], None)
        yield opened


def add(kb: KnowledgeBase, *axes: int) -> list[int]:
    """A chunk for each axis, whose vector points along it; their ids."""
    entries = [NewDocument(f"{a}", "", "字", {}, [NewChunk(f"{a}", 0, 1, "字", {})]) for a in axes]
    kb.writer().replace_chunks({"python": entries}, 1, np.eye(8, dtype=np.float32)[list(axes)])
    by_key = kb.chunks_by_key([str(axis) for axis in axes])
    return [by_key[str(axis)].id for axis in axes]


def opened(kb: KnowledgeBase, **options: Any) -> FaissIndex:
    generation = kb.generation()
    assert generation is not None
    return FaissIndex(kb, generation, FaissConfig(**options))


def first(index: FaissIndex, axis: int) -> int:
    return index.search(np.eye(8, dtype=np.float32)[axis], 1)[0][0]


def test_an_exact_index_is_searched_on_the_gpu_and_follows_every_change(gpu: StandIn, kb: KnowledgeBase) -> None:
    ids = add(kb, 0, 1, 2)
    index = opened(kb)
    assert [first(index, axis) for axis in range(3)] == ids
    assert len(gpu.asked) == 3
    (added,) = add(kb, 3)
    assert first(index, 3) == added
    kb.writer().remove_chunks(["1"])
    assert sorted(chunk for chunk, _ in index.search(np.ones(8, np.float32), 9)) == [ids[0], ids[2], added]
    index.compact()
    assert [first(index, axis) for axis in (0, 2, 3)] == [ids[0], ids[2], added]
    assert [first(opened(kb), axis) for axis in (0, 2, 3)] == [ids[0], ids[2], added]  # read from the file
    assert len(gpu.asked) > 9


def test_more_hits_than_a_gpu_gives_come_from_the_cpu(
    gpu: StandIn, kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chains.faiss_index.MOST_HITS", 2)
    add(kb, 0, 1, 2)
    assert len(opened(kb).search(np.ones(8, np.float32), 3)) == 3
    assert gpu.asked == []


def test_a_gpu_that_is_full_leaves_the_search_to_the_cpu(
    gpu: StandIn, kb: KnowledgeBase, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.full = True
    ids = add(kb, 0, 1)
    assert first(opened(kb), 1) == ids[1]
    assert "searched on the CPU" in caplog.text
    assert "out of memory" in caplog.text


def test_with_a_gpu_more_vectors_are_searched_exactly(gpu: StandIn, kb: KnowledgeBase) -> None:
    """exact_up_to counts vectors of 1,024 dimensions: 1 of them is 128 of 8, and 50 times as many on a GPU."""
    index = opened(kb, exact_up_to=1)
    assert [index._choose_kind(count) for count in (128, 129, 6400, 6401)] == ["flat", "flat", "flat", "pq"]


def test_without_a_gpu_nothing_is_copied() -> None:
    faiss_gpu.gpu_is_there.cache_clear()
    assert faiss_gpu.copy_to_gpu(faiss.IndexFlatIP(8)) is None
