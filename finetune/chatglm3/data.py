"""Generation rows as token ids and labels: the prompt that serves, and the answer that is to follow it."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from chains.answerers import CITATION_MARK, answer_messages, condense_messages
from chains.chatglm3.prompt import IGNORED, ChatGLM3Tokenizer, Turn, training_ids, turns_of
from chains.prompts import Language
from finetune.data.jsonl import Problem
from finetune.data.rows import GenerationRow, RowsError

_SHOWN = 20  # bad rows named in a message


@dataclass(frozen=True)
class Example:
    """What one row, or the rewriting of its question, is trained as."""

    ids: array[int]
    """four bytes a token: all the rows of a training are held at once"""
    start: int
    """place of the first token that is learned, as are all behind it"""
    row: GenerationRow
    """with the references that are left"""
    dropped: int = 0
    """references that did not fit"""
    dropped_cited: int = 0
    """of these, such as the answer cited"""

    @property
    def labels(self) -> array[int]:
        """As long as `ids`, IGNORED where nothing is learned; not shifted."""
        return array("i", [IGNORED]) * self.start + self.ids[self.start :]

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return len(self.ids) - self.start


def read_examples(
    rows: Sequence[GenerationRow], tokenizer: ChatGLM3Tokenizer, *, max_tokens: int, language: Language
) -> list[Example]:
    """The examples of rows, in order; a row with a history that has a `standalone` question gives a second one.

    Raises:
        RowsError: lists rows of which nothing can be learned, because question and answer alone are too long.
    """
    found: list[Example] = []
    problems: list[Problem] = []
    for row in rows:
        for example in _examples(row, tokenizer, max_tokens, language):
            if isinstance(example, Problem):
                problems.append(example)
            else:
                found.append(example)
    if problems:
        raise RowsError(problems[:_SHOWN], len(problems))
    return found


def _examples(
    row: GenerationRow, tokenizer: ChatGLM3Tokenizer, max_tokens: int, language: Language
) -> Iterator[Example | Problem]:
    yield answer_example(row, tokenizer, max_tokens=max_tokens, language=language) or _too_long(row, max_tokens)
    if row.history and row.standalone is not None:
        messages = condense_messages(row.question, history_messages(row), language)
        ids, start = _ids(messages, row.standalone, tokenizer)
        yield Example(ids, start, row) if len(ids) <= max_tokens else _too_long(row, max_tokens)


def answer_example(
    row: GenerationRow, tokenizer: ChatGLM3Tokenizer, *, max_tokens: int, language: Language
) -> Example | None:
    """The row as it is trained; None where question and answer alone have more tokens than fit.

    References are left out until it fits, never a part of the answer: first such as the answer does not cite, the
    lowest ranked first, then cited ones together with their marks. The numbers of those behind them move up.
    """
    question = row.standalone or row.question
    dropped = dropped_cited = 0
    while True:
        ids, start = _ids(_asked(question, row.references, language), row.answer, tokenizer)
        if len(ids) <= max_tokens:
            return Example(ids, start, row, dropped, dropped_cited)
        if not row.references:
            return None
        cited = cited_numbers(row.answer)
        place = max(range(len(row.references)), key=lambda number: (number + 1 not in cited, number))
        dropped_cited += place + 1 in cited
        dropped += 1
        row = without_reference(row, place)


def without_reference(row: GenerationRow, place: int) -> GenerationRow:
    """The row without one of its references (counted from 0), the answer's marks renumbered."""
    references = (*row.references[:place], *row.references[place + 1 :])
    numbers = [number for number in range(len(row.references)) if number != place]
    new = {old + 1: number + 1 for number, old in enumerate(numbers)}
    return replace(row, references=references, answer=renumbered(row.answer, new) or row.answer)


def renumbered(answer: str, new: dict[int, int]) -> str:
    """An answer whose marks have new numbers; those without one are left out."""

    def mark(match: re.Match[str]) -> str:
        numbers = [new[int(number)] for number in re.findall(r"\d+", match.group()) if int(number) in new]
        space = match.group()[: len(match.group()) - len(match.group().lstrip())]
        return space + "".join(f"[{number}]" for number in numbers) if numbers else ""

    return CITATION_MARK.sub(mark, answer)


def cited_numbers(answer: str) -> set[int]:
    """The numbers in an answer's marks: {1, 3} of "... [1][3]"."""
    return {int(number) for mark in CITATION_MARK.findall(answer) for number in re.findall(r"\d+", mark)}


def passages_of(references: Iterable[str]) -> list[Document]:
    """References as a retriever would hand them over."""
    return [Document(page_content=text, metadata={"source": str(n)}) for n, text in enumerate(references, 1)]


def history_messages(row: GenerationRow) -> list[BaseMessage]:
    """The conversation before the question."""
    return [message for asked, said in row.history for message in (HumanMessage(asked), AIMessage(said))]


def _asked(question: str, references: Sequence[str], language: Language) -> list[BaseMessage]:
    return answer_messages(question, passages_of(references), language)


def _ids(messages: Sequence[BaseMessage], answer: str, tokenizer: ChatGLM3Tokenizer) -> tuple[array[int], int]:
    """(ids, place of the first that is learned): the last turn is, to its end."""
    turns = [*turns_of(messages), Turn("assistant", answer)]
    ids, labels = training_ids(tokenizer, turns, answers="last")
    return array("i", ids), sum(label == IGNORED for label in labels)


def _too_long(row: GenerationRow, max_tokens: int) -> Problem:
    return Problem(
        row.file,
        row.line,
        f"问题和答案超过 {max_tokens} 个 token，去掉参考资料也没有可学的标签；请缩短或调大 max_tokens",
        f"question and answer exceed {max_tokens} tokens, so that no label is left even without references; shorten"
        " them or raise max_tokens",
    )
