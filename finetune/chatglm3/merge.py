"""An adapter merged into its base: a model directory of its own, proved equal before it is called done."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chains.chatglm3.checkpoints import read_json, write_json
from chains.chatglm3.convert import MANIFEST, ORIGINAL_FOLDER, convert_chatglm3
from chains.chatglm3.directories import native_adapter, native_directory
from chains.chatglm3.loading import ModelOptions, choose_device, choose_dtype, load_causal_model
from chains.chatglm3.options import DType, Quantization
from chains.chatglm3.prompt import ChatGLM3Tokenizer, Turn, prompt_ids
from chains.lora import resolve_adapter, with_adapter
from finetune.chatglm3.model import save_model
from finetune.report import read_manifest
from loaders.errors import RagProjError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Largest difference of logits, as a share of their spread, that rounding to the saved type may leave.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_PROBES = ("什么是知识库？", "请根据参考资料回答：采购申请由谁审批？", "Which references hold the answer? [1][2]")

Teller = Callable[[str], None]


class MergeError(RagProjError):
    """An adapter that cannot be merged, or a merged model that does not say what the adapter's says."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge came to."""

    target: Path
    original: Path | None
    """the same model in the original layout, where it was asked for"""
    dtype: str
    difference: float
    """largest difference of logits between the merged model and base with adapter"""
    tolerance: float
    """what it may be"""


def merge_adapter(
    adapter: Path,
    target: Path,
    *,
    base: str | None = None,
    quantization: Quantization | None = None,
    original: bool = False,
    device: str = "auto",
    dtype: DType = "auto",
    tell: Teller = lambda _: None,
) -> MergeReport:
    """Merge an adapter into its base and write a native model directory, which takes its name when it is proved equal.

    An adapter that was trained over 4-bit weights is merged into what these stand for: they are dequantised first,
    since merging into 4 bits would round the adapter away.

    Args:
        adapter: its directory.
        target: a directory that does not exist yet.
        base: directory or id of the model it belongs to; None: as the adapter names it.
        quantization: of the base it was trained over; None: as its training's report says, else none.
        original: write the original ChatGLM3 layout, too, to `<target>-original`.
        device: where to compute.
        dtype: of the weights written.
        tell: told in a line what begins.

    Raises:
        MergeError: the merged model gives other logits than the adapter's.
        UsageError: the target exists.
        RagProjError: adapter or base cannot be read.
    """
    layout = target.with_name(f"{target.name}-original") if original else None
    for path in (target, layout):
        if path is not None and path.exists():
            raise UsageError(f"{path} 已经存在；请换一个目录", f"{path} exists already; name another directory")
    config = read_json(resolve_adapter(adapter) / "adapter_config.json")
    directory = native_directory(base or str(config["base_model_name_or_path"]))
    if (kind := read_json(directory / "config.json").get("model_type")) != "glm":
        raise MergeError(
            f"适配器 {adapter} 的底座 {directory} 是 {kind}，不是 ChatGLM3；BGE 的适配器载入时就并入，不用合并",
            f"the adapter {adapter} belongs to {directory}, which is {kind}, not ChatGLM3; adapters of BGE are merged"
            " when they are loaded",
        )
    if original and not (directory / ORIGINAL_FOLDER / "files.json").is_file():
        raise MergeError(
            f"{directory} 中没有 {ORIGINAL_FOLDER}/files.json，不能写出原版布局；"
            "请用 ragproj convert chatglm3 转换出的底座",
            f"{directory} has no {ORIGINAL_FOLDER}/files.json, so the original layout cannot be written; use a base"
            " that ragproj convert chatglm3 wrote",
        )
    adapter = native_adapter(str(adapter), directory)
    trained_over = quantization or _quantization_of(adapter)
    where = choose_device(device)
    numbers = str(choose_dtype(dtype, where)).removeprefix("torch.")
    options = ModelOptions(directory, None, trained_over, str(where), numbers)  # type: ignore[arg-type]
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    tell("合并 / merging")
    _write_merged(options, adapter, temporary)
    tell("核对 / comparing")
    difference, tolerance = _difference(options, adapter, temporary)
    if difference > tolerance:
        shutil.rmtree(temporary)
        raise MergeError(
            f"合并后的模型与适配器模型的输出相差 {difference:.2g}，超过 {tolerance:.2g}，未写出；可改用 dtype=float32",
            f"the merged model's logits differ from the adapter's by {difference:.2g}, more than {tolerance:.2g};"
            " nothing was written; try dtype=float32",
        )
    manifest = {"kind": "chatglm3-merged", "base": str(config["base_model_name_or_path"]), "adapter": adapter.name}
    manifest |= {"quantization": trained_over, "dtype": numbers}
    write_json(temporary / MANIFEST, {**manifest, "difference": difference})
    temporary.rename(target)
    if layout is not None:
        tell("写出原版布局 / writing the original layout")
        convert_chatglm3(target, layout, reverse=True)
    return MergeReport(target, layout, numbers, difference, tolerance)


def _quantization_of(adapter: Path) -> Quantization:
    """What an adapter was trained over, as its training's report says."""
    manifest = read_manifest(adapter) or {}
    return "nf4" if manifest.get("method") == "qlora" else "none"


def _write_merged(options: ModelOptions, adapter: Path, target: Path) -> None:
    """Merge and save; no model is left in memory."""
    model = load_causal_model(options)
    if options.quantization != "none":
        model = model.dequantize()
    merged = with_adapter(model, adapter, options.directory, merge=True)
    merged.config.quantization_config = None  # the copy on the disk is an ordinary one
    del merged.config.quantization_config
    save_model(merged, target, options.directory)


def _difference(options: ModelOptions, adapter: Path, merged: Path) -> tuple[float, float]:
    """(largest difference of logits over some prompts, what it may be), one model after the other in memory."""
    tokenizer = ChatGLM3Tokenizer.from_directory(options.directory)
    prompts = [prompt_ids(tokenizer, [Turn("user", text)]) for text in _PROBES]
    wanted = _logits(
        ModelOptions(options.directory, adapter, options.quantization, options.device, options.dtype), prompts
    )
    found = _logits(ModelOptions(merged, None, "none", options.device, options.dtype), prompts)
    difference = max(float((one - other).abs().max()) for one, other in zip(wanted, found, strict=True))
    spread = max(1.0, *(float(one.std()) for one in wanted))
    return difference, _TOLERANCE[options.dtype] * spread


def _logits(options: ModelOptions, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of each prompt's places, on the CPU."""
    import torch

    model = load_causal_model(options)
    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts]
    del model
    gc.collect()
    return found
