"""Where a training runs, and in what numbers."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loaders.errors import RagProjError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class PrecisionError(RagProjError):
    """A precision that this machine does not have."""


@dataclass(frozen=True)
class Numbers:
    """In what numbers the forward pass runs."""

    dtype: torch.dtype | None
    """of autocast; None for plain float32"""
    scaled: bool
    """float16 needs its gradients scaled"""

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """A context whose forward passes run in these numbers."""
        import torch

        return torch.autocast(device_kind(device), dtype=self.dtype, enabled=self.dtype is not None)


def device_kind(device: str) -> str:
    """ "cpu" or "cuda", of a device as torch names it."""
    return device.split(":")[0]


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
