"""BERT models with random weights in a published shape, in BGE's directory layout: what trainings start from here."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from benchmarks.material import DATA

_SHAPES = DATA / "assets" / "bert_configs"
_LARGE = {"hidden_size": 1024, "layers_num": 24, "heads_num": 16, "feedforward_size": 4096}
_VOCABULARY = DATA / "assets" / "vocab" / "google_zh_vocab.txt"
_SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}


def build_bert(
    target: Path,
    shape: str,
    *,
    pooling: Literal["cls", "mean"],
    max_tokens: int,
    layers: int | None = None,
    instruction: str = "",
    seed: int = 0,
) -> Path:
    """Write a model of a UER shape ("mini": 4 layers of 256) over the Chinese vocabulary of 21,128 tokens.

    Args:
        target: directory to create.
        shape: tiny, mini, small, medium, base or large.
        pooling: how the vector comes out of the states.
        max_tokens: of a text, [CLS] and [SEP] included.
        layers: in place of the shape's.
        instruction: before queries.
        seed: of the weights, which have BERT's standard deviation of .02.
    """
    import torch
    from transformers import BertConfig, BertModel

    from chains.bge.directory import read_model_directory, write_json, write_layout

    # UER has no large one; the sizes are those of Devlin et al. 2019
    file = _SHAPES / f"uer_bert_{'base' if shape == 'large' else shape}_config.json"
    uer = json.loads(file.read_text(encoding="utf-8")) | (_LARGE if shape == "large" else {})
    words = _VOCABULARY.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=uer["hidden_size"],
        num_hidden_layers=uer["layers_num"] if layers is None else layers,
        num_attention_heads=uer["heads_num"],
        intermediate_size=uer["feedforward_size"],
        max_position_embeddings=uer["max_seq_length"],
        hidden_dropout_prob=uer["dropout"],
        attention_probs_dropout_prob=uer["dropout"],
    )
    target.mkdir(parents=True)
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(target)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder)
        shutil.copyfile(_VOCABULARY, plain / "vocab.txt")
        shutil.copyfile(target / "config.json", plain / "config.json")
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **_SPECIALS}
        write_json(plain / "tokenizer_config.json", settings)
        directory = read_model_directory(plain)
        write_layout(target, directory, pooling=pooling, query_instruction=instruction, max_tokens=max_tokens)
    return target
