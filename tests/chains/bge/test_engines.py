"""Every engine against float32, refusals, the choice of `auto`, batches over several devices."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chains.bge.directory import ModelDirectoryError
from chains.bge.embedding_engines import EncoderFactory
from chains.bge.embeddings import BGEEmbeddings
from chains.bge.engines import CPU_LIMITS, BatchLimits, SimpleEngine, devices
from chains.bge.pool import EnginePool, ahead
from loaders.errors import UsageError

TEXTS = [
    "怎样备份知识库？",
    "第一条 为了惩罚犯罪，保护人民，根据宪法，制定本法。",
    "RAG 与 ChatGLM3-6B",
    "",
    "向量" * 100,
    *(f"第{number}条 文档问题" for number in range(40)),
]


@pytest.fixture(scope="module")
def reference(bert: Path) -> Any:
    return BGEEmbeddings(bert, engine="torch").embed_documents_array(TEXTS)


def lowest_cosine(vectors: Any, reference: Any) -> float:
    return float((vectors * reference).sum(axis=1).min())


@pytest.mark.parametrize(("engine", "bar"), [("onnx_int8", 0.999), ("openvino", 0.9999), ("openvino_int8", 0.999)])
def test_engines_agree_with_float32(bert: Path, reference: Any, engine: Any, bar: float) -> None:
    if engine.startswith("openvino"):
        pytest.importorskip("openvino")
    embeddings = BGEEmbeddings(bert, engine=engine)
    assert lowest_cosine(embeddings.embed_documents_array(TEXTS), reference) >= bar
    assert embeddings.engine.name.startswith(engine)


def test_eight_bits_hold_for_bge_m3_and_adapters(xlm_roberta: Path, bert: Path, adapter: Path) -> None:
    for arguments in ({"model": xlm_roberta}, {"model": bert, "adapter": adapter}):
        exact = BGEEmbeddings(engine="torch", **arguments).embed_documents_array(TEXTS)
        assert lowest_cosine(BGEEmbeddings(engine="onnx_int8", **arguments).embed_documents_array(TEXTS), exact) > 0.999


def test_eight_bits_follow_mean_pooling(bert: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bert, tmp_path / "mean")
    (tmp_path / "mean" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    exact = BGEEmbeddings(tmp_path / "mean", engine="torch").embed_documents_array(TEXTS)
    assert (
        lowest_cosine(BGEEmbeddings(tmp_path / "mean", engine="onnx_int8").embed_documents_array(TEXTS), exact) > 0.999
    )


def test_an_engine_below_the_bar_refuses_itself(
    bert: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("chains.bge.embedding_engines.LEAST_COSINE", 1.1)
    embeddings = BGEEmbeddings(bert, engine="onnx_int8")
    with caplog.at_level(logging.INFO):
        vectors = embeddings.embed_documents_array(TEXTS)
    assert "onnx_int8, down in float32, output in float32 refuses itself" in caplog.text
    assert embeddings.engine.name == "torch cpu float32"
    assert np.array_equal(vectors, reference)


@pytest.mark.parametrize(("dimensions", "served_by"), [(None, "turned"), (32, "turned"), (2, "torch cpu float32")])
def test_an_engine_is_held_to_the_numbers_that_are_served(
    bert: Path, monkeypatch: pytest.MonkeyPatch, dimensions: int | None, served_by: str
) -> None:
    """Two numbers of 64, turned by six degrees, hardly move the whole vector; alone they are below the bar."""
    torch_engine = BGEEmbeddings(bert, engine="torch").engine
    cosine, sine = 0.995, np.sqrt(1 - 0.995**2)

    def turned(rows: Any) -> Any:
        vectors = torch_engine.compute(rows)
        vectors[:, :2] = vectors[:, :2] @ np.array([[cosine, sine], [-sine, cosine]], np.float32)
        return vectors

    engine = SimpleEngine("turned", turned, parallel=False, limits=CPU_LIMITS)
    monkeypatch.setattr(EncoderFactory, "_forms", lambda self, name: iter([engine]))
    assert BGEEmbeddings(bert, engine="onnx_int8", dimensions=dimensions).engine.name == served_by


def test_sixteen_bits_that_overflow_refuse_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from bge_models import build_bert
    from safetensors.torch import load_file, save_file

    model = build_bert(tmp_path / "model")
    sound = BGEEmbeddings(model, engine="torch", dtype="float16")
    sound.embed_query("问题")
    assert sound.engine.name == "torch cpu float16"
    weights = load_file(model / "model.safetensors")
    wide = "encoder.layer.0.intermediate.dense.weight"
    weights[wide] = weights[wide] * 1e5  # within float32, beyond the 65,504 of float16
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    exact = BGEEmbeddings(model, engine="torch").embed_documents_array(TEXTS)
    overflowing = BGEEmbeddings(model, engine="torch", dtype="float16")
    assert np.array_equal(overflowing.embed_documents_array(TEXTS), exact)
    assert overflowing.engine.name == "torch cpu float32"
    assert "torch cpu float16 refuses itself: cosine 0.00000" in caplog.text
    assert torch.isfinite(torch.from_numpy(exact)).all()


def test_auto_remembers_what_it_measured_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from bge_models import build_bert

    monkeypatch.setattr(EncoderFactory, "_candidates", ("onnx_int8",))
    model = build_bert(tmp_path / "model", layers=1)
    with caplog.at_level(logging.INFO):
        first = BGEEmbeddings(model).engine.name
        second = BGEEmbeddings(model).engine.name
    assert first == second
    assert "fastest here that agrees" in caplog.text
    assert "the fastest of an earlier run" in caplog.text
    (note,) = (model / ".ragproj").glob("engine-*.json")
    assert set(json.loads(note.read_text(encoding="utf-8"))["tokens_per_second"]) == {"torch", "onnx_int8"}


def test_a_choice_for_the_first_numbers_is_none_for_whole_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bge_models import build_bert

    monkeypatch.setattr(EncoderFactory, "_candidates", ("onnx_int8",))
    model = build_bert(tmp_path / "model", layers=1)
    for dimensions in (2, None, 2, None):
        assert BGEEmbeddings(model, dimensions=dimensions).engine.name
    assert len(list((model / ".ragproj").glob("engine-*.json"))) == 2


def test_an_engine_whose_library_is_missing_says_what_to_install(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelDirectoryError, match=r"ragproj\[openvino\]"):
        BGEEmbeddings(bert, engine="openvino").embed_query("问题")
    with pytest.raises(ModelDirectoryError, match=r"onnxruntime onnx: pip install 'ragproj\[models\]'"):
        BGEEmbeddings(bert, engine="onnx_int8").embed_query("问题")


def test_two_devices_give_the_vectors_of_one(bert: Path, reference: Any) -> None:
    embeddings = BGEEmbeddings(bert, engine="torch", device="cpu,cpu")
    assert np.allclose(embeddings.embed_documents_array(TEXTS), reference, atol=1e-6)


class Counting:
    """An engine that notes its batches; the first number of a text is its vector."""

    name = "counting"
    parallel = False

    def __init__(self, limits: Any, *, ahead: int = 0) -> None:
        self.limits = limits
        self.ahead = ahead
        self.batches = 0
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def compute(self, rows: Sequence[Sequence[int]]) -> Any:
        with self._lock:
            self.batches += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.001)
        with self._lock:
            self.at_once -= 1
        return np.array([[row[0]] for row in rows], np.float32)


def test_batches_go_to_every_device_and_vectors_keep_their_order() -> None:
    engines = [Counting(BatchLimits(8, 2)), Counting(BatchLimits(8, 2))]
    rows = [[number] * (1 + number % 5) for number in range(100)]
    assert EnginePool(engines).compute(rows, 1)[:, 0].tolist() == list(range(100))
    assert engines[0].batches + engines[1].batches >= 50
    assert engines[1].batches > 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_gpu_gets_the_next_batch_while_it_computes_one(ahead: int) -> None:
    engine = Counting(BatchLimits(8, 2), ahead=ahead)
    rows = [[number] * (1 + number % 5) for number in range(100)]
    assert EnginePool([engine]).compute(rows, 1)[:, 0].tolist() == list(range(100))
    assert engine.most_at_once == 1 + ahead


def test_threads_of_a_pool_compute_on_a_core_each() -> None:
    """Asked in threads that have not used torch before, as those of a pool are."""
    import torch

    class Asking(Counting):
        parallel = True

        def compute(self, rows: Sequence[Any]) -> Any:
            seen.append(torch.get_num_threads())
            return super().compute(rows)

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        EnginePool([Asking(BatchLimits(8, 2))]).compute([[number] * 8 for number in range(40)], 1)
    finally:
        torch.set_num_threads(before)
    assert len(seen) > 2
    assert set(seen) == {1}


def test_threads_of_a_pool_leave_torch_as_it_was(bert: Path) -> None:
    import torch

    def threads_elsewhere() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return seen[0]

    before = (torch.get_num_threads(), threads_elsewhere())
    embeddings = BGEEmbeddings(bert, engine="torch")
    for _ in range(5):
        embeddings.embed_documents(TEXTS)
    assert (torch.get_num_threads(), threads_elsewhere()) == before


def test_ahead_keeps_the_order_and_passes_errors_on() -> None:
    assert list(ahead(str, range(5))) == ["0", "1", "2", "3", "4"]
    assert list(ahead(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda number: 1 // number, [1, 0]))


def test_devices_are_split_at_commas_and_a_missing_gpu_is_named() -> None:
    import torch

    assert devices("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    assert devices("cpu") == ["cpu"]
    if torch.cuda.is_available():
        assert devices("cuda") == devices(None) == [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return
    assert devices(None) == ["cpu"]
    with pytest.raises(UsageError, match="no GPU"):
        devices("cuda")
