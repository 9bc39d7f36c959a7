"""Everything that is measured of one model at one time, and how it is kept until the run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.embeddings import Embeddings

from finetune.evaluation import FusedScores, RetrievalSet, Scores, embed_set, evaluate_fused, score_vectors
from finetune.gate import DEV


@dataclass(frozen=True)
class Measured:
    """A model's scores on all sets, on dev also together with lexical search and by prefixes, where asked for."""

    sets: Mapping[str, Scores]
    fused: FusedScores | None = None
    prefixes: Mapping[int, Scores] = field(default_factory=dict)
    """of dev, by how many numbers of each vector were compared"""

    def values(self, metric: str) -> dict[str, tuple[float, ...]]:
        """One metric per question, by set: what the gate decides on."""
        return {name: scores.by_metric[metric] for name, scores in self.sets.items()}

    def on_dev(self, numbers: Sequence[int]) -> Measured:
        """The same, of dev only some of the questions."""
        fused = None
        if self.fused is not None:
            fused = FusedScores(self.fused.lexical.part(numbers), self.fused.fused.part(numbers))
        prefixes = {length: scores.part(numbers) for length, scores in self.prefixes.items()}
        return Measured({**self.sets, DEV: self.sets[DEV].part(numbers)}, fused, prefixes)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, of which `from_dict` makes the same again."""
        fused = None
        if self.fused is not None:
            fused = {"lexical": _plain(self.fused.lexical), "fused": _plain(self.fused.fused)}
        return {
            "sets": {name: _plain(scores) for name, scores in self.sets.items()},
            "fused": fused,
            "prefixes": {str(length): _plain(scores) for length, scores in self.prefixes.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Measured:
        """From `as_dict`."""
        fused = content["fused"]
        return cls(
            {name: _scores(scores) for name, scores in content["sets"].items()},
            None if fused is None else FusedScores(_scores(fused["lexical"]), _scores(fused["fused"])),
            # stages of runs that were broken off before this was measured have none
            {int(length): _scores(scores) for length, scores in content.get("prefixes", {}).items()},
        )


def measure(
    embeddings: Embeddings, sets: Mapping[str, RetrievalSet], *, fused: bool, prefixes: Sequence[int] = ()
) -> Measured:
    """An embedder's scores on every set.

    Args:
        embeddings: what is measured.
        sets: by name.
        fused: measure the set `dev` through the hybrid retriever, too.
        prefixes: lengths of vector prefixes by which dev is searched, too.
    """
    scores: dict[str, Scores] = {}
    by_prefix: dict[int, Scores] = {}
    together = None
    for name, questions in sets.items():
        vectors = embed_set(embeddings, questions)
        scores[name] = score_vectors(vectors, questions)
        if name == DEV:
            by_prefix = {length: score_vectors(vectors.prefix(length), questions) for length in prefixes}
            together = evaluate_fused(vectors, questions) if fused else None
    return Measured(scores, together, by_prefix)


def set_digest(questions: RetrievalSet) -> str:
    """A hash of a set's questions, passages and which belong together, 16 hex digits."""
    passages = [(passage.id, passage.title, passage.text) for passage in questions.passages]
    content = json.dumps([questions.questions, questions.gold, passages], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _plain(scores: Scores) -> dict[str, Any]:
    return {"by_metric": {name: list(values) for name, values in scores.by_metric.items()}, "passages": scores.passages}


def _scores(content: Mapping[str, Any]) -> Scores:
    return Scores({name: tuple(values) for name, values in content["by_metric"].items()}, content["passages"])
