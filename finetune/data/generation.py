"""Generation rows made harder and checked: citations, distractors, refusals, follow-up questions; split by document.

A generator that has only seen the right reference learns to quote the first one it gets. These rows have others beside
it, in any place, and rows without it, where the right answer is the refusal of `chains.prompts`.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from chains.answerers import CITATION_MARK
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from chains.extraction import find_support
from chains.prompts import REFUSAL, Language
from finetune.data.duplicates import is_near, text_key
from finetune.data.lengths import Lengths
from finetune.data.outputs import staged, write_report
from finetune.data.rows import GenerationRow, read_generation_rows, write_rows
from finetune.data.split import split_rows
from loaders.config import Config
from loaders.errors import RagProjError

OUTPUTS = ("generation_train.jsonl", "generation_dev.jsonl")
_SENTENCE = re.compile(r"[^。！？!?；;\n]*[。！？!?；;\n]+|[^。！？!?；;\n]+$")
_SHOWN = 20  # rows named in the report
_SHOWN_CHARS = 80
_SHARED_CHARS = 3  # of two questions, to be put as "it" in the second
_TRIES = 8  # distractors looked at for each that is wanted

Progress = Callable[[int, str], None]


class GenerationDataConfig(Config):
    """How generation rows are made of others."""

    seed: int = Field(default=0, description="of the split, the draws and the order")
    dev_share: float = Field(default=0.1, ge=0, le=0.5, description="of the rows, given to dev by whole documents")
    language: Language = Field(default="zh", description="of the refusals")
    cite: bool = Field(default=True, description="put [n] behind each sentence of an answer that a reference bears out")
    min_support: float = Field(
        default=0.35, ge=0, le=1, description="share of a sentence's information that bears it out, as when serving"
    )
    drop_unsupported: bool = Field(default=True, description="leave out rows of whose answer no sentence is borne out")
    references: int = Field(default=5, ge=1, le=100, description="of a row, at most; those that answer always stay")
    distractors: int = Field(default=3, ge=0, le=99, description="references of other rows mixed in, at most")
    refusal_share: float = Field(
        default=0.15, ge=0, le=1, description="further rows whose references do not answer, as a share of the others"
    )
    empty_share: float = Field(
        default=0.02, ge=0, le=1, description="further training rows without a reference, as a share of the others"
    )
    follow_up_share: float = Field(
        default=0.1, ge=0, le=1, description="rows turned into the second question of a conversation, where they can be"
    )
    tokenizer: Path | None = Field(
        default=None, description="native ChatGLM3 directory whose tokens are counted; null: characters"
    )


@dataclass(frozen=True)
class Supported:
    """A row and which of its references bear its answer out."""

    row: GenerationRow
    gold: tuple[int, ...]
    """places of those references, from 0"""
    sentences: int
    supported: int
    """of the sentences"""


@dataclass
class _Counts:
    """What the report says of the input and of what was derived."""

    unsupported: list[str] = field(default_factory=list)
    dropped: int = 0
    duplicates: int = 0
    sentences: int = 0
    supported: int = 0
    positions: Counter[int] = field(default_factory=Counter)
    derived: Counter[str] = field(default_factory=Counter)


def make_generation_rows(
    paths: Sequence[Path],
    out: Path,
    config: GenerationDataConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, stage: None,
) -> dict[str, Any]:
    """The report; `OUTPUTS` and then `report.json` are in `out`. The same files and seed give the same bytes.

    Args:
        paths: files of generation rows, from `data multi-doc-qa` or of one's own.
        out: folder, made where it is missing.
        config: how rows are made.
        overwrite: replace what is in `out`.
        progress: told the rows done so far and the stage.

    Raises:
        RowsError: rows are bad; the first are named.
        UsageError: `out` holds results already, and `overwrite` is not set.
        RagProjError: no row is left, or a file cannot be read or written.
    """
    config = config or GenerationDataConfig()
    counts = _Counts()
    found = []
    for done, row in enumerate(_distinct(read_generation_rows(paths), counts), 1):
        found.append(find_gold(row, config.min_support))
        progress(done, "check")
    kept = [one for one in found if _is_kept(one, config, counts)]
    if not kept:
        raise RagProjError(
            f"没有一行的答案得到参考资料支持（{counts.dropped} 行）；可调小 min_support 或设 drop_unsupported=false",
            f"no answer is borne out by its references ({counts.dropped} rows); lower min_support or set"
            " drop_unsupported=false",
        )
    sides = split_rows(
        [(one.row.question, _documents_of(one)) for one in kept], dev_share=config.dev_share, seed=config.seed
    )
    report: dict[str, Any] = {}
    with staged(out, OUTPUTS, overwrite=overwrite) as folder:
        lengths = _lengths(config)
        rows = {}
        for name, is_dev in zip(OUTPUTS, (False, True), strict=True):
            here = [one for one, dev in zip(kept, sides, strict=True) if dev == is_dev]
            # where there is no reference the chain refuses without asking a model: on dev such rows measure nothing
            how = config.model_copy(update={"empty_share": 0.0}) if is_dev else config
            made = derive(here, how, counts, progress=progress)
            rows["dev" if is_dev else "train"] = write_rows(folder / name, made)
            _measure(lengths, made)
        report = _report(config, counts, rows, lengths)
        write_report(folder, report)
    return report


def find_gold(row: GenerationRow, min_support: float) -> Supported:
    """Which references bear out the answer: for each of its sentences the one that covers most of it.

    A row that refuses has none.
    """
    if row.refuse:
        return Supported(row, (), 0, 0)
    sentences = split_sentences(CITATION_MARK.sub("", row.answer))
    best = [best_reference(sentence, row.references, min_support) for sentence in sentences]
    places = [place for place in best if place is not None]
    return Supported(row, tuple(sorted(set(places))), len(sentences), len(places))


def split_sentences(answer: str) -> list[str]:
    """The sentences of an answer, ends and white space included: joined they are the answer."""
    pieces = [match.group() for match in _SENTENCE.finditer(answer)]
    joined: list[str] = []
    for piece in pieces:
        if joined and not any(character.isalnum() for character in piece):
            joined[-1] += piece  # closing quotes, blank lines
        else:
            joined.append(piece)
    return joined


def best_reference(sentence: str, references: Sequence[str], min_support: float) -> int | None:
    """Place of the reference that covers most of a sentence, the first of equals; None below `min_support`."""
    scores = []
    for reference in references:
        support = find_support(sentence.strip(), reference)
        scores.append(0.0 if support is None else support.score)
    best = max(range(len(scores)), key=lambda place: (scores[place], -place), default=None)
    return None if best is None or scores[best] < min_support else best


def cited_answer(answer: str, references: Sequence[str], min_support: float) -> str:
    """The answer with [n] behind each sentence that a reference bears out; marks it had are set anew."""
    parts = []
    for sentence in split_sentences(CITATION_MARK.sub("", answer)):
        place = best_reference(sentence, references, min_support)
        text = sentence.rstrip()
        parts.append(sentence if place is None else f"{text}[{place + 1}]{sentence[len(text) :]}")
    return "".join(parts)


def derive(
    kept: Sequence[Supported],
    config: GenerationDataConfig,
    counts: _Counts,
    *,
    progress: Progress = lambda done, stage: None,
) -> list[GenerationRow]:
    """The rows of one side: each with distractors in a random order, then refusals and follow-ups, shuffled."""
    draw = random.Random(config.seed)  # noqa: S311 a sample, no secret
    pool = list(dict.fromkeys(text for one in kept for text in one.row.references))
    mixed = []
    for done, one in enumerate(kept, 1):
        mixed.append(_mixed(one, pool, config, draw, counts))
        progress(done, "mix")
    answered = [one for one in kept if not one.row.refuse]
    wanted = round(config.refusal_share * len(answered))
    refusals = [
        refusal
        for one in draw.sample(answered, min(wanted, len(answered)))
        if (refusal := _without_gold(one, pool, config, draw)) is not None
    ]
    counts.derived["refusals"] += len(refusals)
    empty = draw.sample(answered, round(config.empty_share * len(answered)))
    refusals += [replace(one.row, references=(), answer=REFUSAL[config.language], refuse=True) for one in empty]
    counts.derived["empty"] += len(empty)
    rows = [*_with_follow_ups(mixed, kept, config, draw, counts), *refusals]
    draw.shuffle(rows)
    return rows


def _mixed(
    one: Supported, pool: Sequence[str], config: GenerationDataConfig, draw: random.Random, counts: _Counts
) -> GenerationRow:
    """The row with its own references and distractors in a random order, its marks as that order has it."""
    row = one.row
    gold = [row.references[place] for place in one.gold]
    own = [text for place, text in enumerate(row.references) if place not in one.gold]
    room = max(0, config.references - len(gold))
    others = draw.sample(own, min(room, len(own)))
    wanted = min(room - len(others), config.distractors)
    added = [] if row.refuse else _distractors(row, [*gold, *others], pool, wanted, draw, config.min_support)
    counts.derived["distractors"] += len(added)
    references = [*gold, *others, *added]
    draw.shuffle(references)
    for text in gold:
        counts.positions[references.index(text) + 1] += 1
    answer = row.answer
    if config.cite and not row.refuse:
        answer = cited_answer(answer, references, config.min_support)
    return replace(row, references=tuple(references), answer=answer)


def _without_gold(
    one: Supported, pool: Sequence[str], config: GenerationDataConfig, draw: random.Random
) -> GenerationRow | None:
    """The row with everything that answers taken out, and the refusal as its answer; None where nothing is left."""
    row = one.row
    own = [text for place, text in enumerate(row.references) if place not in one.gold]
    others = [text for text in own if not _answers(row, text, config.min_support)][: config.references]
    others += _distractors(row, others, pool, min(config.distractors, config.references) - len(others), draw,
                           config.min_support)  # fmt: skip
    draw.shuffle(others)
    if not others:
        return None
    return replace(row, references=tuple(others), answer=REFUSAL[config.language], refuse=True)


def _distractors(
    row: GenerationRow,
    taken: Sequence[str],
    pool: Sequence[str],
    wanted: int,
    draw: random.Random,
    min_support: float,
) -> list[str]:
    """References of other rows that neither answer nor are near to one that is there already."""
    chosen: list[str] = []
    for text in draw.sample(pool, min(len(pool), max(0, wanted) * _TRIES)):
        if len(chosen) >= wanted:
            break
        known = [*taken, *row.references, *chosen]
        if text not in known and not any(is_near(text, other) for other in known):
            chosen += [] if _answers(row, text, min_support) else [text]
    return chosen


def _answers(row: GenerationRow, text: str, min_support: float) -> bool:
    """Whether a text bears out any sentence of the row's answer."""
    sentences = split_sentences(CITATION_MARK.sub("", row.answer))
    return any(best_reference(sentence, [text], min_support) is not None for sentence in sentences)


