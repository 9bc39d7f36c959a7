"""Weights of mixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bge_models import build_bert

from chains.bge.directory import read_model_directory
from chains.bge.embeddings import BGEEmbeddings
from chains.bge.encoder import load_encoder
from finetune.bge.blend import write_mixture
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.encoder import save_candidate, training_encoder

TEXTS = ["怎样备份知识库", "向量模型", "检索"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape as `tiny_model`, other weights."""
    return build_bert(tmp_path_factory.mktemp("tuned") / "model", seed=1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_is_the_weighted_mean_of_both_models(
    tiny_model: Path, tuned: Path, tmp_path: Path, share: float
) -> None:
    write_mixture(read_model_directory(tiny_model), tuned, share, tmp_path / "mixture")
    old, new, mixed = (
        dict(load_encoder(read_model_directory(path)).named_parameters())
        for path in (tiny_model, tuned, tmp_path / "mixture")
    )
    assert mixed.keys() == old.keys()
    for name, weight in mixed.items():
        expected = (1 - share) * old[name].detach().numpy() + share * new[name].detach().numpy()
        assert np.allclose(weight.detach().numpy(), expected, atol=1e-6), name


def test_a_mixture_is_a_whole_model_directory_in_place_of_what_was_there(
    tiny_model: Path, tuned: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mixture"
    target.mkdir()
    (target / "left").touch()
    write_mixture(read_model_directory(tiny_model), tuned, 1.0, target)
    assert not (target / "left").exists()
    same = BGEEmbeddings(target, engine="torch").embed_documents_array(TEXTS)
    assert np.allclose(same, BGEEmbeddings(tuned, engine="torch").embed_documents_array(TEXTS), atol=1e-6)


def test_an_adapter_is_scaled_to_the_same_weights_as_a_mixture_of_the_merged_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    config = BgeTrainingConfig.from_dict(
        {"model": str(tiny_model), "output": "o", "train": ["t"], "method": "lora", "lora": {"rank": 2}}, where="test"
    )
    directory = read_model_directory(tiny_model)
    encoder = training_encoder(config, directory, "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_candidate(encoder, tmp_path / "adapter", directory, config)
    write_mixture(directory, tmp_path / "adapter", 0.4, tmp_path / "scaled")
    base, whole, scaled = (
        dict(load_encoder(directory, adapter, merge=True).named_parameters())
        for adapter in (None, tmp_path / "adapter", tmp_path / "scaled")
    )
    for name in base:
        expected = 0.6 * base[name] + 0.4 * whole[name]
        assert torch.allclose(scaled[name], expected, atol=1e-5), name
    assert any(not torch.equal(base[name], whole[name]) for name in base)
