"""Multi-Doc-QA-Chinese and files of its shape: questions over one reference document among many, as training rows."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from chains.config import EmbeddingsConfig, LexicalEmbeddingsConfig
from chains.embeddings import fingerprint, max_tokens, token_counter
from chains.retrieval_qa import build_embeddings
from finetune.data.duplicates import document_id, is_near, text_key
from finetune.data.jsonl import BadRecordError, Problem, json_line, read_records
from finetune.data.lengths import Lengths
from finetune.data.outputs import staged, write_report
from finetune.data.rows import MAX_TEXT_CHARS, GenerationRow, RetrievalRow, same_text
from finetune.data.shuffling import ShuffledRecords
from finetune.data.split import DocumentSplit
from loaders.config import Config
from loaders.errors import RagProjError, UsageError
from loaders.text import normalise

OUTPUTS = (
    "retrieval_train.jsonl",
    "retrieval_dev.jsonl",
    "generation_train.jsonl",
    "generation_dev.jsonl",
    "dev_questions.jsonl",
    "dev_passages.jsonl",
)
_SHOWN = 20  # bad lines, and suspected negatives, named in the report
_SHOWN_CHARS = 80
_BERT_TOKENS = 512  # what an embedder reads that does not say
_TITLE_CHARS = 80  # a longer first line is no title
_TELLING_ANSWER = 10  # characters: a negative that holds a shorter answer may hold it by chance

Progress = Callable[[int, str], None]


class MultiDocQAConfig(Config):
    """How rows are made of the records."""

    seed: int = Field(default=0, description="of the split, the sampling and the order of rows")
    dev_share: float = Field(default=0.05, ge=0, le=0.5, description="of the rows, given to dev by whole documents")
    negatives: int = Field(default=8, ge=0, le=99, description="sampled for a retrieval row, at most")
    references: int = Field(
        default=5, ge=1, le=100, description="of a generation row, the one that answers among them, at most"
    )
    drop_suspects: bool = Field(
        default=True, description="leave out negatives that nearly equal a positive or hold the answer"
    )
    max_tokens: int | None = Field(
        default=None, ge=8, description="texts with more count as truncated; null: as the embedder says, else 512"
    )
    embeddings: EmbeddingsConfig = Field(
        default_factory=LexicalEmbeddingsConfig, description="whose tokenizer counts; the default one estimates"
    )


@dataclass(frozen=True)
class Document:
    """A document of a record; `text` begins with the title where there is one."""

    title: str
    text: str

    @cached_property
    def id(self) -> str:
        """An id that equal texts share."""
        return document_id(self.text)

    @property
    def body(self) -> str:
        """The text without its title."""
        return self.text.removeprefix(self.title).lstrip("\n") or self.text


@dataclass(frozen=True)
class Sample:
    """One question of a record; the negatives are as they stand there, not looked at yet."""

    question: str
    answer: str
    positives: tuple[Document, ...]
    negatives: Sequence[object]
    place: tuple[str, int]


@dataclass
class _Counts:
    """What the report says of the input."""

    files: dict[str, Counter[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0
    suspects: Counter[str] = field(default_factory=Counter)
    suspected: list[dict[str, Any]] = field(default_factory=list)
    other_side: int = 0
    without_negatives: int = 0


def convert(
    raw: Sequence[Path],
    out: Path,
    config: MultiDocQAConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, stage: None,
) -> dict[str, Any]:
    """The report of a conversion; `OUTPUTS` and then `report.json` are in `out`.

    The files are read twice, record by record: once to split by document, once to write. Memory grows by some hundred
    bytes for each reference document, not with the texts. The same files and seed give the same bytes.

    Args:
        raw: files of JSON lines or JSON arrays, and folders of them.
        out: folder, made where it is missing.
        config: how rows are made.
        overwrite: replace what a conversion left in `out`.
        progress: told the records read so far and the stage.

    Raises:
        UsageError: there is no such file, or `out` holds results already.
        RagProjError: no record can be used, or a file cannot be read or written.
    """
    config = config or MultiDocQAConfig()
    files = find_json_files(raw)
    with staged(out, OUTPUTS, overwrite=overwrite) as folder:
        split = DocumentSplit()
        for done, sample in enumerate(_samples(files, _Counts()), 1):
            split.add(sample.question, [document.text for document in sample.positives])
            progress(done, "split")
        split.choose(config.dev_share, config.seed)
        size = sum(path.stat().st_size for path in files)
        converter = _Converter(config, split)
        with (
            ShuffledRecords(folder / "train", seed=config.seed, expected_bytes=size) as train,
            ShuffledRecords(folder / "dev", seed=config.seed, expected_bytes=int(size * config.dev_share)) as dev,
        ):
            for done, sample in enumerate(_samples(files, converter.counts), 1):
                record, is_dev = converter.rows(sample)
                (dev if is_dev else train).add(record)
                progress(done, "write")
            if not len(train) + len(dev):
                raise _nothing(files, converter.counts)
            rows = {"train": len(train), "dev": len(dev)}
            _write_side(folder, "train", train.read())
            passages = _write_side(folder, "dev", dev.read())
        report = converter.report(rows, passages)
        write_report(folder, report)
    return report


def find_json_files(paths: Sequence[Path]) -> list[Path]:
    """The .json and .jsonl files among the paths and in the folders among them, each once, in order of name.

    Raises:
        UsageError: a path does not exist, or there is no such file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"找不到 {path}，请检查路径", f"{path} does not exist; check the path")
        inside = sorted(path.rglob("*.json*")) if path.is_dir() else [path]
        found.update(dict.fromkeys(file for file in inside if file == path or file.suffix in {".json", ".jsonl"}))
    if not found:
        listed = ", ".join(map(str, paths))
        raise UsageError(f"{listed} 中没有 .json 或 .jsonl 文件", f"no .json or .jsonl file in {listed}")
    return list(found)


