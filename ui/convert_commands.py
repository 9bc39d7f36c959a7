"""What `ragproj convert` does; `ui.cli` names its actions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from chains.chatglm3.adapters import convert_adapter as run_adapter
from chains.chatglm3.convert import convert_chatglm3 as run_chatglm3
from loaders.errors import UsageError


def convert_chatglm3(arguments: argparse.Namespace) -> int:
    """Convert a ChatGLM3 checkpoint, or back."""
    _without_config(arguments)
    with tqdm(desc="convert", unit="shard", delay=1, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = run_chatglm3(
            Path(arguments.source), Path(arguments.target), reverse=arguments.reverse, progress=progress
        )
    if arguments.json:
        print(json.dumps({**vars(report), "target": str(report.target)}, ensure_ascii=False))
        return 0
    state = "已经转换过，没有改动 / converted before, unchanged" if report.already else "已转换 / converted"
    print(
        f"{state}：{report.target}，{report.tensors} 个张量 / tensors，{report.parameters:,} 个参数 / parameters，"
        f"{report.shards} 个文件 / files"
    )
    return 0


def convert_adapter(arguments: argparse.Namespace) -> int:
    """Convert a LoRA adapter of the original ChatGLM3."""
    _without_config(arguments)
    base = None if arguments.base is None else Path(arguments.base)
    tensors = run_adapter(Path(arguments.source), Path(arguments.target), base=base)
    if arguments.json:
        print(json.dumps({"target": arguments.target, "tensors": tensors}, ensure_ascii=False))
    else:
        print(f"已转换 / converted：{arguments.target}，{tensors} 个张量 / tensors")
    return 0


def _without_config(arguments: argparse.Namespace) -> None:
    """Conversion has no settings: one that is given would change nothing."""
    if arguments.config is not None or arguments.overrides:
        given = arguments.config or " ".join(arguments.overrides)
        raise UsageError(f"convert 没有配置项，请去掉 {given}", f"convert has no settings; leave out {given}")
