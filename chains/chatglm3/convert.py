"""Conversion of a ChatGLM3 checkpoint into a native directory and back: a shard at a time, no tensor lost."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock

from chains.chatglm3.checkpoints import Checkpoint, read_header, read_json, write_index, write_json, write_shard
from chains.chatglm3.settings import (
    SPECIAL_TOKENS,
    ConversionError,
    generation_config,
    native_config,
    refuse_relatives,
)
from chains.chatglm3.tokenizer import read_sentencepiece, write_tokenizer
from chains.chatglm3.weights import DROPPED, account, name_map, original_shapes, projection_rows, to_native, to_original

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "ragproj.json"
# Written first: whose conversion a directory without a manifest holds, so that the same one may go on.
_UNFINISHED = "conversion.json"
# What the way back needs and the native model does not; merged models carry the folder along.
ORIGINAL_FOLDER = "original"
_FILES = "files.json"
_DROPPED_FILE = "dropped.safetensors"
_CARRIED = (
    "config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "MODEL_LICENSE",
    "LICENSE",
)
_LISTED = 20  # problems named in a message

Progress = Callable[[int, int], None]
"""Called with the shards done and the shards in all."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion came to."""

    target: Path
    tensors: int
    """of the original layout, those dropped not counted"""
    parameters: int
    shards: int
    already: bool
    """whether the directory was complete before"""


class _Direction(Protocol):
    """One way of conversion, its source read and checked."""

    kind: str
    checkpoint: Checkpoint
    tensors: int

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        """Output file -> names of its tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output tensor."""

    def tensors_of(self, file: str) -> dict[str, Tensor]:
        """Contents of an output file."""

    def write_rest(self, target: Path) -> None:
        """Everything beside the weights and the manifest."""


