"""Weights in 8 bits that no kernel overflows, and graphs of every kind of model against float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chains.bge.cross_encoder import load_cross_encoder
from chains.bge.directory import ModelDirectoryError, read_model_directory
from chains.bge.embeddings import BGEEmbeddings
from chains.bge.onnx_graph import Part, eight_bits, write_cross_encoder_graph

TEXTS = ["怎样备份知识库？", "第一条 为了惩罚犯罪，保护人民。", "向量" * 60, ""]


def weights(rows: int, columns: int = 12) -> Any:
    """Normal ones, one column with an outlier, one of zeros, one of equal values."""
    made = np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype(np.float32)
    made[3, 0], made[:, 1], made[:, 2] = 5.0, 0.0, 0.3
    return made


@pytest.mark.parametrize("rows", [64, 65])
def test_two_neighbours_times_the_largest_activation_stay_in_sixteen_bits(rows: int) -> None:
    numbers, _ = eight_bits(weights(rows), wide_sums=False)
    pairs = np.pad(numbers.astype(int), ((0, rows % 2), (0, 0))).reshape(-1, 2, 12)
    assert 255 * np.maximum(pairs, 0).sum(axis=1).max() <= 32_767
    assert 255 * np.minimum(pairs, 0).sum(axis=1).min() >= -32_768


@pytest.mark.parametrize("wide_sums", [True, False])
def test_numbers_times_steps_are_the_weights_to_half_a_step(wide_sums: bool) -> None:
    numbers, steps = eight_bits(weights(64), wide_sums=wide_sums)
    assert (np.abs(numbers * steps - weights(64)) <= steps / 2 + 1e-7).all()
    assert not numbers[:, 1].any()


def test_wide_sums_use_all_eight_bits_and_narrow_ones_more_than_seven() -> None:
    normal = weights(768)[:, 3:]
    assert np.abs(eight_bits(normal, wide_sums=True)[0]).max() == 127
    assert np.abs(eight_bits(normal, wide_sums=False)[0]).max() > 80  # 7 bits are 63


def test_this_processor_adds_the_largest_activations_exactly() -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    numbers, _ = eight_bits(weights(64), wide_sums=False)
    ids = helper.make_tensor_value_info("states", TensorProto.UINT8, [None, 64])
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, [None, 12])
    node = helper.make_node("MatMulInteger", ["states", "weights"], ["sums"])
    graph = helper.make_graph([node], "product", [ids], [sums], [onnx.numpy_helper.from_array(numbers, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    states = np.full((40, 64), 255, np.uint8)
    assert np.array_equal(session.run(None, {"states": states})[0], states.astype(int) @ numbers.astype(int))


@pytest.mark.parametrize("model", ["bert", "xlm_roberta"])
def test_a_graph_all_in_float32_computes_the_logits_of_a_cross_encoder(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Token types, the head and the last layer's first token, with no rounding that could hide them."""
    import onnxruntime
    import torch
    from bge_models import build_reranker

    path = build_reranker(request.getfixturevalue(model), tmp_path / "reranker")
    network = load_cross_encoder(read_model_directory(path))
    parts: tuple[Part, ...] = ("attention", "output", "up", "down")
    write_cross_encoder_graph(tmp_path / "graph.onnx", network, wide_sums=True, exact_parts=parts)
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.randint(5, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids}
    if model == "bert":
        given["token_type_ids"] = (torch.arange(40) > torch.tensor([[5], [20], [39]])).long()
    with torch.inference_mode():
        expected = network(**given).logits.numpy()
    names = {"input_ids": "ids", "token_type_ids": "types"}
    found = session.run(None, {names[name]: numbers.numpy() for name, numbers in given.items()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_other_activations_agree_with_float32(activation: str, tmp_path: Path) -> None:
    from bge_models import build_bert

    model = build_bert(tmp_path / "model", hidden_act=activation)
    exact = BGEEmbeddings(model, engine="torch").embed_documents_array(TEXTS)
    ours = BGEEmbeddings(model, engine="onnx_int8")
    assert (ours.embed_documents_array(TEXTS) * exact).sum(axis=1).min() >= 0.999
    assert ours.engine.name.startswith("onnx_int8")


def test_an_unknown_activation_is_named_and_auto_does_without(tmp_path: Path) -> None:
    from bge_models import build_bert

    model = build_bert(tmp_path / "model", hidden_act="silu")
    with pytest.raises(ModelDirectoryError, match=r"no activation silu .* engine: torch"):
        BGEEmbeddings(model, engine="onnx_int8").embed_query("问题")
    assert BGEEmbeddings(model).engine.name.startswith(("torch", "openvino"))


def test_a_damaged_export_is_named(bert: Path, tmp_path: Path) -> None:
    import shutil

    model = shutil.copytree(bert, tmp_path / "model", ignore=shutil.ignore_patterns(".ragproj"))
    BGEEmbeddings(model, engine="onnx_int8").embed_query("问题")
    (numbers,) = (model / ".ragproj").glob("onnx-int8-*.bin")
    numbers.write_bytes(numbers.read_bytes()[:1000])
    with pytest.raises(ModelDirectoryError, match=r"delete .*\.ragproj"):
        BGEEmbeddings(model, engine="onnx_int8").embed_query("问题")


def test_a_model_without_unit_length_keeps_its_lengths(bert: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(bert, tmp_path / "model")
    modules = json.loads((tmp_path / "model" / "modules.json").read_text(encoding="utf-8"))
    kept = [module for module in modules if not module["type"].endswith("Normalize")]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(kept), encoding="utf-8")
    exact = BGEEmbeddings(tmp_path / "model", engine="torch").embed_documents_array(TEXTS)
    ours = BGEEmbeddings(tmp_path / "model", engine="onnx_int8").embed_documents_array(TEXTS)
    assert not np.allclose(np.linalg.norm(exact, axis=1), 1, atol=0.1)
    assert np.allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(exact, axis=1), rtol=0.02)
