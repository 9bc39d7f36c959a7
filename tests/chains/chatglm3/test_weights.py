"""Names and shapes at the size of the 6B model, on the meta device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.settings import native_config
from chains.chatglm3.weights import account, name_map, native_shapes, original_shapes, projection_rows


@pytest.fixture(scope="module")
def config(shared_data: Path) -> dict[str, Any]:
    """The 6B model's config; its tokenizer has 64,789 pieces."""
    original = json.loads((shared_data / "assets/chatglm3_tokenizer/config.json").read_text(encoding="utf-8"))
    return native_config(original, pieces=64789, where="config.json")


def test_the_6b_model_has_199_tensors_and_6243584000_parameters(config: dict[str, Any]) -> None:
    shapes = original_shapes(config)
    assert len(shapes) == 199
    assert sum(math.prod(shape) for shape in shapes.values()) == 6_243_584_000
    assert shapes["transformer.encoder.layers.27.self_attention.query_key_value.weight"] == (4608, 4096)
    assert shapes["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"] == (27392, 4096)
    assert projection_rows(config) == (4096, 256, 256)


def test_native_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra [models]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [models]")
    with torch.device("meta"):
        model = transformers.GlmForCausalLM(transformers.GlmConfig(**config))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == native_shapes(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_243_584_000


def test_every_native_name_comes_from_one_original(config: dict[str, Any]) -> None:
    natives = [native for names in name_map(28).values() for native in names]
    assert len(natives) == len(set(natives))
    assert set(natives) == set(native_shapes(config))


def test_end_of_turn_ids_are_the_6b_models(config: dict[str, Any]) -> None:
    """</s>, <|user|> and <|observation|> as the original generation code stops at."""
    assert config["eos_token_id"] == [2, 64795, 64797]


def test_account_names_each_difference() -> None:
    problems = [en for _, en in account({"a": (1,), "b": (2,)}, {"b": (3,), "c": (4,)})]
    assert problems == ["c is missing", "a is not known", "b has shape (2,), expected (3,)"]


def test_account_is_empty_where_all_fits() -> None:
    assert list(account({"a": (1,)}, {"a": (1,)})) == []
