"""From generated ids to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # what part of a character decodes to


@dataclass
class PieceDecoder:
    """Ids in, text out as soon as it is certain; no piece ends inside a character.

    As tokenizers' `DecodeStream`, which raises "Invalid prefix" on bytes that never become a character (0.23; on one
    answer in fourteen of a model with random weights).
    """

    tokenizer: Tokenizer
    _ids: list[int] = field(default_factory=list)
    _before: int = 0
    """of the ids, those whose text was given; kept because a decoder treats the first id of a text differently"""

    def take(self, number: int) -> str:
        """The text that is certain after this id."""
        self._ids.append(number)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._ids, self._before = self._ids[self._before :], len(self._ids) - self._before
        return text

    def rest(self) -> str:
        """What is left when the answer is over: a character that was never completed."""
        text, self._ids, self._before = self._new_text(), [], 0
        return text

    def _new_text(self) -> str:
        given = self.tokenizer.decode(self._ids[: self._before])
        return str(self.tokenizer.decode(self._ids)[len(given) :])


@dataclass
class StopFilter:
    """Text in, text out, up to the first of some stop texts; what may be the beginning of one is held back."""

    stops: Sequence[str]
    stopped: bool = False
    _held: str = ""

    def take(self, piece: str) -> str:
        """What can be given on after this piece."""
        if self.stopped or not self.stops:
            return "" if self.stopped else piece
        text = self._held + piece
        places = [place for stop in self.stops if stop and (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when the answer is over."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
