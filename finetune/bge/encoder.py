"""The encoder as it is trained: dropout, LoRA, gradient checkpointing; and how it is written down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chains.bge.directory import ModelDirectory, write_layout
from chains.bge.encoder import load_encoder
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.dropout import use_cheap_dropout
from finetune.directories import replaced
from finetune.lora import add_adapter, save_adapter

if TYPE_CHECKING:
    from torch import nn


def training_encoder(config: BgeTrainingConfig, directory: ModelDirectory, device: str) -> nn.Module:
    """The model of a directory in float32 and train mode, ready for the first step.

    With `method: lora` everything but the adapter is frozen; the adapter starts from the seed.
    """
    encoder = load_encoder(directory, device=device)
    if config.dropout is not None:
        set_dropout(encoder, config.dropout)
    if config.gradient_checkpointing:
        # not reentrant: with LoRA the inputs of the first layer need no gradient
        cast("Any", encoder).gradient_checkpointing_enable({"use_reentrant": False})
    if config.method == "lora":
        encoder = add_adapter(encoder, config.lora, seed=config.seed, task="FEATURE_EXTRACTION")
    if device == "cpu":
        use_cheap_dropout(encoder)
    return encoder.train()


def set_dropout(encoder: nn.Module, share: float) -> None:
    """Give every dropout of a model this share."""
    from torch import nn

    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def save_candidate(encoder: nn.Module, target: Path, directory: ModelDirectory, config: BgeTrainingConfig) -> None:
    """Write the model directory, or the adapter directory that names its base; it takes its name when it is whole.

    What stood there before is replaced.
    """
    with replaced(target) as folder:
        if config.method == "lora":
            save_adapter(encoder, folder, base=config.model)
        else:
            cast("Any", encoder).save_pretrained(str(folder))
            write_layout(folder, directory, query_instruction=config.query_instruction)
