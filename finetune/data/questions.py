"""Questions whose passages are known, as training rows: a user's own labels, or a benchmark's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from langchain_core.documents import Document
from pydantic import Field, ValidationError

from chains.evaluation import Question, RecordId
from finetune.data.duplicates import text_key
from finetune.data.jsonl import BadRecordError, Problem, read_records, write_records
from finetune.data.outputs import staged, write_report
from finetune.data.rows import RetrievalRow, RowsError, write_rows
from finetune.data.split import split_rows
from loaders.config import Config
from loaders.errors import RagProjError
from loaders.splitters import embedding_text

OUTPUTS = ("retrieval_train.jsonl", "retrieval_dev.jsonl", "dev_questions.jsonl")
_SHOWN = 20  # bad rows named in a message

_T = TypeVar("_T")


class QuestionRowsConfig(Config):
    """How questions are split."""

    seed: int = Field(default=0, description="of the split")
    dev_share: float = Field(default=0.2, ge=0, le=0.5, description="of the rows, given to dev by whole passages")


class LabelledQuestion(Question):
    """A question that also names passages that do not answer it."""

    neg_ids: list[RecordId] = Field(default_factory=list)


@dataclass(frozen=True)
class Passage:
    """A passage as it is embedded: its title in front, as for a chunk of a knowledge base."""

    id: str
    text: str
    document: str
    """`source` of the record where it has one, else its id"""


def read_passages(paths: Sequence[Path]) -> dict[str, Passage]:
    """The passages of JSONL files of `{"id", "title", "text"}` by id, in order.

    Raises:
        RowsError: lists records without an id or a text, and ids that stand for two different texts.
    """
    passages: dict[str, Passage] = {}
    problems: list[Problem] = []
    for path in paths:
        for line, record in read_records(path):
            try:
                passage = _passage(record)
                known = passages.setdefault(passage.id, passage)
                if known.text != passage.text:
                    raise BadRecordError(
                        f'"id" {passage.id} 已经用于另一段文本', f'"id" {passage.id} stands for another text already'
                    )
            except BadRecordError as error:
                problems.append(error.at(path, line))
    if problems:
        raise RowsError(problems[:_SHOWN], len(problems))
    return passages


def rows_from_questions(
    questions: Path, passages: Mapping[str, Passage]
) -> tuple[list[RetrievalRow], list[dict[str, Any]]]:
    """(one row for each question that names a passage, the question's own record beside it), in order.

    Positives are the passages that the question names (`context_id`, `pos_ids`), negatives those of `neg_ids`, but for
    texts that equal a positive. Equal questions over the same passages are one row; blank ones, and those that name no
    passage, are left out, as by `evaluate`.

    Raises:
        RowsError: lists records that are no questions, and ids that no passage has.
        RagProjError: no question names a passage.
    """
    rows: dict[tuple[str, tuple[str, ...]], RetrievalRow] = {}
    records: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for line, record in read_records(questions):
        try:
            row = _row(record, passages, str(questions), line)
        except BadRecordError as error:
            problems.append(error.at(questions, line))
            continue
        if row is not None and (row.query, row.pos) not in rows and isinstance(record, dict):
            rows[row.query, row.pos] = row
            records.append(record)
    if problems:
        raise RowsError(problems[:_SHOWN], len(problems))
    if not rows:
        raise RagProjError(
            f"{questions} 中没有一个问题注明出处（context_id 或 pos_ids）",
            f"no question of {questions} names its passage (context_id or pos_ids)",
        )
    return list(rows.values()), records


def convert_questions(
    questions: Path,
    passages: Sequence[Path],
    out: Path,
    config: QuestionRowsConfig | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The report of a conversion; `OUTPUTS` and then `report.json` are in `out`.

    The dev questions are for `ragproj evaluate` over all passages, the rows of both sides for training. No passage, nor
    one near to it, answers on both sides.

    Raises:
        UsageError: `out` holds results already, and `overwrite` is not set.
        RagProjError: a file cannot be read or written, or rows are bad.
    """
    config = config or QuestionRowsConfig()
    pool = read_passages(passages)
    rows, records = rows_from_questions(questions, pool)
    is_dev = split_rows([(row.query, row.pos) for row in rows], dev_share=config.dev_share, seed=config.seed)
    report: dict[str, Any] = {
        "rows": {"train": len(rows) - sum(is_dev), "dev": sum(is_dev)},
        "passages": len(pool),
        "config": config.model_dump(mode="json", by_alias=True),
    }
    with staged(out, OUTPUTS, overwrite=overwrite) as folder:
        for name, dev in (("retrieval_train.jsonl", False), ("retrieval_dev.jsonl", True)):
            write_rows(folder / name, _of_side(rows, is_dev, dev=dev))
        write_records(folder / "dev_questions.jsonl", _of_side(records, is_dev, dev=True))
        write_report(folder, report)
    return report


def _of_side(items: Sequence[_T], is_dev: Sequence[bool], *, dev: bool) -> Iterator[_T]:
    return (item for item, here in zip(items, is_dev, strict=True) if here == dev)


def _passage(record: Mapping[str, Any] | Problem) -> Passage:
    if isinstance(record, Problem):
        raise BadRecordError(record.zh, record.en)
    identifier, text, title = record.get("id"), record.get("text"), record.get("title") or ""
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise BadRecordError('"id" 应为文本或整数', '"id" must be a text or a number')
    if not isinstance(text, str) or not text.strip() or not isinstance(title, str):
        raise BadRecordError('"text" 应为非空的文本', '"text" must be a non-empty text')
    embedded = embedding_text(Document(text, metadata={"title": title})) if title else text
    return Passage(str(identifier), embedded, str(record.get("source") or identifier))


def _row(
    record: Mapping[str, Any] | Problem, passages: Mapping[str, Passage], file: str, line: int
) -> RetrievalRow | None:
    """The row of a question; None where it is blank or names no passage."""
    if isinstance(record, Problem):
        raise BadRecordError(record.zh, record.en)
    try:
        question = LabelledQuestion.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadRecordError(f'"{name}" 无效：{first["msg"]}', f'"{name}": {first["msg"]}') from None
    if not question.gold or not question.question.strip():
        return None
    missing = [name for name in (*question.gold, *question.neg_ids) if name not in passages]
    if missing:
        raise BadRecordError(f"段落文件中没有 {missing[0]}", f"no passage file has {missing[0]}")
    positives = _distinct(passages[name] for name in question.gold)
    gold = {text_key(passage.text) for passage in positives}
    negatives = [
        one for one in _distinct(passages[name] for name in question.neg_ids) if text_key(one.text) not in gold
    ]
    return RetrievalRow(
        query=question.question,
        pos=tuple(one.text for one in positives),
        neg=tuple(one.text for one in negatives),
        pos_docs=tuple(one.document for one in positives),
        neg_docs=tuple(one.document for one in negatives),
        file=file,
        line=line,
    )


def _distinct(passages: Iterator[Passage]) -> list[Passage]:
    return list({passage.text: passage for passage in passages}.values())
