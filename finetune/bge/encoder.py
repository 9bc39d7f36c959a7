"""The encoder as it is trained: dropout, LoRA, gradient checkpointing, precision; and how it is written down."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chains.bge.directory import ModelDirectory, write_layout
from chains.bge.encoder import load_encoder
from finetune.bge.config import BgeTrainingConfig, Precision
from finetune.bge.dropout import use_cheap_dropout
from loaders.errors import RagProjError

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)


class PrecisionError(RagProjError):
    """A precision that this machine does not have."""


@dataclass(frozen=True)
class Numbers:
    """In what numbers the forward pass runs."""

    dtype: torch.dtype | None
    """of autocast; None for plain float32"""
    scaled: bool
    """float16 needs its gradients scaled"""


def choose_device(name: str, local_rank: int = 0) -> str:
    """The device a config names; `auto` is this process's GPU where there is one."""
    import torch

    if name not in ("auto", "cuda"):
        return name
    if torch.cuda.is_available():
        return f"cuda:{local_rank}"
    if name == "auto":
        return "cpu"
    raise PrecisionError(
        "device 为 cuda，但本机没有可用的显卡；请用 auto", "device is cuda but there is no GPU; use auto"
    )


def choose_numbers(precision: Precision, device: str) -> Numbers:
    """The numbers for a precision on a device; `auto` is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        PrecisionError: float16 without a GPU.
    """
    import torch

    on_gpu = device.startswith("cuda")
    if precision == "fp16" and not on_gpu:
        raise PrecisionError(
            "fp16 训练需要显卡；CPU 上请用 precision=auto", "fp16 training needs a GPU; on a CPU use precision=auto"
        )
    if precision == "auto":
        precision, why = _automatic(on_gpu)
        logger.info("%s: %s", precision, why)
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Numbers(dtypes[precision], scaled=precision == "fp16")


def _automatic(on_gpu: bool) -> tuple[Precision, str]:
    import torch

    if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU has it"
    if on_gpu:
        return "fp16", "the GPU has no bf16"
    # avx512_bf16 or amx_bf16; without them bfloat16 is emulated and slower than float32
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return "bf16", "the processor multiplies it"
    return "fp32", "the processor has no bf16"


def training_encoder(config: BgeTrainingConfig, directory: ModelDirectory, device: str) -> nn.Module:
    """The model of a directory in float32 and train mode, ready for the first step.

    With `method: lora` everything but the adapter is frozen; the adapter starts from the seed.
    """
    import torch

    encoder = load_encoder(directory, device=device)
    if config.dropout is not None:
        set_dropout(encoder, config.dropout)
    if config.gradient_checkpointing:
        # not reentrant: with LoRA the inputs of the first layer need no gradient
        cast("Any", encoder).gradient_checkpointing_enable({"use_reentrant": False})
    if config.method == "lora":
        torch.manual_seed(config.seed)
        encoder = _with_lora(encoder, config)
    if device == "cpu":
        use_cheap_dropout(encoder)
    return encoder.train()


def set_dropout(encoder: nn.Module, share: float) -> None:
    """Give every dropout of a model this share."""
    from torch import nn

    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def _with_lora(encoder: nn.Module, config: BgeTrainingConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # an int by its annotation, divided as a float
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.targets),
        task_type="FEATURE_EXTRACTION",
    )
    try:
        return cast("nn.Module", get_peft_model(cast("Any", encoder), settings))
    except ValueError as error:  # no layer has such a name
        reason = " ".join(str(error).split())
        raise RagProjError(
            f"lora.targets {config.lora.targets} 与模型不符：{reason}",
            f"lora.targets {config.lora.targets} do not fit the model: {reason}",
        ) from error


def save_candidate(encoder: nn.Module, target: Path, directory: ModelDirectory, config: BgeTrainingConfig) -> None:
    """Write the model directory, or the adapter directory that names its base; it takes its name when it is whole.

    What stood there before is replaced.
    """
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if config.method == "lora":
        adapted = cast("Any", encoder)
        adapted.peft_config["default"].base_model_name_or_path = config.model
        adapted.save_pretrained(str(temporary))
    else:
        cast("Any", encoder).save_pretrained(str(temporary))
        write_layout(temporary, directory, query_instruction=config.query_instruction)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
