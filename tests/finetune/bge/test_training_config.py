"""The shipped YAML files, and settings that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.bge.config import BgeTrainingConfig
from loaders.config import Config
from loaders.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "finetune" / "configs"


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_shipped_config_starts_with_its_run_line_and_can_be_read(name: str) -> None:
    path = CONFIGS / f"bge_{name}.yaml"
    assert path.read_text(encoding="utf-8").startswith(
        f"# ragproj finetune bge --config finetune/configs/bge_{name}.yaml"
    )
    config = BgeTrainingConfig.read(path)
    assert config.method == name
    assert config.evaluation.dev is not None


def test_overrides_are_laid_over_the_file() -> None:
    config = BgeTrainingConfig.read(CONFIGS / "bge_lora.yaml", ["lora.rank=8", "train=[a.jsonl, b.jsonl]"])
    assert (config.lora.rank, config.lora.alpha) == (8, 32)
    assert config.train == [Path("a.jsonl"), Path("b.jsonl")]


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BgeTrainingConfig.read(CONFIGS / "bge_full.yaml", ["temperature=0", "gruop_size=4", "method=qlora"])
    for name in ("temperature", "gruop_size", "method"):
        assert name in caught.value.en


def test_a_group_of_one_without_in_batch_negatives_is_refused() -> None:
    with pytest.raises(ConfigError, match="the loss is 0"):
        BgeTrainingConfig.read(CONFIGS / "bge_full.yaml", ["group_size=1", "in_batch_negatives=false"])


def test_distillation_over_a_group_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size=2"):
        BgeTrainingConfig.read(CONFIGS / "bge_full.yaml", ["group_size=1", "distillation=true"])


def test_an_adapter_cannot_have_a_query_instruction_of_its_own() -> None:
    with pytest.raises(ConfigError, match="method=full"):
        BgeTrainingConfig.read(CONFIGS / "bge_lora.yaml", ["query_instruction=x"])


@pytest.mark.parametrize("length", [0, -16])
def test_a_prefix_without_numbers_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match="matryoshka"):
        BgeTrainingConfig.read(CONFIGS / "bge_full.yaml", [f"matryoshka=[768, {length}]"])


def test_every_field_has_a_meaning() -> None:
    for name, field in BgeTrainingConfig.model_fields.items():
        section = isinstance(field.annotation, type) and issubclass(field.annotation, Config)
        assert section or field.description, name
