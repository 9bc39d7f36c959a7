"""Adapters as they are written: what was trained and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra [models]")
pytest.importorskip("peft", reason="needs the extra [train]")

from safetensors.torch import load_file

from finetune.lora import LoraSettings, add_adapter, save_adapter


@pytest.mark.filterwarnings("error:.*save_embedding_layers")
def test_the_embeddings_of_an_original_chatglm3_do_not_go_into_its_adapter(tmp_path: Path) -> None:
    """Its config.json says `padded_vocab_size`, so PEFT takes the vocabulary of the model for one that has grown."""
    from transformers import GlmConfig, GlmForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GlmForCausalLM(GlmConfig(vocab_size=96, num_key_value_heads=1, head_dim=16, pad_token_id=0, **sizes))
    original = tmp_path / "chatglm3-6b"
    original.mkdir()
    (original / "config.json").write_text(json.dumps({"model_type": "chatglm", "padded_vocab_size": 96}))
    adapted = add_adapter(model, LoraSettings(rank=2, targets=["q_proj"]), seed=0, task="CAUSAL_LM")
    save_adapter(adapted, tmp_path / "adapter", base=str(original))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B"}
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == str(original)
