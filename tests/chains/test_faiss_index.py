"""FaissIndex: as good as exact search, in step with the knowledge base, and never trusted when damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chains import faiss_index
from chains.embeddings import Vectors
from chains.faiss_index import FaissConfig, FaissIndex
from chains.knowledge_base import Ids, KnowledgeBase, SourceState
from chains.knowledge_base_writer import NewChunk, NewDocument

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["flat", "sq8", "hnsw", "pq"]


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield knowledge_base


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind from two vectors on, so that a small test sees it; else below 1,000 they are flat."""
    monkeypatch.setattr(faiss_index, "_LEAST_TRAINED", 2)


def clustered(count: int, dimensions: int, seed: int = 0) -> Vectors:
    """Unit vectors around 40 centres, as texts gather around topics."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, dimensions))
    rows = centres[random.integers(40, size=count)] + 0.6 * random.normal(size=(count, dimensions))
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)  # as the knowledge base keeps them
    vectors: Vectors = unit.astype(np.float32)
    return vectors


def add(kb: KnowledgeBase, source: str, vectors: Vectors) -> Ids:
    """Store one chunk a vector as a source; their ids."""
    writer = kb.writer()
    generation = writer.first_generation("fake", vectors[0], None)
    chunks = [NewChunk(f"{source}-{number}", number, number + 1, "字", {}) for number in range(len(vectors))]
    source_id, _ = writer.begin_source(source, SourceState(0, 1, 1, source, "s"))
    writer.add_documents(source_id, [NewDocument(source, "", "字" * len(vectors), {"source": source}, chunks)])
    writer.add_vectors(generation.id, kb.without_vector(generation.id, source_id=source_id), vectors)
    writer.activate(source_id, generation.id)
    return kb.chunk_ids_of(source)


def opened(kb: KnowledgeBase, **options: Any) -> FaissIndex:
    generation = kb.generation()
    assert generation is not None
    return FaissIndex(kb, generation, FaissConfig(**options))


def ids_of(hits: Sequence[tuple[int, float]]) -> list[int]:
    return [chunk for chunk, _ in hits]


def exact(ids: Ids, vectors: Vectors, query: Vectors, k: int) -> list[int]:
    """The k nearest by the definition, in double precision."""
    order = np.argsort(-(vectors.astype(np.float64) @ query), kind="stable")[:k]
    return [int(i) for i in ids[order]]


def recall(index: FaissIndex, ids: Ids, vectors: Vectors, queries: Vectors, allowed: Ids | None = None) -> float:
    """Share of the ten nearest that are found."""
    keep = np.ones(len(ids), bool) if allowed is None else np.isin(ids, allowed)
    found = 0
    for query in queries:
        wanted = exact(ids[keep], vectors[keep], query, 10)
        found += len(set(ids_of(index.search(query, 10, allowed))) & set(wanted))
    return found / (10 * len(queries))


# -- searching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [64, 60])  # the fast scan of pq packs eight
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_exact_search_finds(kb: KnowledgeBase, kind: str, dimensions: int) -> None:
    vectors, queries = clustered(3000, dimensions), clustered(50, dimensions, seed=1)
    ids = add(kb, "a", vectors)
    index = opened(kb, index=kind)
    assert index.kind == kind
    assert recall(index, ids, vectors, queries) >= (0.999 if kind == "flat" else 0.95)
    for query in queries[:5]:
        hits = index.search(query, 10)
        by_id = dict(zip(ids.tolist(), vectors @ query, strict=True))
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        for chunk, score in hits:
            assert score == pytest.approx(by_id[chunk], abs=1e-3 if kind == "flat" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_searches_the_allowed_exactly_however_far_they_are(kb: KnowledgeBase, kind: str) -> None:
    vectors, queries = clustered(3000, 64), clustered(20, 64, seed=1)
    ids = add(kb, "a", vectors)
    index = opened(kb, index=kind)
    for count in (1, 12, 300, 3000):
        allowed = np.sort(np.random.default_rng(count).choice(ids, count, replace=False))
        if count >= 10:
            assert recall(index, ids, vectors, queries, allowed) >= 0.97  # the rest: 8 bits instead of 32
        hits = index.search(queries[0], 10, allowed)
        assert len(hits) == min(10, count)
        assert set(ids_of(hits)) <= set(allowed.tolist())
    assert index.search(queries[0], 5, np.zeros(0, np.int64)) == []
    assert index.search(queries[0], 5, np.array([10**9])) == []
    assert index.search(queries[0], 0, ids) == []


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_more_than_there_are_may_be_asked_for(kb: KnowledgeBase, kind: str, count: int) -> None:
    vectors = clustered(count, 64)
    ids = add(kb, "a", vectors)
    index = opened(kb, index=kind)
    for k in (count, count + 1, 1000, 10**9):
        assert sorted(ids_of(index.search(vectors[0], k))) == ids.tolist()
    assert ids_of(index.search(vectors[-1], 1)) == [int(ids[-1])]
    assert index.search(vectors[0], 0) == index.search(vectors[0], -1) == []
    assert sorted(ids_of(index.search(vectors[0], 10**9, ids))) == ids.tolist()


@pytest.mark.usefixtures("every_size")
def test_building_and_searching_leave_the_threads_that_torch_shares(kb: KnowledgeBase) -> None:
    import faiss

    vectors = clustered(60, 16)
    add(kb, "a", vectors)
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        opened(kb).search(vectors[0], 3)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_vectors_come_by_id(kb: KnowledgeBase, kind: str) -> None:
    vector = clustered(1, 64)
    ids = [int(add(kb, f"s{number}", vector)[0]) for number in range(5)]
    assert ids_of(opened(kb, index=kind).search(vector[0], 5)) == ids


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_knowledge_base_finds_nothing_and_is_filled_later(kb: KnowledgeBase, kind: str) -> None:
    vectors = clustered(20, 64)
    kb.writer().first_generation("fake", vectors[0], None)
    index = opened(kb, index=kind)
    assert index.search(vectors[0], 5) == []
    assert index.search(vectors[0], 5, np.array([1])) == []
    assert index.ids().tolist() == []
    index.save()
    ids = add(kb, "a", vectors)
    assert ids_of(index.search(vectors[3], 1)) == [int(ids[3])]
    kb.writer().remove_sources(["a"])
    assert index.search(vectors[3], 5) == []
    index.save()
    assert opened(kb, index=kind).search(vectors[3], 5) == []


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_without_a_vector_in_this_generation_are_no_obstacle(kb: KnowledgeBase, kind: str) -> None:
    add(kb, "a", clustered(20, 64))
    generation = kb.writer().add_generation("other", clustered(1, 64)[0], None)
    index = FaissIndex(kb, generation, FaissConfig(index=kind))
    assert index.search(clustered(1, 64)[0], 5) == []


# -- following the knowledge base ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_and_removed_shows_at_the_next_search(kb: KnowledgeBase, kind: str) -> None:
    first, second = clustered(300, 64), clustered(200, 64, seed=2)
    a = add(kb, "a", first)
    index = opened(kb, index=kind)
    assert ids_of(index.search(first[7], 1)) == [int(a[7])]
    b = add(kb, "b", second)
    assert ids_of(index.search(second[9], 1)) == [int(b[9])]
    kb.writer().remove_sources(["a"])
    for k in (1, 50, 200, 1000):
        assert set(ids_of(index.search(first[7], k))) <= set(b.tolist())
        assert len(index.search(first[7], k)) == min(k, 200)
        assert len(index.search(first[7], k, np.concatenate([a, b]))) == min(k, 200)
    assert index.ids().tolist() == b.tolist()
    assert recall(index, b, second, clustered(20, 64, seed=1)) >= 0.95


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", ["hnsw", "pq"])
def test_dead_positions_are_passed_over_until_they_are_a_fifth(kb: KnowledgeBase, kind: str) -> None:
    parts = [add(kb, f"s{number}", clustered(10, 64, seed=number)) for number in range(10)]
    index = opened(kb, index=kind)
    assert len(index.ids()) == len(index._ids) == 100
    kb.writer().remove_sources(["s0", "s1"])  # 20 of 100: not more than a fifth
    assert len(index.ids()) == 80
    assert (len(index._ids), index._index.ntotal) == (100, 100)
    kb.writer().remove_sources(["s2"])
    assert len(index.ids()) == 70
    assert (len(index._ids), index._index.ntotal) == (70, 70)
    assert index.ids().tolist() == np.concatenate(parts[3:]).tolist()


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
def test_removed_vectors_are_dead_until_the_index_is_compacted(
    kb: KnowledgeBase, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "_COMPACTED_AT_ONCE", 0)  # as if it were big
    vectors = clustered(100, 64)
    ids = np.concatenate([add(kb, f"s{number}", vectors[number : number + 1]) for number in range(100)])
    index = opened(kb, index=kind)
    index.save()
    before = (kb.path / "faiss-1.index").stat().st_mtime_ns
    kb.writer().remove_sources(["s0", "s50", "s99", "s7"])
    left = np.setdiff1d(np.arange(100), [0, 7, 50, 99])
    index.save()
    assert (len(index._ids), index._index.ntotal) == (100, 100)
    assert (kb.path / "faiss-1.index").stat().st_mtime_ns == before  # the state file alone tells of it
    if kind != "hnsw":
        no_building(monkeypatch)
    for each in (index, opened(kb, index=kind), index, opened(kb, index=kind)):
        assert each.ids().tolist() == ids[left].tolist()
        for number in left:  # none has slipped into another's place
            assert ids_of(each.search(vectors[number], 1)) == [int(ids[number])]
        if each is index:
            index.compact()
            assert (len(index._ids), index._index.ntotal) == (96, 96)
    added = add(kb, "new", clustered(3, 64, seed=9))
    assert ids_of(index.search(clustered(3, 64, seed=9)[1], 1)) == [int(added[1])]


def test_vectors_added_where_others_were_removed_have_codes_of_their_own(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IndexPQFastScan mixes them with what removed ones left in the last block of 32 (FAISS 1.15)."""
    monkeypatch.setattr(faiss_index, "_CANDIDATES", 1)  # only the best six by their codes are rescored
    add(kb, "removed", clustered(12, 64))
    add(kb, "kept", clustered(2000, 64, seed=1))
    index = opened(kb, index="pq")
    assert len(index.ids()) == 2012
    kb.writer().remove_sources(["removed"])
    index.compact()
    late = clustered(16, 64, seed=9)
    ids = add(kb, "late", late)
    assert [ids_of(index.search(vector, 1)) for vector in late] == [[int(chunk)] for chunk in ids]


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_what_changed_without_looking_at_the_rest(
    kb: KnowledgeBase, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered(100, 64)
    ids = add(kb, "a", vectors)
    add(kb, "b", clustered(5, 64, seed=1))
    index = opened(kb, index=kind)
    index.save()

    def refuse(_: KnowledgeBase) -> None:
        raise AssertionError("all chunks were listed")

    monkeypatch.setattr(KnowledgeBase, "snapshot", refuse)
    added = add(kb, "c", clustered(5, 64, seed=2))
    kb.writer().remove_sources(["b"])
    for each in (index, opened(kb, index=kind)):  # the one that is open, and one opened later
        assert each.ids().tolist() == [*ids.tolist(), *added.tolist()]
        assert ids_of(each.search(vectors[7], 1)) == [int(ids[7])]


def test_chunks_that_get_their_vectors_later_are_found_after_the_switch(kb: KnowledgeBase) -> None:
    """An index of a generation in the making lacks some; what changed since does not tell of these."""
    vectors = clustered(20, 64)
    ids = add(kb, "a", vectors)
    generation = kb.writer().add_generation("other", vectors[0], None)
    kb.writer().add_vectors(generation.id, ids[:10], vectors[:10])
    index = FaissIndex(kb, generation)
    index.save()
    assert index.ids().tolist() == ids[:10].tolist()
    kb.writer().add_vectors(generation.id, ids[10:], vectors[10:])
    kb.writer().switch_generation(generation.id)
    for each in (index, FaissIndex(kb, generation)):
        assert each.ids().tolist() == ids.tolist()


def test_auto_changes_the_kind_at_a_size_and_back_at_a_smaller_one(kb: KnowledgeBase) -> None:
    """exact_up_to counts vectors of 1,024 dimensions: 100 of them are 1,600 of 64; back at 80 % of that, 1,280."""
    for name, count in (("a", 1280), ("b", 1), ("c", 319)):
        add(kb, name, clustered(count, 64, seed=count))
    index = opened(kb, exact_up_to=100)
    kinds: list[str] = [index.kind]
    vectors = clustered(1, 64, seed=7)
    (last,) = add(kb, "d", vectors)
    kinds.append(index.kind)
    assert kinds == ["flat", "pq"]
    assert ids_of(index.search(vectors[0], 1)) == [last]
    kb.writer().remove_sources(["c", "d"])
    assert (len(index.ids()), index.kind) == (1281, "pq")
    kb.writer().remove_sources(["b"])
    assert (len(index.ids()), index.kind) == (1280, "flat")


def test_auto_stays_exact_where_the_dimensions_are_no_multiple_of_eight(kb: KnowledgeBase) -> None:
    add(kb, "a", clustered(100, 60))
    assert opened(kb, exact_up_to=0).kind == "flat"


def test_generations_have_indexes_of_their_own(kb: KnowledgeBase) -> None:
    vectors = clustered(50, 64)
    ids = add(kb, "a", vectors)
    first = opened(kb)
    first.save()
    generation = kb.writer().add_generation("other", clustered(1, 32)[0], None)
    kb.writer().add_vectors(generation.id, ids, clustered(50, 32)[::-1].copy())
    second = FaissIndex(kb, generation)
    second.save()
    assert ids_of(second.search(clustered(50, 32)[0], 1)) == [int(ids[-1])]
    assert ids_of(first.search(vectors[0], 1)) == [int(ids[0])]
    assert sorted(path.name for path in kb.path.glob("faiss-*")) == [
        "faiss-1.index", "faiss-1.state", "faiss-2.index", "faiss-2.state",
    ]  # fmt: skip


# -- its files -------------------------------------------------------------------------------------------------------


def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the index was built anew")

    monkeypatch.setattr(FaissIndex, "_build", refuse)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_is_read_and_caught_up_not_built(
    kb: KnowledgeBase, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered(200, 64)
    ids = add(kb, "a", vectors)
    gone = add(kb, "b", clustered(20, 64, seed=3))
    opened(kb, index=kind).save()
    new = clustered(5, 64, seed=4)
    kb.writer().remove_sources(["b"])
    added = add(kb, "c", new)
    no_building(monkeypatch)
    index = opened(kb, index=kind)
    assert ids_of(index.search(vectors[7], 1)) == [int(ids[7])]
    assert ids_of(index.search(new[2], 1)) == [int(added[2])]
    assert index.ids().tolist() == [*ids.tolist(), *added.tolist()]
    assert not set(ids_of(index.search(vectors[7], 999))) & set(gone.tolist())


def test_nothing_is_written_where_nothing_changed(kb: KnowledgeBase) -> None:
    add(kb, "a", clustered(20, 64))
    opened(kb).save()
    files = [kb.path / "faiss-1.index", kb.path / "faiss-1.state"]
    before = [path.stat().st_mtime_ns for path in files]
    index = opened(kb)
    index.save()
    index.save()
    assert [path.stat().st_mtime_ns for path in files] == before


def damage(path: Path, kind: str) -> None:
    original = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "truncated": original[:-7],
                "half": original[: len(original) // 2],
                "longer": original + b"\0",
                "noise": bytes(byte ^ 0x5A for byte in original),
                "noise behind": original[:90] + bytes(byte ^ 0x5A for byte in original[90:]),
                "bit": original[:-3] + bytes([original[-3] ^ 1]) + original[-2:],
                "zeros": bytes(len(original)),
                "empty": b"",
            }[kind]
        )


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("file", ["faiss-1.index", "faiss-1.state"])
@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "half", "longer", "noise", "noise behind", "bit", "zeros", "empty", "folder"]
)
@pytest.mark.parametrize("index_kind", ["flat", "pq"])
def test_damage_of_either_file_is_made_good(kb: KnowledgeBase, file: str, kind: str, index_kind: str) -> None:
    vectors = clustered(100, 64)
    ids = add(kb, "a", vectors)
    opened(kb, index=index_kind).save()
    damage(kb.path / file, kind)
    index = opened(kb, index=index_kind)
    assert ids_of(index.search(vectors[5], 1)) == [int(ids[5])]
    index.save()  # a folder in its place stays and costs a rebuild; anything else is written anew
    if kind != "folder":
        loaded = opened(kb, index=index_kind)
        assert loaded._saved == kb.revision()
        assert loaded.ids().tolist() == ids.tolist()


