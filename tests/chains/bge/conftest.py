"""Fixtures of the BGE tests: small models with random weights, built once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bge_models`

from bge_models import build_bert, build_xlm_roberta, without_modules


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bge-small's layout in small: CLS, unit length, no capitals in the vocabulary, no lower-casing of its own."""
    return build_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def xlm_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bge-m3's layout in small."""
    return build_xlm_roberta(tmp_path_factory.mktemp("models") / "xlm-roberta")


@pytest.fixture(scope="session")
def plain(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as FlagEmbedding's trainer would save them."""
    return without_modules(bert, tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def bge_small(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bge-small-zh-v1.5 itself, but for the weights: its tokenizer, its modules, a smaller network."""
    layout = shared_data / "assets" / "bge-small-zh-v1.5_layout"
    return build_bert(tmp_path_factory.mktemp("models") / "bge-small", layout=layout)


@pytest.fixture(scope="session")
def adapter(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on `bert` with random weights, so that it changes vectors."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(1)
    base = AutoModel.from_pretrained(str(bert), add_pooling_layer=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value", "dense"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    target = tmp_path_factory.mktemp("models") / "adapter"
    model.save_pretrained(str(target))
    return target
