"""ChatGLM3 checkpoints in the original layout with random weights, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chains.chatglm3.settings import native_config
from chains.chatglm3.weights import original_shapes

# the width of the rows that the output layer tells its tokens apart by: random ones need some length
_SPREAD = {"transformer.output_layer.weight": 0.3}


def build_original(
    target: Path, texts: Iterable[str], *, pieces: int = 3000, context: int = 1024, seed: int = 7
) -> Path:
    """Write a checkpoint laid out as chatglm3-6b's, two layers of 64 wide, which suits 4-bit weights.

    Args:
        target: directory to create.
        texts: what its SentencePiece model is trained on.
        pieces: of that model.
        context: tokens it reads.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    _train_tokenizer(target, texts, pieces)
    config: dict[str, Any] = {
        "model_type": "chatglm", "torch_dtype": "float32", "attention_dropout": 0.0, "layernorm_epsilon": 1e-5,
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "multi_query_group_num": 1, "kv_channels": 32,
        "ffn_hidden_size": 128, "padded_vocab_size": -(-(pieces + 9) // 64) * 64, "seq_length": context,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    chance = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=chance) * _SPREAD.get(name, 0.1)
        for name, shape in original_shapes(native_config(config, pieces=pieces, where="config.json")).items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _train_tokenizer(folder: Path, texts: Iterable[str], pieces: int) -> None:
    """BPE with byte fallback, text taken as it is: of the kind that ChatGLM3's is."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=pieces, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, split_digits=True,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
