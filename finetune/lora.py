"""LoRA adapters (Hu et al. 2021): how large one is, put on a model, written down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from loaders.config import Config
from loaders.errors import RagProjError

if TYPE_CHECKING:
    from torch import nn

Targets = Annotated[
    list[str], Field(min_length=1, description="linear layers that get an adapter, by the end of their names")
]


class LoraSettings(Config):
    """Size and place of an adapter."""

    rank: int = Field(default=16, ge=1, description="of the two factors; more learns more and forgets more")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="on the adapter's input")
    targets: Targets


def add_adapter(model: nn.Module, settings: LoraSettings, *, seed: int, task: str) -> nn.Module:
    """The model with a fresh adapter that alone is trained.

    Args:
        model: what it is put on.
        settings: size and place.
        seed: of its first weights.
        task: what PEFT calls the kind of model: "FEATURE_EXTRACTION", "CAUSAL_LM".

    Raises:
        RagProjError: `targets` name no layer.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # an int by its annotation, divided as a float
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type=task,
    )
    try:
        return cast("nn.Module", get_peft_model(cast("Any", model), lora))
    except ValueError as error:  # no layer has such a name
        reason = " ".join(str(error).split())
        raise RagProjError(
            f"lora.targets {settings.targets} 与模型不符：{reason}",
            f"lora.targets {settings.targets} do not fit the model: {reason}",
        ) from error


def save_adapter(model: nn.Module, folder: Path, *, base: str) -> None:
    """Write the adapter into a folder, with the name of the model that it belongs to."""
    adapted = cast("Any", model)
    settings = adapted.peft_config["default"]
    settings.base_model_name_or_path = base
    # PEFT 0.21 keeps a set, whose order differs between processes: the same adapter would have another digest
    settings.target_modules = sorted(settings.target_modules)
    # PEFT 0.21 would compare the vocabulary with that in the base's config.json, and ask the hub where the base is an
    # id; an original ChatGLM3 calls it otherwise, so that a gigabyte of its embeddings would go into the adapter
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
