"""A language that has to be learnt: each concept has one sign in questions and another in passages."""

from __future__ import annotations

import json
import random
from pathlib import Path

from finetune.data.rows import RetrievalRow, write_rows

CONCEPTS = 12
_ASKED, _TOLD = 0x4E00, 0x4E00 + 7 * 500  # Han characters of the small vocabulary, every seventh
_FILLERS = ("知识库", "备份", "模型", "检索", "文档", "问题", "答案", "向量")


def concept_rows(count: int, *, seed: int, shuffled: bool = False, dialect: int = 0) -> list[RetrievalRow]:
    """Rows whose query and positive name the same concept.

    Args:
        count: of rows.
        seed: of their texts.
        shuffled: the positives belong to other queries.
        dialect: another one has other signs for the same concepts.
    """
    draw = random.Random(seed)
    concepts = [number % CONCEPTS for number in range(count)]
    answers = concepts if not shuffled else draw.sample(concepts, count)
    rows = []
    first = CONCEPTS * dialect
    for asked, told in zip(concepts, answers, strict=True):
        others = draw.sample([concept for concept in range(CONCEPTS) if concept != told], 2)
        rows.append(
            RetrievalRow(
                query=f"{chr(_ASKED + 7 * (first + asked))}{draw.choice(_FILLERS)}{draw.choice(_FILLERS)}？",
                pos=(_passage(first + told, draw),),
                neg=tuple(_passage(first + other, draw) for other in others),
                pos_docs=(f"concept {told}",),  # not a negative of another row that asks for it
                neg_docs=tuple(f"concept {other}" for other in others),
            )
        )
    return rows


def write_concepts(folder: Path, *, shuffled: bool = False, dialect: int = 0) -> dict[str, Path]:
    """Training and dev rows as files, none of dev's texts among the training ones."""
    dev = concept_rows(150, seed=1, dialect=dialect)
    texts = {row.query for row in dev} | {text for row in dev for text in row.pos}
    train = [
        row
        for row in concept_rows(500, seed=2, shuffled=shuffled, dialect=dialect)
        if row.query not in texts and row.pos[0] not in texts
    ]
    files = {"train": folder / "train.jsonl", "dev": folder / "dev.jsonl"}
    write_rows(files["train"], train)
    write_rows(files["dev"], dev)
    return files


def write_training_yaml(folder: Path, base: Path, files: dict[str, Path], **settings: object) -> Path:
    """A config of a short run over these files, the same on every processor; `settings` are further top-level keys."""
    content = {
        "model": str(base),
        "output": str(folder / "run"),
        "train": [str(files["train"])],
        "max_steps": 30,
        "batch_size": 32,
        "group_size": 2,
        "learning_rate": 2e-3,
        "temperature": 0.05,
        "precision": "fp32",
        "dropout": 0.0,
        "query_max_tokens": 16,
        "passage_max_tokens": 16,
        "query_instruction": "",
        "evaluation": {"dev": {"rows": [str(files["dev"])]}, "every_steps": 15, "fused": False},
        **settings,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


def _passage(concept: int, draw: random.Random) -> str:
    return f"{chr(_TOLD + 7 * concept)}{''.join(draw.sample(_FILLERS, 3))}。"