@pytest.mark.parametrize("file", ["faiss-1.index", "faiss-1.state"])
def test_files_of_two_moments_are_not_taken_together(kb: KnowledgeBase, tmp_path: Path, file: str) -> None:
    """As a process killed between the two renames leaves them, or two that save at once."""
    a, b = clustered(50, 64), clustered(50, 64, seed=1)
    add(kb, "a", a)
    opened(kb).save()
    shutil.copy(kb.path / file, tmp_path / "older")
    kb.writer().remove_sources(["a"])
    ids = add(kb, "b", b)
    opened(kb).save()
    shutil.copy(tmp_path / "older", kb.path / file)
    index = opened(kb)
    assert ids_of(index.search(b[3], 1)) == [int(ids[3])]
    assert index.ids().tolist() == ids.tolist()


def test_a_file_that_is_replaced_between_checking_and_reading_is_not_taken(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    vectors = clustered(105, 64)
    ids = add(kb, "a", vectors[:100])
    other = opened(kb)
    other.save()
    read = faiss.read_index

    def replaced_and_read(path: str) -> Any:
        ids_of_b.append(add(kb, "b", vectors[100:]))
        other.save()
        return read(path)

    ids_of_b: list[Ids] = []
    monkeypatch.setattr(faiss, "read_index", replaced_and_read)
    assert sorted(ids_of(opened(kb).search(vectors[0], 200))) == np.concatenate([ids, *ids_of_b]).tolist()


def test_another_kind_in_the_config_takes_effect_on_a_saved_index(kb: KnowledgeBase) -> None:
    add(kb, "a", clustered(1200, 64))
    opened(kb, index="flat").save()
    assert opened(kb, index="sq8").kind == "sq8"
    assert opened(kb, exact_up_to=10).kind == "pq"


@pytest.mark.parametrize("kind", ["sq8", "hnsw", "pq"])
def test_few_vectors_are_searched_exactly_whatever_is_configured(kb: KnowledgeBase, kind: str) -> None:
    """These kinds learn from the vectors, which takes some."""
    add(kb, "a", clustered(999, 64))
    index = opened(kb, index=kind)
    assert index.kind == "flat"
    add(kb, "b", clustered(1, 64, seed=1))
    assert index.kind == kind


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize(("fingerprint", "warned"), [("lexical-1024-abc", True), ("bge", False)])
def test_a_graph_over_lexical_vectors_is_warned_of(
    kb: KnowledgeBase, caplog: pytest.LogCaptureFixture, fingerprint: str, warned: bool
) -> None:
    kb.writer().first_generation(fingerprint, clustered(1, 64)[0], None)
    add(kb, "a", clustered(10, 64))
    assert opened(kb, index="hnsw").kind == "hnsw"
    assert ("lexical vectors" in caplog.text) is warned


def test_a_full_disk_leaves_the_old_files_and_says_so(kb: KnowledgeBase, caplog: pytest.LogCaptureFixture) -> None:
    vectors = clustered(100, 64)
    ids = add(kb, "a", vectors)
    opened(kb).save()
    before = (kb.path / "faiss-1.index").read_bytes()
    add(kb, "b", clustered(400, 64, seed=1))
    code = f"""
        import resource
        from chains.faiss_index import FaissIndex
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        index = FaissIndex(kb, kb.generation())
        assert len(index.ids()) == 500
        index.save()
        print(index.search(kb.generation().probe, 1)[0][0] == {int(ids[0])})
    """
    process = child(code, kb)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "True\n"), err
    assert "cannot save faiss-1.index" in err
    assert (kb.path / "faiss-1.index").read_bytes() == before
    assert list(kb.path.glob(".faiss*")) == []
    assert len(opened(kb).ids()) == 500