def read_samples(record: Mapping[str, Any], place: tuple[str, int]) -> list[Sample]:
    """The questions of a record; none where it has no question with an answer.

    Raises:
        BadRecordError: no document that answers, or a text that is too long.
    """
    pairs = record.get("QA")
    pairs = [pairs] if isinstance(pairs, dict) else pairs
    asked = [pair for pair in pairs if _is_pair(pair)] if isinstance(pairs, list) else []
    if not asked:
        return []
    positives = _documents(record.get("positive_doc"))
    if not positives:
        raise BadRecordError('"positive_doc" 里没有文本', 'no text in "positive_doc"')
    negatives = record.get("negative_doc")
    samples = [
        Sample(
            question=normalise(pair["question"]),
            answer=normalise(pair["answer"]),
            positives=positives,
            negatives=negatives if isinstance(negatives, list) else [],
            place=place,
        )
        for pair in asked
    ]
    texts = [(f"QA.{key}", getattr(sample, key)) for sample in samples for key in ("question", "answer")]
    for name, text in [*texts, *(("positive_doc", document.text) for document in positives)]:
        if len(text) > MAX_TEXT_CHARS:
            raise BadRecordError(
                f'"{name}" 有 {len(text)} 个字符，最多 {MAX_TEXT_CHARS} 个',
                f'"{name}" has {len(text)} characters, {MAX_TEXT_CHARS} at most',
            )
    return samples


def read_document(value: object) -> Document | None:
    """A document object of either layout, or a plain string; None where it has no text.

    `text` if there is one, else title and content; a first line followed by a blank one is taken as the title.
    """
    if isinstance(value, str):
        return _titled("", normalise(value))
    if not isinstance(value, dict):
        return None
    text, title, content = (
        normalise(part) if isinstance(part := value.get(key), str) else "" for key in ("text", "title", "content")
    )
    if text:
        return _titled(title, text)
    if not content:
        return _titled(title, title)
    return Document(title, content if content.startswith(title) else f"{title}\n\n{content}")


def _titled(title: str, text: str) -> Document | None:
    first, blank, _ = text.partition("\n\n")
    if not (title and text.startswith(title)):
        title = first if blank and "\n" not in first and len(first) <= _TITLE_CHARS else ""
    return Document(title, text) if text else None


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, dict):
        return False
    texts = (pair.get("question"), pair.get("answer"))
    return all(isinstance(text, str) and normalise(text) for text in texts)