def _with_follow_ups(
    rows: Sequence[GenerationRow],
    kept: Sequence[Supported],
    config: GenerationDataConfig,
    draw: random.Random,
    counts: _Counts,
) -> Iterator[GenerationRow]:
    """The rows, some of them asked as the second question about what the question before was about."""
    by_document: dict[int, list[int]] = defaultdict(list)
    for number, one in enumerate(kept):
        for text in _documents_of(one):
            by_document[text_key(text)].append(number)
    wanted = round(config.follow_up_share * len(rows))
    for number in draw.sample(range(len(rows)), len(rows)):
        row = rows[number]
        before = [other for text in _documents_of(kept[number]) for other in by_document[text_key(text)]]
        asked = next((q for other in before if other != number and (q := _follow_up(kept[other].row, row))), None)
        if wanted and asked is not None:
            wanted -= 1
            counts.derived["follow_ups"] += 1
            yield asked
        else:
            yield row


def _follow_up(before: GenerationRow, row: GenerationRow) -> GenerationRow | None:
    """The row with what both questions name replaced by 它; None where they name nothing together."""
    shared = longest_shared(before.question, row.question)
    if len(shared) < _SHARED_CHARS or row.history or shared == row.question or row.question.count(shared) != 1:
        return None
    history = ((before.question, CITATION_MARK.sub("", before.answer)),)
    return replace(row, question=row.question.replace(shared, "它"), history=history, standalone=row.question)


