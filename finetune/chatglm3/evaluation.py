"""How well a generator answers from references: asked through the chain that serves, one value per question.

A row that should be answered is compared with its answer, marks left out; a row that should be refused counts 1 where
the chain refused it and 0 otherwise. Citations and refusals are counted where they can be: precision over the rows that
cite or refuse, recall over those that should. There a row that does not count has the value NaN.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableLambda

from chains.answerers import CITATION_MARK, ChatModelAnswerer, answer_messages
from chains.chat_models import EmptyAnswerError
from chains.chatglm3.chat_model import PromptTooLongError
from chains.chatglm3.prompt import ChatGLM3Tokenizer, prompt_ids, turns_of
from chains.config import RagConfig
from chains.metrics import Interval, char_f1, exact_match, rouge_l
from chains.prompts import Language
from chains.retrieval_qa import QuestionError, RetrievalQA
from finetune.chatglm3.data import cited_numbers, history_messages, passages_of
from finetune.data.rows import GenerationRow
from finetune.doctor import Finding
from finetune.evaluation import Scores
from finetune.gate import Comparison
from finetune.report import SetReport

logger = logging.getLogger(__name__)

# Every row counts in these: what the gate can go by.
ANSWER_METRICS = ("exact_match", "char_f1", "rouge_l")
# Only some rows count in these.
COUNTED_METRICS = ("citation_precision", "citation_recall", "refusal_precision", "refusal_recall")
_ROUNDS = 2_000  # of the bootstrap
_SHOWN = 20  # rows named in a finding


@dataclass(frozen=True)
class Answered:
    """What the chain made of a row."""

    result: str
    refused: bool


def sampled_rows(rows: Sequence[GenerationRow], limit: int, *, seed: int) -> Sequence[GenerationRow]:
    """At most that many of the rows, in their order."""
    if len(rows) <= limit:
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))  # noqa: S311 a sample, no secret
    return [rows[number] for number in chosen]


def answer_rows(
    model: BaseChatModel, rows: Sequence[GenerationRow], *, language: Language, concurrency: int
) -> list[Answered]:
    """What the chain answers each row from its references, in order; nothing where it cannot be asked at all.

    Args:
        model: the chat model that serves.
        rows: to be answered; a history is condensed by the model, as in use.
        language: of the prompt.
        concurrency: answers generated at a time.
    """
    answerer = ChatModelAnswerer(model=model, language=language)
    config = RagConfig(language=language)

    def ask(row: GenerationRow) -> Answered:
        found = passages_of(row.references)
        retriever: RunnableLambda[str, list[Document]] = RunnableLambda(lambda _: found)
        chain = RetrievalQA(retriever, answerer, config, calibrated=False)
        try:
            output = chain.invoke({"query": row.question, "chat_history": history_messages(row)})
        except (QuestionError, PromptTooLongError, EmptyAnswerError) as error:
            # `check_askable` names rows that cannot be asked before the run
            logger.warning("%s:%d counts as not answered: %s", row.file, row.line, error.en)
            return Answered("", refused=False)
        return Answered(output["result"], output["refused"])

    return RunnableLambda(ask).batch(list(rows), {"max_concurrency": concurrency})


def check_askable(
    name: str, rows: Sequence[GenerationRow], tokenizer: ChatGLM3Tokenizer, *, context: int, language: Language
) -> list[Finding]:
    """Rows of a set that the chain cannot be asked: they count as not answered, before and after.

    Args:
        name: of the set.
        rows: with their files and lines.
        tokenizer: of the model.
        context: tokens that the model takes.
        language: of the prompt.
    """
    most = RagConfig().max_question_chars
    found = [
        row for row in rows if len(row.question) > most or len(_shortest_prompt(row, tokenizer, language)) >= context
    ]
    if not found:
        return []
    places = ", ".join(f"{row.file}:{row.line}" for row in found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
    return [
        Finding(
            "unanswered",
            "warning",
            f"评测集 {name} 的 {len(rows)} 行中有 {len(found)} 行问不了：问题超过 {most} 个字，或问题加一段参考资料"
            f"超过模型的 {context} 个 token；按没有回答计分；请缩短：{places}",
            f"{len(found)} of the {len(rows)} rows of {name} cannot be asked: a question over {most} characters, or"
            f" with one reference over the model's {context} tokens; they count as not answered; shorten {places}",
        )
    ]


def _shortest_prompt(row: GenerationRow, tokenizer: ChatGLM3Tokenizer, language: Language) -> list[int]:
    """The prompt that is left when all references but the best have been dropped."""
    question = row.standalone or row.question
    return prompt_ids(tokenizer, turns_of(answer_messages(question, passages_of(row.references[:1]), language)))


def score_answers(rows: Sequence[GenerationRow], answers: Sequence[Answered]) -> Scores:
    """The scores of answers; one value per row and metric, NaN where a row does not count."""
    values = [_values(row, answer) for row, answer in zip(rows, answers, strict=True)]
    names = (*ANSWER_METRICS, *COUNTED_METRICS)
    return Scores(
        {name: tuple(value[name] for value in values) for name in names}, sum(len(row.references) for row in rows)
    )


def evaluate_rows(
    model: BaseChatModel, rows: Sequence[GenerationRow], *, language: Language, concurrency: int
) -> Scores:
    """The scores of a chat model on rows."""
    return score_answers(rows, answer_rows(model, rows, language=language, concurrency=concurrency))


def _values(row: GenerationRow, answer: Answered) -> dict[str, float]:
    wanted, given = cited_numbers(row.answer), cited_numbers(answer.result)
    return {
        **_answer_values(row, answer),
        "citation_precision": len(wanted & given) / len(given) if given else math.nan,
        "citation_recall": len(wanted & given) / len(wanted) if wanted else math.nan,
        "refusal_precision": float(row.refuse) if answer.refused else math.nan,
        "refusal_recall": float(answer.refused) if row.refuse else math.nan,
    }


def _answer_values(row: GenerationRow, answer: Answered) -> dict[str, float]:
    if row.refuse:
        return dict.fromkeys(ANSWER_METRICS, float(answer.refused))
    if answer.refused:
        return dict.fromkeys(ANSWER_METRICS, 0.0)
    said, gold = CITATION_MARK.sub("", answer.result), [CITATION_MARK.sub("", row.answer)]
    return {
        "exact_match": exact_match(said, gold),
        "char_f1": char_f1(said, gold),
        "rouge_l": rouge_l(said, gold),
    }


# --- comparing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSetReport(SetReport):
    """A set before and after, where not every row counts in every metric."""

    def comparison(self, metric: str, seed: int) -> Comparison:
        """Of one metric; the interval draws rows, the same for both."""
        return compare_counted(self.before.by_metric[metric], self.after.by_metric[metric], seed=seed)


def compare_counted(before: Sequence[float], after: Sequence[float], *, seed: int) -> Comparison:
    """Means over the rows that count, and their difference with its 95 % paired bootstrap interval over all rows.

    Where no row counts the mean is 1: nothing refused is no wrong refusal.

    Raises:
        ValueError: the two differ in length.
    """
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if old.shape != new.shape:
        raise ValueError(f"{len(old)} rows before, {len(new)} after")
    draws = np.random.default_rng(seed).integers(0, len(old), size=(_ROUNDS, len(old)))
    differences = np.array([counted_mean(new[drawn]) - counted_mean(old[drawn]) for drawn in draws])
    low, high = np.quantile(differences, [0.025, 0.975])
    first, last = counted_mean(old), counted_mean(new)
    return Comparison(first, last, Interval(last - first, float(low), float(high)))


def counted_mean(values: Any) -> float:
    """Mean of the values that are numbers; 1.0 where none is."""
    counted = np.asarray(values, np.float64)
    counted = counted[~np.isnan(counted)]
    return float(counted.mean()) if len(counted) else 1.0


def means(scores: Scores) -> Mapping[str, float]:
    """The mean of each metric over the rows that count, four decimals."""
    return {name: round(counted_mean(values), 4) for name, values in scores.by_metric.items()}