def held_on_disk(kb: KnowledgeBase, vector: Vectors) -> bool:
    """Whether a file of the index holds the vector, in half precision as `flat` keeps it."""
    blob = vector.astype(np.float16).tobytes()
    return any(blob in path.read_bytes() for path in kb.path.glob("faiss-*"))


@pytest.mark.parametrize("big", [False, True], ids=["small", "big"])
@pytest.mark.parametrize("left", [0, 1, 50], ids=["all", "all but one", "half"])
def test_removed_vectors_are_in_no_file_after_saving(
    kb: KnowledgeBase, left: int, big: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small index writes its file anew at once, a big one when it is compacted."""
    monkeypatch.setattr(faiss_index, "_COMPACTED_AT_ONCE", 0 if big else 5_000)
    vectors = clustered(50, 64)
    if left:
        add(kb, "stays", clustered(left, 64, seed=1))
    add(kb, "goes", vectors)
    index = opened(kb)
    index.save()
    assert held_on_disk(kb, vectors[3])
    kb.writer().remove_sources(["goes"])
    index.compact() if big else index.save()
    assert not held_on_disk(kb, vectors[3])


# -- processes -------------------------------------------------------------------------------------------------------

CHILD = """
import logging, sys
import numpy as np
from chains.faiss_index import FaissIndex
from chains.knowledge_base import KnowledgeBase, SourceState
from chains.knowledge_base_writer import NewChunk, NewDocument
logging.basicConfig()
kb = KnowledgeBase(sys.argv[1])
def add(source, vector):
    writer = kb.writer()
    source_id, _ = writer.begin_source(source, SourceState(0, 1, 1, source, "s"))
    writer.add_documents(source_id, [NewDocument(source, "", "x", {}, [NewChunk(source, 0, 1, "x", {})])])
    writer.add_vectors(1, kb.without_vector(1, source_id=source_id), vector[None])
    writer.activate(source_id, 1)
"""


def child(code: str, kb: KnowledgeBase, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + textwrap.dedent(code), str(kb.path), *arguments],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_an_index_follows_what_another_process_writes(kb: KnowledgeBase) -> None:
    vectors = clustered(30, 64)
    add(kb, "a", vectors)
    index = opened(kb)
    assert len(index.ids()) == 30
    new = clustered(1, 64, seed=5)[0]
    finish(child(f"add('b', np.array({new.tolist()}, np.float32)); kb.writer().remove_sources(['a'])", kb))
    assert ids_of(index.search(new, 9)) == kb.chunk_ids_of("b").tolist()


def test_two_processes_that_save_at_once_leave_files_that_agree(kb: KnowledgeBase) -> None:
    add(kb, "a", clustered(2000, 64))
    code = """
        index = FaissIndex(kb, kb.generation())
        random = np.random.default_rng(int(sys.argv[2]))
        for number in range(15):
            vector = random.normal(size=64).astype(np.float32)
            vector /= np.linalg.norm(vector)
            add(f"{sys.argv[2]}-{number}", vector)
            index.save()
            assert index.search(vector, 1)[0][0] == kb.chunk_ids_of(f"{sys.argv[2]}-{number}")[0]
    """
    for process in [child(code, kb, number) for number in "123"]:
        finish(process)
    assert list(kb.path.glob(".faiss*")) == []
    index = opened(kb)
    assert index.ids().tolist() == kb.chunk_ids().tolist()
    assert len(index.ids()) == 2045
    index.save()
    loaded = opened(kb)
    assert loaded._saved == kb.revision()
    for ids, rows in kb.vectors(1, kb.chunk_ids()[::97]):
        for chunk, row in zip(ids.tolist(), rows, strict=True):
            assert ids_of(loaded.search(row, 1)) == [chunk]
