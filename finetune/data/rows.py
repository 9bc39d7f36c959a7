"""Training rows: what a row must be, reading them with every bad one named, writing them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from finetune.data.jsonl import BadRecordError, Problem, read_records, write_records
from loaders.errors import RagProjError

MAX_TEXT_CHARS = 100_000  # of one query or passage: several times what the longest BGE model reads (8,192 tokens)
_SHOWN = 20  # bad rows named in a message
_SHOWN_CHARS = 40  # of a bad value


@dataclass(frozen=True)
class RetrievalRow:
    """A query, the passages that answer it and some that do not, as FlagEmbedding trains on them."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...] = ()
    pos_scores: tuple[float, ...] | None = None
    """of a reranker, one for each positive: the teacher of distillation"""
    neg_scores: tuple[float, ...] | None = None
    prompt: str | None = None
    """the instruction before this query, where it is not the model's own"""
    pos_docs: tuple[str, ...] | None = None
    """ids of the documents that the positives are from, one for each; FlagEmbedding ignores them"""
    neg_docs: tuple[str, ...] | None = None
    file: str = ""
    line: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in a file: query, pos and neg always, the others where they are given."""
        record: dict[str, Any] = {"query": self.query, "pos": list(self.pos), "neg": list(self.neg)}
        for key in ("pos_scores", "neg_scores", "pos_docs", "neg_docs"):
            if getattr(self, key) is not None:
                record[key] = list(getattr(self, key))
        return record if self.prompt is None else {**record, "prompt": self.prompt}


@dataclass(frozen=True)
class GenerationRow:
    """A question, the references it is to be answered from, and the answer."""

    question: str
    references: tuple[str, ...]
    answer: str
    refuse: bool = False
    """the references do not answer it, and the answer says so"""
    history: tuple[tuple[str, str], ...] = ()
    """questions and answers before it, oldest first"""
    standalone: str | None = None
    """the question as it reads without the history, which it is searched with; None: as it stands"""
    file: str = ""
    line: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in a file; `refuse`, `history` and `standalone` only where they are given."""
        record: dict[str, Any] = {
            "question": self.question,
            "references": list(self.references),
            "answer": self.answer,
        }
        if self.refuse:
            record["refuse"] = True
        if self.history:
            record["history"] = [list(turn) for turn in self.history]
        return record if self.standalone is None else {**record, "standalone": self.standalone}


Row = TypeVar("Row", RetrievalRow, GenerationRow)


class RowsError(RagProjError):
    """Rows that cannot be trained on; the first of them by file and line, and how many there are."""

    def __init__(self, problems: Sequence[Problem], total: int) -> None:
        more = total - len(problems)
        zh = "；".join(f"{problem.file}:{problem.line}：{problem.zh}" for problem in problems)
        en = "; ".join(f"{problem.file}:{problem.line}: {problem.en}" for problem in problems)
        super().__init__(
            f"{total} 行训练数据无法使用，请改正或删除：{zh}" + (f"；另有 {more} 行" if more else ""),
            f"{total} training rows cannot be used; mend or remove them: {en}" + (f"; and {more} more" if more else ""),
        )
        self.problems = tuple(problems)
        self.total = total


def read_retrieval_rows(paths: Sequence[Path], *, max_text_chars: int = MAX_TEXT_CHARS) -> list[RetrievalRow]:
    """The retrieval rows of JSONL files (or JSON arrays), in order; a text that many rows share is kept once.

    Args:
        paths: files of `{"query": str, "pos": [str], "neg": [str], ...}`; other keys are ignored.
        max_text_chars: a longer query or passage is a bad row, in characters.

    Raises:
        RowsError: every bad row counts, the first twenty are named.
        RagProjError: a file cannot be read or holds no row.
    """
    return _read(paths, _retrieval_row, max_text_chars)


