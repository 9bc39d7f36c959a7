"""Train and dev, split by document: what shares a document, or nearly so, or a question stays on one side."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from finetune.data.duplicates import NearTexts, text_key


class DocumentSplit:
    """Which documents are of the dev side: first every row is added, then the sides are chosen, then asked for.

    Holds a few hundred bytes for each document, not its text.
    """

    def __init__(self) -> None:
        self._texts = NearTexts()
        self._parents: dict[tuple[str, int], tuple[str, int]] = {}
        self._rows: Counter[tuple[str, int]] = Counter()
        self._dev: set[int] = set()
        self._known: dict[int, int | None] = {}

    def add(self, question: str, documents: Sequence[str]) -> None:
        """Take in one row: its question and the texts of the documents that answer it."""
        asked = ("question", text_key(question))
        self._rows[asked] += 1
        for text in documents:
            key = text_key(text)
            known = ("document", key) in self._parents
            self._join(asked, ("document", key))
            if not known:
                for near in self._texts.add(key, text):
                    self._join(("document", key), ("document", near))

    def choose(self, dev_share: float, seed: int) -> None:
        """Give whole groups to dev, in an order that the seed decides, while its rows are at most the share.

        A group too large for what is left of the share goes to train. Where there are two groups, neither side is
        empty, unless the share is 0.
        """
        rows: Counter[tuple[str, int]] = Counter()
        members: dict[tuple[str, int], list[int]] = defaultdict(list)
        for asked, count in self._rows.items():
            rows[self._root(asked)] += count
        for kind, key in self._parents:
            if kind == "document":
                members[self._root((kind, key))].append(key)
        order = sorted(members, key=lambda root: _draw(seed, min(members[root])))
        wanted = dev_share * rows.total()
        taken = 0
        chosen: list[tuple[str, int]] = []
        for root in order:
            if taken + rows[root] <= wanted:
                chosen.append(root)
                taken += rows[root]
        if not chosen and dev_share > 0 and len(order) > 1:
            chosen = [min(order, key=lambda root: (rows[root], order.index(root)))]
        self._dev = {key for root in chosen for key in members[root]}

    def is_dev(self, document: str) -> bool | None:
        """Whether a document, or one near to it, is of the dev side; None for one that answers no row."""
        key = text_key(document)
        if ("document", key) in self._parents:
            return key in self._dev
        near = self._texts.find(document)
        return None if not near else any(other in self._dev for other in near)

    def _join(self, first: tuple[str, int], second: tuple[str, int]) -> None:
        one, other = self._root(first), self._root(second)
        if one != other:
            self._parents[max(one, other)] = min(one, other)

    def _root(self, node: tuple[str, int]) -> tuple[str, int]:
        parents = self._parents
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node


def _draw(seed: int, key: int) -> bytes:
    """A number that looks random and depends on its arguments alone."""
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()


def split_rows(rows: Iterable[tuple[str, Sequence[str]]], *, dev_share: float, seed: int) -> list[bool]:
    """For each (question, documents) whether it is of the dev side; see `DocumentSplit`."""
    kept = list(rows)
    split = DocumentSplit()
    for question, documents in kept:
        split.add(question, documents)
    split.choose(dev_share, seed)
    return [bool(split.is_dev(documents[0])) for _, documents in kept]
