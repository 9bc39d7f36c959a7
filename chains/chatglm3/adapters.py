"""LoRA adapters trained on the original ChatGLM3: their native counterpart, exactly."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.chatglm3.checkpoints import Checkpoint, read_json, write_json, write_shard
from chains.chatglm3.convert import MANIFEST
from chains.chatglm3.settings import ConversionError
from chains.chatglm3.weights import LAYER_NAMES

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"base_model\.model\.transformer\.encoder\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
# module of the original -> native modules, such as query_key_value -> q_proj, k_proj, v_proj
_MODULES = {
    original.removesuffix(".weight"): tuple(native.removesuffix(".weight") for native in natives)
    for original, natives in LAYER_NAMES.items()
    if original.endswith(".weight") and "layernorm" not in original
}
_TARGETS = {original.rpartition(".")[2]: natives for original, natives in _MODULES.items()}
_NOT_CONVERTED = ("alpha_pattern", "rank_pattern", "modules_to_save", "layers_to_transform", "use_dora")


def is_original_adapter(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json names modules of the original ChatGLM3."""
    targets = config.get("target_modules") or []
    return isinstance(targets, list) and bool(set(targets) & set(_TARGETS))


def convert_adapter(source: Path, target: Path, *, base: Path | None = None) -> int:
    """Convert a PEFT LoRA adapter of the original ChatGLM3 for the native model; the number of tensors written.

    `lora_A` serves q, k and v alike; `lora_B`'s rows are theirs. Nothing is lost or rounded.

    Args:
        source: the adapter's directory.
        target: a directory that does not exist or is empty.
        base: the native model it belongs to; without one, the adapter's own `base_model_name_or_path`. Its rows of q,
            k and v are then told from the adapter's shapes.

    Raises:
        ConversionError: the adapter is no LoRA, targets other modules, or uses options that have no exact counterpart.
    """
    config = read_json(source / ADAPTER_CONFIG)
    _check(config, source)
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(
            f"目标目录 {target} 不是空的；请换一个目录", f"the target {target} is not empty; name another directory"
        )
    file = next((name for name in _WEIGHTS if (source / name).is_file()), _WEIGHTS[0])
    if not (source / file).is_file():
        raise ConversionError(f"{source} 中没有 {file}", f"there is no {file} in {source}")
    checkpoint = Checkpoint(source, [file])
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.shapes:
        tensors.update(_native(name, checkpoint, _heads(base), source))
    targets = sorted({native.rpartition(".")[2] for name in config["target_modules"] for native in _TARGETS[name]})
    native = {**config, "target_modules": targets}
    if base is not None:
        native["base_model_name_or_path"] = str(base)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
        written = Path(beside) / target.name
        written.mkdir()
        write_shard(written / _WEIGHTS[0], tensors)
        write_json(written / ADAPTER_CONFIG, native)
        write_json(written / MANIFEST, {"kind": "chatglm3-adapter", "source": source.name, "tensors": len(tensors)})
        if target.is_dir():
            target.rmdir()  # it is empty
        written.rename(target)
    return len(tensors)


def _check(config: Mapping[str, Any], source: Path) -> None:
    where = source / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ConversionError(
            f"{where} 的 peft_type 是 {config.get('peft_type')!r}，只能转换 LORA",
            f"{where}: peft_type is {config.get('peft_type')!r}; only LORA can be converted",
        )
    options = [name for name in _NOT_CONVERTED if config.get(name)]
    if config.get("bias", "none") != "none":
        options.append("bias")
    targets = config.get("target_modules") or []
    unknown = sorted(set(targets) - set(_TARGETS)) if isinstance(targets, list) else [str(targets)]
    if options or unknown or not targets:
        listed = ", ".join([*options, *unknown]) or "target_modules"
        raise ConversionError(
            f"{where} 中的 {listed} 不能转换；支持 target_modules：{'、'.join(_TARGETS)}",
            f"{where}: {listed} cannot be converted; target_modules may be {', '.join(_TARGETS)}",
        )


def _heads(base: Path | None) -> tuple[int, int] | None:
    """(query heads, key-value groups) of the base."""
    if base is None:
        return None
    config = read_json(base / "config.json")
    return config["num_attention_heads"], config["num_key_value_heads"]


def _native(
    name: str, checkpoint: Checkpoint, heads: tuple[int, int] | None, source: Path
) -> Iterator[tuple[str, Tensor]]:
    """The native tensors of one of the adapter's."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _MODULES:
        raise ConversionError(
            f"{source}：不认识的张量 {name}；支持原版 ChatGLM3 的 {'、'.join(_TARGETS)}",
            f"{source}: unknown tensor {name}; it may be of the original ChatGLM3's {', '.join(_TARGETS)}",
        )
    layer, module, side = match.groups()
    natives, tensor = _MODULES[module], checkpoint.get(name)
    rows = _rows(tensor.shape[0], name, checkpoint, heads) if len(natives) > 1 and side == "B" else None
    parts = [tensor] * len(natives) if rows is None else tensor.split(rows)
    for native, part in zip(natives, parts, strict=True):
        yield f"base_model.model.model.layers.{layer}.{native}.lora_{side}.weight", part.clone()


def _rows(total: int, name: str, checkpoint: Checkpoint, heads: tuple[int, int] | None) -> list[int]:
    """Rows of q, k and v among those of `query_key_value`.

    Without a base, q has as many rows as the model is wide, which `lora_A` tells; true of every ChatGLM3.
    """
    if heads is not None:
        query, groups = heads
        size = total // (query + 2 * groups)
        return [query * size, groups * size, groups * size]
    width = checkpoint.shapes[name.replace(".lora_B.", ".lora_A.")][1]
    return [width, (total - width) // 2, (total - width) // 2]