def _documents(values: object) -> tuple[Document, ...]:
    """The documents that have a text, equal ones once."""
    listed = values if isinstance(values, list) else [values]
    found = [document for value in listed if (document := read_document(value))]
    return tuple({document.id: document for document in found}.values())


def _samples(files: Iterable[Path], counts: _Counts) -> Iterator[Sample]:
    """Every question of the files once; what is passed over is counted."""
    seen: set[int] = set()
    for path in files:
        here = counts.files.setdefault(str(path), Counter(records=0, rows=0, bad=0, without_qa=0))
        for line, record in read_records(path):
            here["records"] += 1
            try:
                if isinstance(record, Problem):
                    raise BadRecordError(record.zh, record.en)
                samples = read_samples(record, (str(path), line))
            except BadRecordError as error:
                here["bad"] += 1
                counts.problems += [error.at(path, line)] if len(counts.problems) < _SHOWN else []
                continue
            here["without_qa"] += not samples
            for sample in samples:
                key = hash((text_key(sample.question), text_key(sample.positives[0].text)))
                if key in seen:
                    counts.duplicates += 1
                    continue
                seen.add(key)
                here["rows"] += 1
                yield sample


class _Converter:
    """Makes rows of samples and keeps the figures of the report."""

    def __init__(self, config: MultiDocQAConfig, split: DocumentSplit) -> None:
        self._config = config
        self._split = split
        self._made = 0
        self.counts = _Counts()
        embeddings = build_embeddings(config.embeddings)
        self._limit = config.max_tokens or max_tokens(embeddings) or _BERT_TOKENS
        self._counted_by = "estimate" if max_tokens(embeddings) is None else fingerprint(embeddings)
        count = token_counter(embeddings)
        limits = {"question": self._limit, "passage": self._limit, "answer": None, "references": None}
        self._lengths = {name: Lengths(count, limit) for name, limit in limits.items()}

    def rows(self, sample: Sample) -> tuple[dict[str, Any], bool]:
        """(both rows of a question and what the dev files need, whether it is of the dev side)."""
        config = self._config
        draw = random.Random(f"{config.seed}:{self._made}")  # noqa: S311 sampling, not secrets
        self._made += 1
        is_dev = bool(self._split.is_dev(sample.positives[0].text))
        wanted = max(config.negatives, config.references - len(sample.positives))
        negatives = self._negatives(sample, is_dev, wanted, draw)
        retrieval = RetrievalRow(
            query=sample.question,
            pos=tuple(document.text for document in sample.positives),
            neg=tuple(document.text for document in negatives[: config.negatives]),
            pos_docs=tuple(document.id for document in sample.positives),
            neg_docs=tuple(document.id for document in negatives[: config.negatives]),
        )
        references = [*retrieval.pos, *(document.text for document in negatives)][: config.references]
        draw.shuffle(references)
        generation = GenerationRow(sample.question, tuple(references), sample.answer)
        self._measure(retrieval, generation)
        record: dict[str, Any] = {"retrieval": retrieval.as_dict(), "generation": generation.as_dict()}
        if is_dev:
            documents = [*sample.positives, *negatives[: config.negatives]]
            record["passages"] = [{"id": one.id, "title": one.title, "text": one.body} for one in documents]
        return record, is_dev

    def _negatives(self, sample: Sample, is_dev: bool, wanted: int, draw: random.Random) -> list[Document]:
        """Documents sampled without replacement that answer nothing, as far as can be seen, and fit the side."""
        taken = {document.id for document in sample.positives}
        answer = same_text(sample.answer)
        chosen: list[Document] = []
        for place in draw.sample(range(len(sample.negatives)), len(sample.negatives)):
            if len(chosen) == wanted:
                break
            document = read_document(sample.negatives[place])
            if document is None or len(document.text) > MAX_TEXT_CHARS:
                continue
            reason = _suspicion(document, sample.positives, answer)
            if reason:
                self._suspect(reason, document, sample)
            if reason == "equal" or (reason and self._config.drop_suspects) or document.id in taken:
                continue
            side = self._split.is_dev(document.text)
            if side is not None and side != is_dev:
                self.counts.other_side += 1
                continue
            taken.add(document.id)
            chosen.append(document)
        self.counts.without_negatives += not chosen
        return chosen

    def _suspect(self, reason: str, negative: Document, sample: Sample) -> None:
        self.counts.suspects[reason] += 1
        if len(self.counts.suspected) < _SHOWN:
            file, line = sample.place
            self.counts.suspected.append(
                {
                    "file": file,
                    "line": line,
                    "reason": reason,
                    "question": sample.question[:_SHOWN_CHARS],
                    "negative": negative.text[:_SHOWN_CHARS],
                }
            )

    def _measure(self, retrieval: RetrievalRow, generation: GenerationRow) -> None:
        self._lengths["question"].add([retrieval.query])
        self._lengths["passage"].add([*retrieval.pos, *retrieval.neg])
        self._lengths["answer"].add([generation.answer])
        self._lengths["references"].add(["\n".join(generation.references)])

    def report(self, rows: Mapping[str, int], passages: int) -> dict[str, Any]:
        """What was made of what, as it stands in `report.json`."""
        counts = self.counts
        return {
            "rows": dict(rows),
            "dev_passages": passages,
            "files": {name: dict(here) for name, here in counts.files.items()},
            "bad_records": {
                "count": sum(here["bad"] for here in counts.files.values()),
                "first": [str(problem) for problem in counts.problems],
            },
            "duplicates": counts.duplicates,
            "suspected_false_negatives": {
                "count": counts.suspects.total(),
                **{reason: counts.suspects[reason] for reason in ("equal", "near", "answer")},
                "dropped": self._config.drop_suspects,
                "first": counts.suspected,
            },
            "negatives_of_the_other_side": counts.other_side,
            "rows_without_negatives": counts.without_negatives,
            "tokens": {
                "counted_by": self._counted_by,
                "limit": self._limit,
                **{name: lengths.summary() for name, lengths in self._lengths.items()},
            },
            "config": self._config.model_dump(mode="json", by_alias=True),
        }


