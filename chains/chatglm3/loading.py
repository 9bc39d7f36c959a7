"""A causal language model from a native directory: device, type and quantisation chosen and logged."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.chatglm3.options import DType, Quantization
from chains.chatglm3.settings import ConversionError
from chains.lora import with_adapter
from loaders.errors import UsageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


# bitsandbytes' kernels: columns and rows of a matrix must be multiples of these
_COLUMNS, _ROWS = 64, 32


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded; equal options share one loaded model."""

    directory: Path
    adapter: Path | None = None
    quantization: Quantization = "none"
    device: str = "auto"
    dtype: DType = "auto"


def choose_device(name: str) -> torch.device:
    """The device a config's `device` means; "auto" is the GPU where there is one.

    Raises:
        UsageError: it names a device that torch does not see here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("device %s: %s", name, "a GPU is there" if name == "cuda" else "torch sees no GPU")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"设备 {name!r} 不可用：{reason}；请用 device: auto、cpu 或 cuda:0",
            f"device {name!r} cannot be used: {reason}; use device: auto, cpu or cuda:0",
        ) from error
    return device


def choose_dtype(name: DType, device: torch.device) -> torch.dtype:
    """The type of the numbers; "auto" takes what the device computes fast."""
    import torch

    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda":
        chosen, reason = (
            (torch.bfloat16, "the GPU has it")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float16, "this GPU has no bfloat16")
        )
    elif torch.cpu._is_avx512_bf16_supported():
        chosen, reason = torch.bfloat16, "this CPU has it"
    else:
        chosen, reason = torch.float32, "this CPU has no fast bfloat16"
    logger.info("%s: %s", str(chosen).removeprefix("torch."), reason)
    return chosen


def load_causal_model(options: ModelOptions) -> Any:
    """The model in evaluation mode, on its device, with its adapter.

    Raises:
        ConversionError: the directory holds no causal language model, or its layers do not fit the quantisation.
        ModelDirectoryError: the adapter is not one of this model.
        UsageError: the device is not there.
    """
    from transformers import AutoModelForCausalLM

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "trust_remote_code": False}
    if options.quantization != "none":
        arguments["quantization_config"] = _quantization(options.quantization, dtype)
    logger.info("loading %s, %s, quantization %s", options.directory, dtype, options.quantization)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.directory, local_files_only=True, **arguments)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"无法加载模型 {options.directory}：{reason}", f"cannot load the model {options.directory}: {reason}"
        ) from error
    if options.quantization != "none":
        prepare_quantized(model, options.directory)
    if options.adapter is not None:
        model = with_adapter(model, options.adapter, options.directory)
    return model.eval()


def _quantization(kind: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def prepare_quantized(model: Any, where: Path) -> None:
    """Make a model that bitsandbytes quantised safe to train, evaluate and merge.

    On CPUs with AVX512-BF16, `Linear4bit` would repack its weights in place in evaluation mode; training on after that
    crashes, and a merge gives garbage (bitsandbytes 0.50).

    Raises:
        ConversionError: a layer's size is one the kernels cannot compute with.
    """
    from bitsandbytes.nn.modules import Linear4bit

    misfits = []
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % _COLUMNS or module.out_features % _ROWS:
            misfits.append(f"{name} {module.in_features}x{module.out_features}")
    if misfits:
        raise ConversionError(
            f"{where} 有 {len(misfits)} 层不能量化为 4 位（输入须为 {_COLUMNS} 的倍数，输出须为 {_ROWS} 的倍数），"
            f"例如 {misfits[0]}；请用 quantization: none",
            f"{len(misfits)} layers of {where} cannot be quantised to 4 bits (inputs must be multiples of {_COLUMNS},"
            f" outputs of {_ROWS}), such as {misfits[0]}; use quantization: none",
        )