def read_generation_rows(paths: Sequence[Path], *, max_text_chars: int = MAX_TEXT_CHARS) -> list[GenerationRow]:
    """The generation rows of JSONL files (or JSON arrays), in order.

    Args:
        paths: files of `{"question": str, "references": [str], "answer": str, "refuse"?: bool,
            "history"?: [[str, str]], "standalone"?: str}`; of `"answers": [str]` in place of `answer` the first counts.
        max_text_chars: a longer question, reference or answer is a bad row, in characters.

    Raises:
        RowsError: every bad row counts, the first twenty are named.
        RagProjError: a file cannot be read or holds no row.
    """
    return _read(paths, _generation_row, max_text_chars)


def write_rows(path: Path, rows: Iterable[RetrievalRow | GenerationRow]) -> int:
    """How many rows were written; the file takes its place when all of them are."""
    return write_records(path, (row.as_dict() for row in rows))


def same_text(text: str) -> str:
    """What two texts share that differ in white space alone."""
    return "".join(text.split())


@dataclass
class _Texts:
    """Checks the texts of records; equal ones become one string."""

    max_chars: int
    known: dict[str, str] = field(default_factory=dict)

    def one(self, record: Mapping[str, Any], key: str) -> str:
        """The text under a key."""
        return self._text(_required(record, key), key)

    def many(self, record: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
        """The texts in the list under a key."""
        values = _required(record, key)
        if not isinstance(values, list) or not (values or may_be_empty):
            kind = ("", "") if may_be_empty else ("非空的", "non-empty ")
            raise BadRecordError(
                f'"{key}" 应为{kind[0]}文本列表，实际是 {_shown(values)}',
                f'"{key}" must be a {kind[1]}list of texts, got {_shown(values)}',
            )
        return tuple([self._text(value, key, number) for number, value in enumerate(values)])

    def _text(self, value: object, key: str, number: int | None = None) -> str:
        if not isinstance(value, str) or not value or value.isspace():
            name = _name(key, number)
            raise BadRecordError(
                f"{name} 应为非空的文本，实际是 {_shown(value)}",
                f"{name} must be a non-empty text, got {_shown(value)}",
            )
        if len(value) > self.max_chars:
            name = _name(key, number)
            raise BadRecordError(
                f"{name} 有 {len(value)} 个字符，最多 {self.max_chars} 个；请先切分",
                f"{name} has {len(value)} characters, {self.max_chars} at most; split it first",
            )
        return self.known.setdefault(value, value)


_Build = Callable[[dict[str, Any], _Texts, str, int], Row]


def _read(paths: Sequence[Path], build: _Build[Row], max_text_chars: int) -> list[Row]:
    rows: list[Row] = []
    problems: list[Problem] = []
    total = 0
    texts = _Texts(max_text_chars)
    for path in paths:
        found = 0
        for row in _rows_of(path, build, texts):
            found += 1
            if not isinstance(row, Problem):
                rows.append(row)
                continue
            total += 1
            problems += [row] if total <= _SHOWN else []
        if not found:
            raise RagProjError(f"训练数据 {path} 里没有一行数据", f"training file {path} has no row")
    if total:
        raise RowsError(problems, total)
    return rows


def _rows_of(path: Path, build: _Build[Row], texts: _Texts) -> Iterator[Row | Problem]:
    for line, record in read_records(path):
        if isinstance(record, Problem):
            yield record
            continue
        try:
            yield build(record, texts, str(path), line)
        except BadRecordError as error:
            yield error.at(path, line)


def _retrieval_row(record: dict[str, Any], texts: _Texts, file: str, line: int) -> RetrievalRow:
    query = texts.one(record, "query")
    pos, neg = texts.many(record, "pos"), texts.many(record, "neg", may_be_empty=True)
    positives = {same_text(text) for text in pos} if neg else set()
    for number, text in enumerate(neg):
        if same_text(text) in positives:
            raise BadRecordError(
                f'"neg"[{number}] 与一个正例相同：{_shown(text)}', f'"neg"[{number}] equals a positive: {_shown(text)}'
            )
    prompt = record.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise BadRecordError(
            f'"prompt" 应为文本，实际是 {_shown(prompt)}', f'"prompt" must be a text, got {_shown(prompt)}'
        )
    pos_scores, neg_scores = _scores(record, "pos", pos), _scores(record, "neg", neg)
    if (pos_scores is None) != (neg_scores is None):
        raise BadRecordError(
            '"pos_scores" 和 "neg_scores" 只有一个，应同时给出', 'of "pos_scores" and "neg_scores" only one is there'
        )
    return RetrievalRow(
        query=query,
        pos=pos,
        neg=neg,
        pos_scores=pos_scores,
        neg_scores=neg_scores,
        prompt=prompt,
        pos_docs=_documents(record, "pos", pos),
        neg_docs=_documents(record, "neg", neg),
        file=file,
        line=line,
    )


def _generation_row(record: dict[str, Any], texts: _Texts, file: str, line: int) -> GenerationRow:
    refuse = record.get("refuse")
    if refuse is not None and not isinstance(refuse, bool):
        raise BadRecordError(
            f'"refuse" 应为 true 或 false，实际是 {_shown(refuse)}',
            f'"refuse" must be true or false, got {_shown(refuse)}',
        )
    question = texts.one(record, "question")
    # benchmarks list several answers: the first is the one to learn
    several = "answer" not in record and "answers" in record
    answer = texts.many(record, "answers")[0] if several else texts.one(record, "answer")
    references = texts.many(record, "references", may_be_empty=bool(refuse))
    return GenerationRow(
        question=question,
        references=references,
        answer=answer,
        refuse=bool(refuse),
        history=_history(record),
        standalone=texts.one(record, "standalone") if record.get("standalone") is not None else None,
        file=file,
        line=line,
    )


def _history(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    turns = record.get("history") or []
    if not isinstance(turns, list):
        turns = [turns]
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRecordError(
                f'"history" 应为 [问题, 回答] 的列表，其中有 {_shown(turn)}',
                f'"history" must be a list of [question, answer], one is {_shown(turn)}',
            )
    return tuple((question, answer) for question, answer in turns)


def _scores(record: Mapping[str, Any], key: str, passages: Sequence[str]) -> tuple[float, ...] | None:
    values = _beside(record, f"{key}_scores", passages)
    if values is None:
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRecordError(
                f'"{key}_scores" 应为数字列表，其中有 {_shown(value)}',
                f'"{key}_scores" must be a list of numbers, one is {_shown(value)}',
            )
    return tuple(float(value) for value in values)


def _documents(record: Mapping[str, Any], key: str, passages: Sequence[str]) -> tuple[str, ...] | None:
    values = _beside(record, f"{key}_docs", passages)
    if values is None:
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadRecordError(
                f'"{key}_docs" 应为文档编号列表，其中有 {_shown(value)}',
                f'"{key}_docs" must be a list of document ids, one is {_shown(value)}',
            )
    return tuple(str(value) for value in values)


def _beside(record: Mapping[str, Any], key: str, passages: Sequence[str]) -> list[Any] | None:
    """The list under a key that says one thing of each passage; None where it is not given."""
    values = record.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != len(passages):
        raise BadRecordError(
            f'"{key}" 应为 {len(passages)} 个值的列表，与段落一一对应，实际是 {_shown(values)}',
            f'"{key}" must be a list of {len(passages)} values, one for each passage, got {_shown(values)}',
        )
    return values


def _required(record: Mapping[str, Any], key: str) -> object:
    if key not in record:
        raise BadRecordError(f'缺少 "{key}"', f'"{key}" is missing')
    return record[key]


def _name(key: str, number: int | None) -> str:
    return f'"{key}"' if number is None else f'"{key}"[{number}]'


def _shown(value: object) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
