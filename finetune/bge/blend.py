"""The weights of a mixture of a fine-tuned BGE with its base: base + share x (tuned - base).

For a LoRA adapter, whose update is the difference itself, it is the adapter scaled by the share.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

from chains.bge.directory import ModelDirectory, read_model_directory
from chains.bge.encoder import load_encoder


def write_mixture(base: ModelDirectory, tuned: Path, share: float, target: Path) -> None:
    """Write the mixture as a directory of the same kind as the fine-tuned one; what stood at `target` is replaced.

    Args:
        base: directory that was fine-tuned.
        tuned: the model directory or the adapter directory that came of it.
        share: of the fine-tuned weights, 0 to 1.
        target: takes its name when it is whole.
    """
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if (tuned / "adapter_config.json").is_file():
        shutil.copytree(tuned, temporary)
        _scale_adapter(temporary / "adapter_config.json", share)
    else:
        shutil.copytree(tuned, temporary, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
        mixed = load_encoder(read_model_directory(tuned))
        mix(mixed, load_encoder(base), share)
        cast("Any", mixed).save_pretrained(str(temporary))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def mix(tuned: Any, base: Any, share: float) -> None:
    """Draw the parameters of `tuned` towards those of `base`, in place.

    Args:
        tuned: a torch module.
        base: one of the same shape.
        share: of the tuned parameters that stays.
    """
    import torch

    origin = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.copy_(torch.lerp(origin[name].to(parameter.device), parameter, share))


def _scale_adapter(config: Path, share: float) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["lora_alpha"] = settings["lora_alpha"] * share
    config.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
