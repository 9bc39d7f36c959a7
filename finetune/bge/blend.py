"""The weights of a mixture of a fine-tuned BGE with its base: base + share x (tuned - base).

For a LoRA adapter, whose update is the difference itself, it is the adapter scaled by the share.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from chains.bge.directory import ModelDirectory, read_model_directory
from chains.bge.encoder import load_encoder
from finetune.blend import mix, write_scaled_adapter
from finetune.directories import replaced


def write_mixture(base: ModelDirectory, tuned: Path, share: float, target: Path) -> None:
    """Write the mixture as a directory of the same kind as the fine-tuned one; what stood at `target` is replaced.

    Args:
        base: directory that was fine-tuned.
        tuned: the model directory or the adapter directory that came of it.
        share: of the fine-tuned weights, 0 to 1.
        target: takes its name when it is whole.
    """
    if (tuned / "adapter_config.json").is_file():
        write_scaled_adapter(tuned, share, target)
        return
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json")
    with replaced(target) as folder:
        shutil.copytree(tuned, folder, ignore=weights, dirs_exist_ok=True)
        mixed = load_encoder(read_model_directory(tuned))
        mix(mixed, load_encoder(base), share)
        cast("Any", mixed).save_pretrained(str(folder))
