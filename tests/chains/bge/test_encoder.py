"""The shared encoder: the shortened last layer against the whole model, adapters, gradients."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bge_models import build_bert

from chains.bge.directory import ModelDirectoryError, read_model_directory
from chains.bge.encoder import embed, load_encoder, pad

ROWS = [[2, 40, 41, 42, 43, 3], [2, 50, 3], [2, 60, 61, 62, 3]]


@pytest.mark.parametrize("model", ["bert", "xlm_roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_are_those_of_the_whole_model(model: str, pooling: Any, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModel

    path = request.getfixturevalue(model)
    directory = dataclasses.replace(read_model_directory(path), pooling=pooling)
    whole = AutoModel.from_pretrained(str(path)).eval()
    ids, mask = pad(ROWS, 1 if model == "xlm_roberta" else 0)
    assert mask is not None
    with torch.no_grad():
        vectors = embed(load_encoder(directory), ids, mask, directory)
        for row, vector in zip(ROWS, vectors, strict=True):
            states = whole(input_ids=torch.tensor([row])).last_hidden_state[0]
            expected = states[0] if pooling == "cls" else states.mean(dim=0)
            assert torch.allclose(vector, torch.nn.functional.normalize(expected, dim=-1), atol=1e-6)


def test_gradients_are_those_of_the_whole_model(bert: Path) -> None:
    from transformers import AutoModel

    directory = dataclasses.replace(read_model_directory(bert), normalize=False)
    ours, whole = load_encoder(directory), AutoModel.from_pretrained(str(bert), add_pooling_layer=False).eval()
    ids, mask = pad(ROWS, 0)
    embed(ours, ids, mask, directory).square().sum().backward()
    whole(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].square().sum().backward()
    expected = dict(whole.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4), name


def test_an_adapter_beside_the_weights_equals_one_added_to_them(bert: Path, adapter: Path) -> None:
    directory = read_model_directory(bert)
    ids, mask = pad(ROWS, 0)
    with torch.no_grad():
        beside = embed(load_encoder(directory, adapter), ids, mask, directory)
        added = embed(load_encoder(directory, adapter, merge=True), ids, mask, directory)
        without = embed(load_encoder(directory), ids, mask, directory)
    assert torch.allclose(beside, added, atol=1e-5)
    assert not torch.allclose(beside, without, atol=1e-2)


def test_gradient_checkpointing_changes_no_gradient(bert: Path) -> None:
    directory = read_model_directory(bert)
    ids, mask = pad(ROWS, 0)
    found = []
    for checkpointing in (False, True):
        encoder: Any = load_encoder(directory)
        encoder.train()
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        embed(encoder, ids, mask, directory)[0, 0].backward()
        found.append(encoder.embeddings.word_embeddings.weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6)


def test_missing_weights_are_refused_and_not_made_up(bert: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path / "partial")
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelDirectoryError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        load_encoder(read_model_directory(tmp_path / "partial"))


def test_a_directory_that_is_no_adapter_is_named(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="no LoRA adapter"):
        load_encoder(read_model_directory(bert), tmp_path)


def test_an_adapter_of_another_base_is_refused_and_its_own_base_named(adapter: Path, tmp_path: Path) -> None:
    other = build_bert(tmp_path / "other", hidden=32)
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    with pytest.raises(ModelDirectoryError, match=rf"does not fit the model: its base is {re.escape(base)}"):
        load_encoder(read_model_directory(other), adapter)
