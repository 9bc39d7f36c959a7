"""ChatGLM3 as it is trained: 4-bit or 16-bit weights under an adapter, or all weights; and how it is written down."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.chatglm3.convert import ORIGINAL_FOLDER
from chains.chatglm3.loading import ModelOptions, choose_device, choose_dtype, load_causal_model
from finetune.chatglm3.attention import use_row_attention
from finetune.chatglm3.config import ChatGlm3TrainingConfig, OptimizerName
from finetune.directories import replaced
from finetune.lora import add_adapter, save_adapter
from finetune.precision import Numbers
from loaders.errors import RagProjError

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

# Beside the weights of a native directory: what serving and the way back to the original layout need.
_CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_SHARD = "5GB"
# Optimizers of bitsandbytes by their names in a config.
_EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


class OptimizerError(RagProjError):
    """An optimizer that this machine does not have."""


def device_and_dtype(config: ChatGlm3TrainingConfig, local_rank: int = 0) -> tuple[str, torch.dtype]:
    """Where a process trains, and in what numbers."""
    device = choose_device(config.device)
    name = f"cuda:{local_rank}" if device.type == "cuda" and device.index is None else str(device)
    return name, choose_dtype(config.dtype, device)


def numbers_of(dtype: torch.dtype) -> Numbers:
    """The numbers of a forward pass over weights of this type."""
    import torch

    return Numbers(None if dtype == torch.float32 else dtype, scaled=dtype == torch.float16)


def serving_quantization(config: ChatGlm3TrainingConfig) -> str:
    """`quantization` of the chat model that serves what this run trains."""
    return "nf4" if config.method == "qlora" else "none"


def training_model(config: ChatGlm3TrainingConfig, directory: Path, device: str, dtype: torch.dtype) -> Any:
    """The model in train mode, ready for the first step; what is trained is float32 and the rest frozen.

    Raises:
        ConversionError: the directory holds no such model, or its layers do not suit 4 bits.
        RagProjError: `lora.targets` name no layer.
    """
    name = "float32" if config.method == "full" else str(dtype).removeprefix("torch.")
    model = load_causal_model(
        ModelOptions(directory, None, serving_quantization(config), device, name)  # type: ignore[arg-type]
    )
    use_row_attention(model)
    if config.method != "full":
        model.requires_grad_(False)
        model = add_adapter(model, config.lora, seed=config.seed, task="CAUSAL_LM")
    if config.gradient_checkpointing:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        # not reentrant: the inputs of the first layer need no gradient
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def chosen_optimizer(name: OptimizerName, device: str) -> OptimizerName:
    """The optimizer that a name means on a device: `auto` is paged 8-bit AdamW on a GPU and plain AdamW on a CPU."""
    if name != "auto":
        return name
    return "paged_adamw_8bit" if device.startswith("cuda") else "adamw"


def training_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], *, learning_rate: float, device: str
) -> Optimizer:
    """The optimizer a config names.

    Raises:
        OptimizerError: an 8-bit one without a GPU.
    """
    import torch

    on_gpu = device.startswith("cuda")
    if name == "auto":
        name = chosen_optimizer(name, device)
        logger.info("optimizer %s: %s", name, "a GPU is there" if on_gpu else "8-bit ones need a GPU")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if not on_gpu:
        raise OptimizerError(
            f"optimizer={name} 需要显卡；CPU 上请用 auto 或 adamw",
            f"optimizer={name} needs a GPU; on a CPU use auto or adamw",
        )
    import bitsandbytes

    optimizer: Optimizer = getattr(bitsandbytes.optim, _EIGHT_BIT[name])(groups, lr=learning_rate)
    return optimizer


def save_candidate(model: Any, target: Path, directory: Path, config: ChatGlm3TrainingConfig) -> None:
    """Write the adapter directory that names its base, or the whole model; it takes its name when it is whole.

    What stood there before is replaced.
    """
    with replaced(target) as folder:
        if config.method == "full":
            save_model(model, folder, directory)
        else:
            save_adapter(model, folder, base=config.model)


def save_model(model: Any, target: Path, directory: Path) -> None:
    """Write a native directory: weights in shards, and beside them what the directory it came from has."""
    model.save_pretrained(str(target), max_shard_size=_SHARD)
    for name in _CARRIED:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, target / name)
    if (directory / ORIGINAL_FOLDER).is_dir():
        shutil.copytree(directory / ORIGINAL_FOLDER, target / ORIGINAL_FOLDER, dirs_exist_ok=True)