def longest_shared(first: str, second: str) -> str:
    """The longest run of letters and digits that two texts share, the first of equals."""
    best = ""
    for start in range(len(first)):
        end = start + len(best) + 1
        while end <= len(first) and first[end - 1].isalnum() and first[start:end] in second:
            if first[start].isalnum() and first[start:end].isalnum():
                best = first[start:end]
            end += 1
    return best


# --- checks and report ------------------------------------------------------------------------------------------


def _distinct(rows: Sequence[GenerationRow], counts: _Counts) -> list[GenerationRow]:
    seen: dict[tuple[int, int, tuple[int, ...]], GenerationRow] = {}
    for row in rows:
        references = tuple(sorted(text_key(text) for text in row.references))
        seen.setdefault((text_key(row.question), text_key(row.answer), references), row)
    counts.duplicates = len(rows) - len(seen)
    return list(seen.values())


def _is_kept(one: Supported, config: GenerationDataConfig, counts: _Counts) -> bool:
    counts.sentences += one.sentences
    counts.supported += one.supported
    if one.row.refuse or one.gold:
        return True
    if len(counts.unsupported) < _SHOWN:
        counts.unsupported.append(f"{one.row.file}:{one.row.line}: {one.row.question[:_SHOWN_CHARS]}")
    counts.dropped += 1
    return not config.drop_unsupported