def _suspicion(negative: Document, positives: Sequence[Document], answer: str) -> str | None:
    """Why a negative may answer after all: equal to a positive, near to one, or it holds the answer word for word."""
    if any(negative.id == positive.id for positive in positives):
        return "equal"
    if any(is_near(negative.text, positive.text) for positive in positives):
        return "near"
    return "answer" if len(answer) >= _TELLING_ANSWER and answer in same_text(negative.text) else None


def _write_side(folder: Path, side: str, records: Iterable[Mapping[str, Any]]) -> int:
    """Write the files of train or dev; how many different passages the pool of the dev side has."""
    pool: set[str] = set()
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / name).open("w", encoding="utf-8", newline="\n"))
            for name in OUTPUTS
            if side in name
        }
        for number, record in enumerate(records, 1):
            retrieval, generation = record["retrieval"], record["generation"]
            files[f"retrieval_{side}.jsonl"].write(json_line(retrieval))
            files[f"generation_{side}.jsonl"].write(json_line(generation))
            if side == "train":
                continue
            question = {"id": f"dev-{number}", "question": retrieval["query"], "answers": [generation["answer"]]}
            gold = {"context_id": retrieval["pos_docs"][0], "pos_ids": retrieval["pos_docs"]}
            files["dev_questions.jsonl"].write(json_line({**question, **gold}))
            for passage in record["passages"]:
                if passage["id"] not in pool:
                    pool.add(passage["id"])
                    files["dev_passages.jsonl"].write(json_line(passage))
    return len(pool)


def _nothing(files: Sequence[Path], counts: _Counts) -> RagProjError:
    listed = ", ".join(map(str, files))
    first = counts.problems[0] if counts.problems else None
    zh, en = "", ""
    if first is not None:
        place = f"{first.file}:{first.line}"
        zh, en = f"；第一处：{place}：{first.zh}", f"; the first problem: {place}: {first.en}"
    return RagProjError(
        f"{listed} 中没有一条可用的记录（应有 QA、positive_doc、negative_doc）{zh}",
        f"no record of {listed} can be used (QA, positive_doc and negative_doc are expected){en}",
    )
