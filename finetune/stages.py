"""Results of a run's finished stages, kept so that a run that was broken off need not repeat them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chains.caches import beside


class Stages:
    """One JSON file per stage in the output directory; each knows what it was the result of."""

    def __init__(self, folder: Path) -> None:
        """A record in this folder, which need not exist yet."""
        self.folder = folder

    def load(self, name: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a stage; None where it is missing, damaged, or of something else than `identity`."""
        try:
            saved = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            content: dict[str, Any] = saved["content"]
            return content if saved["identity"] == _plain(identity) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, name: str, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Keep the result of a stage; the file takes its place when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with beside(self.folder / f"{name}.json") as path:
            text = json.dumps({"identity": identity, "content": content}, ensure_ascii=False)
            path.write_text(text, encoding="utf-8")


def _plain(identity: Mapping[str, Any]) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(identity))