def _documents_of(one: Supported) -> list[str]:
    """The references that answer; all of them where none is known to."""
    return [one.row.references[place] for place in one.gold] or list(one.row.references) or [one.row.question]


def _lengths(config: GenerationDataConfig) -> dict[str, Lengths]:
    count = len if config.tokenizer is None else _token_count(config.tokenizer)
    return {name: Lengths(count) for name in ("question", "references", "answer")}


def _token_count(directory: Path) -> Any:
    tokenizer = ChatGLM3Tokenizer.from_directory(directory)
    return lambda text: len(tokenizer.encode(text))


def _measure(lengths: Mapping[str, Lengths], rows: Sequence[GenerationRow]) -> None:
    for row in rows:
        lengths["question"].add([row.question])
        lengths["references"].add(["\n".join(row.references)])
        lengths["answer"].add([row.answer])


def _report(
    config: GenerationDataConfig, counts: _Counts, rows: Mapping[str, int], lengths: Mapping[str, Lengths]
) -> dict[str, Any]:
    return {
        "rows": dict(rows),
        "duplicates": counts.duplicates,
        "unsupported_answers": {
            "count": counts.dropped,
            "dropped": config.drop_unsupported,
            "first": counts.unsupported,
        },
        "sentences": {"count": counts.sentences, "supported": counts.supported},
        "derived": {name: counts.derived[name] for name in ("distractors", "refusals", "empty", "follow_ups")},
        "positions_of_what_answers": {str(place): counts.positions[place] for place in sorted(counts.positions)},
        "tokens" if config.tokenizer else "characters": {name: found.summary() for name, found in lengths.items()},
        "config": config.model_dump(mode="json", by_alias=True),
    }
