"""What is made of a model for an engine: computed once, kept beside the model, safe to delete at any time."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from chains.bge.directory import ModelDirectory

logger = logging.getLogger(__name__)

_FOLDER = ".ragproj"


def exported(directory: ModelDirectory, name: str, made_of: tuple[object, ...], write: Callable[[Path], None]) -> Path:
    """The file of a graph, written now where no earlier run left it; its numbers stand beside it, suffix `.bin`.

    Args:
        directory: of the model.
        name: of the file, with its suffix; a key is put before that.
        made_of: whatever the graph depends on; other values are another file.
        write: writes the graph to a path and the numbers beside it; both keep their names.
    """
    key = hashlib.sha256(repr((directory.pooling, directory.normalize, *made_of)).encode()).hexdigest()[:16]
    plain = Path(name)
    graph = cache_directory(directory) / f"{plain.stem}-{key}{plain.suffix}"
    if not graph.is_file():
        logger.info("exporting %s to %s", directory.path, graph)
        with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
            temporary = Path(folder) / graph.name
            write(temporary)
            # the graph, moved last, makes both valid
            for file in (temporary.with_suffix(".bin"), temporary):
                file.replace(graph.parent / file.name)
    return graph


def cache_directory(directory: ModelDirectory) -> Path:
    """Where what is derived from a model is kept: beside it, or in the user's cache where that cannot be written."""
    beside = directory.path / _FOLDER
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (beside, home / "ragproj" / directory.path.name):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            logger.info("%s cannot be written", folder)
    return Path(tempfile.mkdtemp(prefix="ragproj-"))
