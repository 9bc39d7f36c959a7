"""The one error a user sees: a sentence in Chinese, the same in English."""

from __future__ import annotations


class RagProjError(Exception):
    """Something the user can act on.

    `str(error)` is a single line, Chinese first, English beside it; `.zh` and `.en` hold one language each.
    Name the thing, the value, the place and the way out in both.
    """

    def __init__(self, zh: str, en: str) -> None:
        super().__init__(f"{zh} / {en}")
        self.zh = zh
        self.en = en


class UsageError(RagProjError):
    """Something asked for in a way that cannot work; the command exits with 2 instead of 1."""


class ConfigError(UsageError):
    """A config file or override that cannot be used; carries every problem at once."""


class LoadError(RagProjError):
    """A document that could not be read: missing, encrypted, damaged, empty, too large or of an unknown kind."""
