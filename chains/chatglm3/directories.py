"""Names of models in a config, as native directories: downloaded or converted into a cache on first use."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

from chains.chat_models import http_errors
from chains.chatglm3.adapters import ADAPTER_CONFIG, convert_adapter, is_original_adapter
from chains.chatglm3.checkpoints import read_json, shard_names
from chains.chatglm3.convert import MANIFEST, convert_chatglm3
from chains.chatglm3.settings import ConversionError, is_original
from chains.lora import resolve_adapter

logger = logging.getLogger(__name__)

_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
# never *.py: no code comes from a model
_DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "MODEL_LICENSE*"]


def cache_folder() -> Path:
    """Where converted models are kept: RAGPROJ_CACHE, else the user's cache folder."""
    if folder := os.environ.get("RAGPROJ_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ragproj"


def native_directory(name: str) -> Path:
    """The native model directory a config's `model` means: that directory, or what it was converted to in the cache.

    Args:
        name: a directory, native or in ChatGLM3's original layout, or a model id such as THUDM/chatglm3-6b, which is
            downloaded when it is not there yet.

    Raises:
        ConversionError: neither, or it cannot be downloaded or converted.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        directory = _download(name)
    if not is_original(read_json(directory / "config.json")):
        return directory
    target = _cached(directory)
    if not (target / MANIFEST).is_file():
        logger.warning("converting %s into %s, once", directory, target)
    with tqdm(desc="convert", unit="shard", file=sys.stderr, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return convert_chatglm3(directory, target, progress=progress).target


def native_adapter(name: str, base: Path) -> Path:
    """The adapter directory a config's `adapter` means; one of the original ChatGLM3 is converted into the cache.

    Raises:
        ModelDirectoryError: it is no directory with an adapter.
        ConversionError: it cannot be converted.
    """
    directory = resolve_adapter(name)
    if not is_original_adapter(read_json(directory / ADAPTER_CONFIG)):
        return directory
    target = _cached(directory)
    if not (target / MANIFEST).is_file():
        logger.warning("converting the adapter %s into %s, once", directory, target)
        convert_adapter(directory, target, base=base)
    return target


def _cached(directory: Path) -> Path:
    """Folder of a directory's conversion: its name, made distinct by its place and the state of its files."""
    resolved = directory.resolve()
    state = [str(resolved)] + [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in sorted(resolved.iterdir())
        if file.suffix in {".safetensors", ".bin", ".model"}
    ]
    digest = hashlib.sha256("\n".join(state).encode()).hexdigest()[:12]
    return cache_folder() / f"{resolved.name}-{digest}"


def _download(name: str) -> Path:
    if not _MODEL_ID.fullmatch(name):
        raise ConversionError(
            f"找不到模型目录 {name}；请给出目录，或形如 THUDM/chatglm3-6b 的模型名",
            f"there is no model directory {name}; give one, or a model id such as THUDM/chatglm3-6b",
        )
    from huggingface_hub.errors import HfHubHTTPError

    errors: tuple[type[Exception], ...] = (HfHubHTTPError, OSError, ValueError, *http_errors())
    try:
        return _downloaded_before(name) or _fetched(name)
    except errors as error:
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"没有目录 {name}，也无法下载这个名字的模型：{reason}；请检查路径或网络，或先下载好再给出目录",
            f"there is no directory {name}, and no model of that name can be downloaded: {reason}; check the path or"
            " the network, or give a directory downloaded before",
        ) from error


def _downloaded_before(name: str) -> Path | None:
    """Where a model id was downloaded to; None where it never was, or not to the end."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        here = Path(snapshot_download(name, allow_patterns=[*_DOWNLOADED, "*.bin"], local_files_only=True))
        shard_names(here)
    except (LocalEntryNotFoundError, ConversionError):
        return None
    return here


def _fetched(name: str) -> Path:
    """Where a model id is downloaded to now; of two kinds of weights, the one without pickle."""
    from huggingface_hub import HfApi, snapshot_download

    logger.warning("downloading %s", name)
    # not list_repo_files: without a network it tries again for half a minute
    files = [file.rfilename for file in HfApi().model_info(name).siblings or ()]
    weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
    return Path(snapshot_download(name, allow_patterns=[*_DOWNLOADED, weights]))