def convert_chatglm3(
    source: Path, target: Path, *, reverse: bool = False, progress: Progress | None = None
) -> ConversionReport:
    """Convert an original ChatGLM3 directory (-6b, -6b-base, -6b-32k) into a native one, or back with `reverse`.

    Tensors keep their bits and their type. A conversion that was killed goes on where it stopped; a finished one is
    left as it is. The manifest is written last.

    Raises:
        ConversionError: the source is incomplete, damaged or of another kind, tensors do not account for the model, or
            the target holds something else.
    """
    source, target = source.expanduser(), target.expanduser()
    if not source.is_dir():
        raise ConversionError(f"找不到模型目录 {source}", f"there is no model directory {source}")
    if source.resolve() == target.resolve():
        raise ConversionError(
            f"目标与来源是同一个目录 {source}；请给出另一个目录", f"source and target are both {source}; name another"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        direction: _Direction = _ToOriginal(source) if reverse else _ToNative(source)
        return _run(direction, target, progress)


def _run(direction: _Direction, target: Path, progress: Progress | None) -> ConversionReport:
    identity = {"kind": direction.kind, "source_files": _identity(direction.checkpoint)}
    already = _claim(target, identity)
    written = set(itertools.chain.from_iterable(direction.outputs.values())) - set(DROPPED)
    parameters = sum(math.prod(direction.shape(name)) for name in written)
    report = ConversionReport(target, direction.tensors, parameters, len(direction.outputs), already)
    if already:
        logger.info("%s is converted already", target)
        return report
    for done, (file, names) in enumerate(direction.outputs.items()):
        if progress is not None:
            progress(done, report.shards)
        expected = {name: direction.shape(name) for name in names}
        if not _holds(target / file, expected):
            write_shard(target / file, direction.tensors_of(file))
    direction.checkpoint.close()
    direction.write_rest(target)
    if report.shards > 1:
        file_of = {name: file for file, names in direction.outputs.items() for name in names}
        total = sum((target / file).stat().st_size for file in direction.outputs)
        write_index(target / "model.safetensors.index.json", file_of, total)
    manifest = {**identity, "tensors": report.tensors, "parameters": parameters, "files": sorted(direction.outputs)}
    write_json(target / MANIFEST, manifest)
    (target / _UNFINISHED).unlink(missing_ok=True)
    if progress is not None:
        progress(report.shards, report.shards)
    return report


def _identity(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change of the files converted: enough to tell other weights without reading them."""
    stats = {file: (checkpoint.directory / file).stat() for file in checkpoint.files}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _claim(target: Path, identity: Mapping[str, Any]) -> bool:
    """Make the target this conversion's; True where it is finished already."""
    for name in (MANIFEST, _UNFINISHED):
        if not (target / name).is_file():
            continue
        held = read_json(target / name)
        if {key: held.get(key) for key in identity} == identity:
            return name == MANIFEST
        raise ConversionError(
            f"{target} 是由别的文件转换来的；请删除它，或换一个目标目录",
            f"{target} was converted from other files; delete it or name another target",
        )
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(
            f"目标目录 {target} 不是空的；请换一个目录", f"the target {target} is not empty; name another directory"
        )
    target.mkdir(exist_ok=True)
    write_json(target / _UNFINISHED, identity)
    return False


def _holds(path: Path, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an output file was written by the run before; it has its name only when it is complete."""
    return path.is_file() and {name: shape for name, (shape, _) in read_header(path).items()} == expected


def _refuse(problems: list[tuple[str, str]], where: Path) -> None:
    if not problems:
        return
    more = len(problems) - _LISTED
    zh = "；".join(zh for zh, _ in problems[:_LISTED]) + (f"；另有 {more} 处" if more > 0 else "")
    en = "; ".join(en for _, en in problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise ConversionError(
        f"{where} 的张量与配置不符，共 {len(problems)} 处：{zh}",
        f"the tensors of {where} do not fit its config, {len(problems)} problem(s): {en}",
    )


def _numbered(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class _ToNative:
    """From the original to the native layout; each shard becomes one."""

    kind = "chatglm3"

    def __init__(self, source: Path) -> None:
        original = read_json(source / "config.json")
        settings = source / "tokenizer_config.json"
        if settings.is_file():
            refuse_relatives(read_json(settings).get("name_or_path"), str(settings))
        self._source = source
        self._vocabulary = read_sentencepiece(source / "tokenizer.model")
        pieces = len(self._vocabulary.pieces)
        self.config = native_config(original, pieces=pieces, where=str(source / "config.json"))
        if pieces + len(SPECIAL_TOKENS) > self.config["vocab_size"]:
            raise ConversionError(
                f"{source}：分词器有 {pieces} 个词条，放不进 padded_vocab_size={self.config['vocab_size']}",
                f"{source}: the tokenizer's {pieces} pieces do not fit padded_vocab_size={self.config['vocab_size']}",
            )
        self.checkpoint = Checkpoint(source)
        found = {name: shape for name, shape in self.checkpoint.shapes.items() if name not in DROPPED}
        expected = original_shapes(self.config)
        _refuse(list(account(found, expected)), source)
        self.tensors = len(expected)
        self._natives = name_map(self.config["num_hidden_layers"])
        self._rows = projection_rows(self.config)
        kept = {file: [n for n in self.checkpoint.names_in(file) if n in found] for file in self.checkpoint.files}
        kept = {file: names for file, names in kept.items() if names}
        self._originals = dict(zip(_numbered(len(kept)), kept.values(), strict=True))
        self._shapes = {
            native: (rows, *expected[name][1:])
            for name, natives in self._natives.items()
            for native, rows in zip(natives, self._rows if len(natives) > 1 else expected[name][:1], strict=True)
        }

    @property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """Output file -> names of its tensors."""
        return {
            file: tuple(itertools.chain.from_iterable(self._natives[name] for name in names))
            for file, names in self._originals.items()
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output tensor."""
        return self._shapes[name]

    def tensors_of(self, file: str) -> dict[str, Tensor]:
        """Contents of an output file."""
        tensors: dict[str, Tensor] = {}
        for name in self._originals[file]:
            tensors.update(to_native(self.checkpoint.get(name), self._natives[name], self._rows))
        return tensors

    def write_rest(self, target: Path) -> None:
        """Config, tokenizer, and the folder for the way back."""
        context = self.config["max_position_embeddings"]
        write_json(target / "config.json", self.config)
        write_json(target / "generation_config.json", generation_config(self.config))
        write_tokenizer(self._vocabulary, target, context=context, where=str(self._source / "tokenizer.model"))
        folder = target / ORIGINAL_FOLDER
        folder.mkdir(exist_ok=True)
        for name in _CARRIED:
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, folder / name)
        dropped = {name: self.checkpoint.get(name) for name in DROPPED if name in self.checkpoint.shapes}
        write_shard(folder / _DROPPED_FILE, dropped)
        files = {file: self.checkpoint.names_in(file) for file in self.checkpoint.files}
        write_json(folder / _FILES, {"dtype": _dtype(self.checkpoint), "files": files})


def _dtype(checkpoint: Checkpoint) -> str:
    """Of the largest tensor, the embedding."""
    return checkpoint.dtypes[max(checkpoint.shapes, key=lambda name: math.prod(checkpoint.shapes[name]))]


class _ToOriginal:
    """From a native directory that was converted, or merged from one, back to the original layout."""

    kind = "chatglm3-original"

    def __init__(self, source: Path) -> None:
        self._folder = source / ORIGINAL_FOLDER
        if not (self._folder / _FILES).is_file():
            raise ConversionError(
                f"{source} 中没有 {ORIGINAL_FOLDER}/{_FILES}；能转换回去的只有 ragproj convert chatglm3 写出的目录，"
                "以及由它合并的模型",
                f"{source} has no {ORIGINAL_FOLDER}/{_FILES}; only what ragproj convert chatglm3 wrote can be converted"
                " back, and models merged from that",
            )
        config = read_json(source / "config.json")
        files = read_json(self._folder / _FILES)
        self._natives = name_map(config["num_hidden_layers"])
        self.checkpoint = Checkpoint(source)
        self._expected = original_shapes(config)
        known = set(itertools.chain.from_iterable(self._natives.values()))
        missing = sorted(known - set(self.checkpoint.shapes))
        _refuse([(f"缺少 {name}", f"{name} is missing") for name in missing], source)
        self.tensors = len(self._expected)
        self._dropped = Checkpoint(self._folder, [_DROPPED_FILE])
        self._dtype_changed = files["dtype"] != _dtype(self.checkpoint)
        names = [tuple(names) for names in files["files"].values()]
        old = list(files["files"])
        same_names = all(file.endswith(".safetensors") for file in old)
        # .bin shards come back as safetensors: this project writes no pickles
        self.outputs = dict(zip(old if same_names else _numbered(len(old)), names, strict=True))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output tensor."""
        return self._dropped.shapes[name] if name in DROPPED else self._expected[name]

    def tensors_of(self, file: str) -> dict[str, Tensor]:
        """Contents of an output file."""
        return {
            name: self._dropped.get(name) if name in DROPPED else to_original(self._natives[name], self.checkpoint.get)
            for name in self.outputs[file]
        }

    def write_rest(self, target: Path) -> None:
        """Config and tokenizer as they were."""
        for name in _CARRIED:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, target / name)
        if self._dtype_changed:
            config = read_json(self._folder / "config.json")
            write_json(target / "config.json", {**config, "torch_dtype": _dtype(self.checkpoint)})
