"""The memory forecast against what torch really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.memory import (
    Plan,
    Shape,
    _control_group,
    _machine,
    activations,
    available_memory,
    forecast,
    gigabytes,
    graph_tokens_that_fit,
)

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 64, 256, 3, 4, 500


def tiny_bert(*, dropout: float) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False).train()


def bytes_kept(model: Any, rows: int, length: int) -> int:
    """Bytes of all storages that a forward pass saves for its backward pass, weights aside, each counted once."""
    import torch

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(1, VOCABULARY, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids).last_hidden_state.sum()
    return sum(storage.nbytes() for storage in kept.values())


def shape(model: Any) -> Shape:
    return Shape(sum(p.numel() for p in model.parameters()), LAYERS, HIDDEN, INTERMEDIATE, HEADS)


@pytest.mark.parametrize(("dropout", "length"), [(0.0, 32), (0.0, 128), (0.1, 32), (0.1, 128)])
def test_activations_are_forecast_within_a_quarter_of_what_torch_keeps(dropout: float, length: int) -> None:
    model = tiny_bert(dropout=dropout)
    plan = Plan(trainable=0, tokens=8 * length, length=length, attention_scores=dropout > 0)
    assert activations(shape(model), plan) == pytest.approx(bytes_kept(model, 8, length), rel=0.25)


def test_weights_gradients_and_optimizer_are_forecast_exactly() -> None:
    import torch

    model = tiny_bert(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    found = forecast(shape(model), Plan(trainable=sum(p.numel() for p in parameters), tokens=0, length=0))
    assert found.weights == sum(p.nbytes for p in parameters)
    assert found.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert found.optimizer == sum(moment.nbytes for moment in moments)


def test_an_adapter_and_checkpointing_take_less_and_sixteen_bits_halve_the_activations() -> None:
    base = Shape(100_000_000, 12, 768, 3072, 12)
    full = forecast(base, Plan(trainable=100_000_000, tokens=8192, length=256))
    adapter = forecast(base, Plan(trainable=1_000_000, tokens=8192, length=256))
    checkpointed = forecast(base, Plan(trainable=100_000_000, tokens=8192, length=256, checkpointing=True))
    half = forecast(base, Plan(trainable=100_000_000, tokens=8192, length=256, activation_bytes=2))
    assert full.gradients + full.optimizer == 3 * full.weights
    assert adapter.total < full.total - 1_000_000_000
    assert checkpointed.activations < full.activations / 5
    assert half.activations == pytest.approx(full.activations / 2, rel=0.05)


def test_the_forecast_of_bge_base_is_that_counted_by_hand() -> None:
    # 102 M parameters: 4 bytes each for weights and gradients, 8 for AdamW: 1.63 GB. A token in a layer:
    # (7 x 768 + 2 x 3072) x 4 + 2 x 768 = 47,616 bytes; 12 layers and 3 x 768 x 4 of the embeddings: 580,608;
    # 8,192 tokens: 4.76 GB
    found = forecast(Shape(102_000_000, 12, 768, 3072, 12), Plan(trainable=102_000_000, tokens=8192, length=256))
    assert found.weights + found.gradients + found.optimizer == 1_632_000_000
    assert found.activations == 8192 * 580_608


def test_a_gpus_free_memory_decides_how_many_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert(dropout=0.0)
    trained = sum(parameter.numel() for parameter in model.parameters())
    a_token = activations(shape(model), Plan(trained, tokens=1, length=1))
    monkeypatch.setattr("finetune.memory.available_memory", lambda device: 16 * trained + 1000 * a_token)
    assert graph_tokens_that_fit(model, "cuda:0") == 800
    assert graph_tokens_that_fit(model, "cuda:0", checkpointing=True) > 800
    monkeypatch.setattr("finetune.memory.available_memory", lambda device: 8 * trained)
    assert graph_tokens_that_fit(model, "cuda:0") == 0


def test_available_memory_is_the_least_that_anything_allows(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:     60 kB\n", encoding="utf-8")
    (tmp_path / "memory.max").write_text("50000\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text("20000\n", encoding="utf-8")
    assert _machine(meminfo) == [61440]
    assert _control_group(tmp_path) == [30000]
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert _control_group(tmp_path) == []
    assert _machine(tmp_path / "none") == []
    assert (available_memory("cpu") or 1) > 0


def test_processes_that_train_together_share_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.memory._machine", lambda _: [8_000])
    monkeypatch.setattr("finetune.memory._control_group", lambda _: [])
    assert available_memory("cpu") == 8_000
    assert available_memory("cpu", processes=4) == 2_000


def test_sizes_are_written_as_one_reads_them() -> None:
    assert gigabytes(1_530_000_000) == "1.5 GB"
    assert gigabytes(30_400_000) == "30 MB"
