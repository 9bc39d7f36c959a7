"""The golden checkpoint of the shared data, and a tiny one made here; each converted once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.convert import convert_chatglm3
from chains.chatglm3.settings import native_config
from chains.chatglm3.weights import original_shapes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of 64 columns are faster alone than shared out between cores."""
    torch = pytest.importorskip("torch", reason="needs the extra [models]")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden(shared_data: Path) -> Path:
    """A tiny checkpoint in the original layout, and what the original implementation computes with it."""
    return shared_data / "chatglm3_golden"


@pytest.fixture(scope="session")
def native(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as a native directory."""
    target = tmp_path_factory.mktemp("chatglm3") / "native"
    convert_chatglm3(golden / "checkpoint", target)
    return target


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM3 of random weights in the original layout, made here; its sizes suit 4-bit weights."""
    pytest.importorskip("sentencepiece", reason="needs the extra [models]")
    folder = tmp_path_factory.mktemp("tiny") / "original"
    folder.mkdir()
    _train_tokenizer(folder)
    sizes = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "multi_query_group_num": 2, "kv_channels": 16,
        "ffn_hidden_size": 128, "padded_vocab_size": 2048, "seq_length": 1024, "layernorm_epsilon": 1e-5,
    }  # fmt: skip
    config = {"model_type": "chatglm", "attention_dropout": 0.0, "torch_dtype": "float32", **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_weights(folder, native_config(config, pieces=2000, where="config.json"))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_original: Path) -> Path:
    """The same as a native directory."""
    convert_chatglm3(tiny_original, tiny_original.with_name("native"))
    return tiny_original.with_name("native")


def _train_tokenizer(folder: Path) -> None:
    import sentencepiece

    text = folder.with_name("text.txt")
    manual = sorted((Path(__file__).resolve().parents[3] / "docs").glob("*.md"))
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in manual), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=2000, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, split_digits=True,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


def _write_weights(folder: Path, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=chance) * 0.1
        for name, shape in original_shapes(config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
