"""Tensor files of a model directory: read one shard at a time without unpickling code, written beside and renamed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.caches import beside
from chains.chatglm3.settings import ConversionError

if TYPE_CHECKING:
    from torch import Tensor

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConversionError: it is missing, damaged or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"找不到 {path}；请给出完整的模型目录", f"{path} does not exist; give a complete model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"无法读取 {path}：{error}", f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} 的内容应为 JSON 对象", f"{path} must hold a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file at once."""
    with beside(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class Checkpoint:
    """The tensors of a model directory, whichever files they lie in. Holds one file open at a time."""

    def __init__(self, directory: Path, files: Sequence[str] | None = None) -> None:
        """Reads names and shapes of the files, or of those that `shard_names` finds.

        Raises:
            ConversionError: no tensor files, some that the index names are missing, or one is damaged.
        """
        self.directory = directory
        self.files = list(files) if files is not None else shard_names(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.file_of: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        for file in self.files:
            for name, (shape, dtype) in self._read_header(file).items():
                self.shapes[name], self.dtypes[name], self.file_of[name] = shape, dtype, file

    def names_in(self, file: str) -> list[str]:
        """Names of the tensors in one file, in its order."""
        return [name for name, home in self.file_of.items() if home == file]

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from its file where the format allows it."""
        file = self.file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, _open_shard(self.directory / file))
        shard = self._open[1]
        tensor: Tensor = shard[name] if isinstance(shard, dict) else shard.get_tensor(name)
        return tensor

    def close(self) -> None:
        """Let go of the open file."""
        self._open = None

    def _read_header(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        path = self.directory / file
        if path.suffix == ".safetensors":
            return read_header(path)
        self._open = (file, _open_shard(path))
        return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in self._open[1].items()}


def shard_names(directory: Path) -> list[str]:
    """File names of a directory's tensor files: as its index lists them, else the single one; safetensors first.

    Raises:
        ConversionError: there are none, or some that the index names are missing.
    """
    for index, single in zip(_INDEXES, _SINGLE, strict=True):
        if (directory / index).is_file():
            files = sorted(set(read_json(directory / index).get("weight_map", {}).values()))
            missing = [file for file in files if not (directory / file).is_file()]
            if missing or not files:
                listed = ", ".join(missing) or "weight_map"
                raise ConversionError(
                    f"{directory / index} 列出的文件不全，缺少：{listed}；请补齐下载",
                    f"files that {directory / index} lists are missing: {listed}; complete the download",
                )
            return files
        if (directory / single).is_file():
            return [single]
    raise ConversionError(
        f"{directory} 中没有权重文件（{'、'.join(_SINGLE + _INDEXES)}）",
        f"no weights in {directory} ({', '.join(_SINGLE + _INDEXES)})",
    )


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype as torch calls it) of a safetensors file, without reading its tensors.

    Raises:
        ConversionError: the file is damaged or cut off.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Any = json.loads(file.read(length)) if length < _LARGEST_HEADER else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        complete = path.stat().st_size == 8 + length + end
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ConversionError(f"{path} 已损坏或不完整；请重新下载", f"{path} is damaged or cut off; download it again")
    return {
        name: (tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"])) for name, entry in entries.items()
    }


_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
# safetensors' names of the types a checkpoint may have
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}


def _open_shard(path: Path) -> Any:
    """A shard's tensors, mapped into memory: a safetensors handle, or a dictionary for .bin."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        return safe_open(path, framework="pt")
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before torch 1.6: not a zip file, cannot be mapped
        pass
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} 中除了张量还有别的内容，出于安全不读取：{str(error).splitlines()[0]}",
            f"{path} holds more than tensors and is not read, for safety: {str(error).splitlines()[0]}",
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConversionError(
            f"{path} 已损坏或不完整：{str(error).splitlines()[0]}；请重新下载",
            f"{path} is damaged or cut off: {str(error).splitlines()[0]}; download it again",
        ) from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file at once; it is on the disk when it has its name."""
    from safetensors.torch import save_file

    with beside(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def write_index(path: Path, file_of: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a checkpoint of several files."""
    write_json(path, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))})
