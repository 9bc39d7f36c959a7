"""evaluate: questions with gold answers, asked through the chain that serves; retrieval and answers measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from chains.answerers import CITATION_MARK, listed
from chains.chat_models import EmptyAnswerError
from chains.metrics import (
    char_f1,
    contains_gold,
    exact_match,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    refusal_scores,
)
from chains.retrieval_qa import RetrievalQA
from loaders.errors import RagProjError

logger = logging.getLogger(__name__)

# Several chunks may come from one passage: enough of them for ten different passages.
_CHUNKS = 50


# Ids may be numbers: the loader makes text of a record's id, too.
RecordId = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]


class Question(BaseModel):
    """A row of a question file; fields that are not needed are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: RecordId = ""
    question: str
    answers: list[str] = []
    context_id: RecordId | None = None
    pos_ids: list[RecordId] = []
    answer_type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _none_is_not_given(cls, row: object) -> object:
        return {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else row

    @property
    def gold(self) -> list[str]:
        """Ids of the passages that answer it."""
        return list(dict.fromkeys([*([self.context_id] if self.context_id else []), *self.pos_ids]))

    @property
    def expects_refusal(self) -> bool:
        """Whether the row says that nothing answers it: `"answers": []`, or an `answer_type` of "unanswerable"."""
        return self.answer_type == "unanswerable" or ("answers" in self.model_fields_set and not self.answers)


class QuestionsError(RagProjError):
    """A question file that cannot be used."""


def read_questions(path: Path) -> list[Question]:
    """The rows of a JSONL file of questions.

    Raises:
        QuestionsError: the file is missing, empty, or has rows that are no questions; all are listed, with their lines.
    """
    questions: list[Question] = []
    problems: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    questions.append(Question.model_validate_json(line))
                except ValidationError as error:
                    first = error.errors()[0]
                    problems.append(f"{path.name}:{number}: {'.'.join(map(str, first['loc']))} {first['msg']}")
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionsError(
            f"无法读取问题文件 {path}：{error}", f"cannot read question file {path}: {error}"
        ) from error
    if problems:
        shown = "; ".join(problems[:10])
        raise QuestionsError(
            f"问题文件 {path} 有 {len(problems)} 行无法使用：{shown}",
            f"{len(problems)} rows of question file {path} cannot be used: {shown}",
        )
    if not questions:
        raise QuestionsError(f"问题文件 {path} 是空的", f"question file {path} is empty")
    return questions


def evaluate(
    qa: RetrievalQA,
    questions: Sequence[Question],
    *,
    retrieval_only: bool = False,
    progress: Callable[[Iterable[Question]], Iterable[Question]] = iter,
) -> dict[str, Any]:
    """Means over the questions, as `ragproj evaluate --json` prints them.

    `retrieval` counts the questions that name a gold passage; a passage ranks where its first chunk does. `answer`
    counts those with a gold answer. `refusal` counts these and the unanswerable ones: rows that expect a refusal and
    whose gold passages, if they name any, retrieval does not find. A part without any such question is None.

    Args:
        qa: the chain.
        questions: from `read_questions`.
        retrieval_only: leave answering out.
        progress: wraps the questions while they are worked on, as tqdm does.
    """
    asked = [question for question in questions if question.question.strip()]
    if len(asked) < len(questions):
        logger.warning("%d blank questions are left out", len(questions) - len(asked))
    retrieval: list[dict[str, float]] = []
    answers: list[dict[str, float]] = []
    refused: list[tuple[bool, bool]] = []  # (refused, answerable)
    for question in progress(asked):
        ranked = _ranked_ids(qa, question) if question.gold else []
        if question.gold:
            retrieval.append(_retrieval_scores(ranked, question.gold))
        unanswerable = question.expects_refusal and not set(ranked) & set(question.gold)
        answerable = bool(question.answers) and not question.expects_refusal
        if retrieval_only or not (answerable or unanswerable):
            continue
        output = _answer(qa, question)
        refused.append((output["refused"], answerable))
        if answerable:
            answers.append(_answer_scores(output, question.answers))
    report: dict[str, Any] = {"n": len(asked), "retrieval": _means(retrieval)}
    if not retrieval_only:
        report["answer"] = _means(answers)
        scores = _refusal(refused)
        if scores is not None:
            report["refusal"] = scores
    return report


def _answer(qa: RetrievalQA, question: Question) -> dict[str, Any]:
    """The chain's answer; one without text is none, and no refusal."""
    try:
        return dict(qa.invoke({"query": question.question}))
    except EmptyAnswerError as error:
        logger.warning("%s: %s", question.question, error.en)
        return {"result": "", "refused": False}


def _ranked_ids(qa: RetrievalQA, question: Question) -> list[str]:
    """Ids of the passages retrieval finds, best first, an id as often as it has chunks among them."""
    gold = set(question.gold)
    many: RunnableConfig = {"configurable": {"top_k": _CHUNKS}}
    return [_passage_id(document, gold) for document in qa.retriever.invoke(question.question, many)]


def _refusal(refused: Sequence[tuple[bool, bool]]) -> dict[str, float] | None:
    if all(answerable for _, answerable in refused):
        return None
    scores = refusal_scores([said_no for said_no, _ in refused], [answerable for _, answerable in refused])
    return {"precision": round(scores.precision, 4), "recall": round(scores.recall, 4)}


def _passage_id(document: Document, gold: set[str]) -> str:
    """What gold ids name: the record's own id, or the source where it has none.

    Of records with the same text, stored as one, the gold one.
    """
    holders = [document.metadata, *listed(document.metadata, "also_in")]
    ids = [str(holder.get("id") or holder.get("source")) for holder in holders]
    return next((identifier for identifier in ids if identifier in gold), ids[0])


def _retrieval_scores(ranked: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    return {
        **{f"recall@{k}": recall_at_k(ranked, gold, k) for k in (1, 5, 10)},
        "mrr@10": mrr_at_k(ranked, gold, 10),
        "ndcg@10": ndcg_at_k(ranked, gold, 10),
    }


def _answer_scores(output: dict[str, Any], gold: Sequence[str]) -> dict[str, float]:
    answer = CITATION_MARK.sub("", output["result"])
    return {
        "contains_gold": contains_gold(answer, gold),
        "exact_match": exact_match(answer, gold),
        "char_f1": char_f1(answer, gold),
        "mean_chars": len(answer),
        "refused": float(output["refused"]),
    }


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float] | None:
    if not rows:
        return None
    return {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in rows[0]}


def write_report(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"n = {report['n']}"]
    for part in ("retrieval", "answer", "refusal"):
        for key, value in (report.get(part) or {}).items():
            lines.append(f"{part}.{key:<14} {value:g}")
    return "\n".join(lines)
