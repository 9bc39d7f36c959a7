"""evaluate: question files, and a report over a tiny hand-made set with figures counted by hand."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.retrievers import BaseRetriever

from chains import RagConfig, RetrievalQA, build_retrieval_qa, load_config
from chains.evaluation import Question, QuestionsError, evaluate, read_questions, write_report
from chains.prompts import REFUSAL
from chains.retrieval_qa import build_vectorstore


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# -- question files ------------------------------------------------------------------------------------------------


def test_rows_are_read_with_what_they_need_and_the_rest_ignored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"id": "q1", "question": "年假几天？", "answers": ["十天"], "context_id": "p1", "answer_starts": [4]},
        {"question": "报销？", "pos_ids": ["p2", "p3"], "neg_ids": ["p4"]},
        {"question": "没有金标准？"},
    )
    first, second, third = read_questions(path)
    assert (first.id, first.question, first.answers, first.gold) == ("q1", "年假几天？", ["十天"], ["p1"])
    assert (second.answers, second.gold) == ([], ["p2", "p3"])
    assert (third.answers, third.gold) == ([], [])


def test_gold_is_the_context_or_any_positive_each_once() -> None:
    assert Question(question="?", context_id="a", pos_ids=["b", "a", "b"]).gold == ["a", "b"]


def test_a_line_separator_inside_a_row_does_not_end_it(tmp_path: Path) -> None:
    """Rows of the project's data contain U+2028, which str.splitlines() takes for the end of a line."""
    odd = "第一行\u2028第二行\x85第三行\x0b\x1c\u2029完"
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": odd}, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    # json escapes the control characters and leaves U+0085, U+2028, U+2029 as they are
    assert [row.question for row in read_questions(path)] == [odd]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_blank_lines_and_windows_line_ends_are_fine(tmp_path: Path, newline: str) -> None:
    text = newline.join(["", '{"question": "一？"}', "  ", '{"question": "二？"}'])
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row.question for row in read_questions(path)] == ["一？", "二？"]


def test_every_bad_row_is_listed_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "好"},
        "{not json",
        "",
        {"answers": ["x"]},
        {"question": 7},
        {"question": "好", "answers": "十天"},
        "[]",
        {"question": "也好"},
    )
    with pytest.raises(QuestionsError) as caught:
        read_questions(path)
    for half in (caught.value.zh, caught.value.en):
        for place in ("q.jsonl:2:", "q.jsonl:4: question", "q.jsonl:5: question", "q.jsonl:6: answers", "q.jsonl:7:"):
            assert place in half
        assert "q.jsonl:1:" not in half
        assert "q.jsonl:8:" not in half
    assert "5 行" in caught.value.zh
    assert "5 rows" in caught.value.en


def test_many_bad_rows_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *["{}"] * 500)
    with pytest.raises(QuestionsError) as caught:
        read_questions(path)
    assert "500" in caught.value.zh
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("row", [{"id": 7}, {"answers": None}, {"pos_ids": None}, {"context_id": 7}])
def test_numbers_as_ids_and_nulls_are_understood(tmp_path: Path, row: dict[str, Any]) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", {"question": "年假？", **row}))
    assert question.gold in ([], ["7"])


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_questions_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(QuestionsError, match=r"空.* / .*empty"):
        read_questions(path)


def test_a_missing_file_a_folder_and_another_encoding_are_errors(tmp_path: Path) -> None:
    gbk = tmp_path / "gbk.jsonl"
    gbk.write_bytes('{"question": "年假？"}'.encode("gbk"))
    for path in (tmp_path / "none.jsonl", tmp_path, gbk):
        with pytest.raises(QuestionsError, match=f"{path.name}.* / .*{path.name}"):
            read_questions(path)


def test_the_projects_question_files_can_be_read(shared_data: Path) -> None:
    """Row counts from shared/data/README.md."""
    for name, rows in (("cmrc2018_devtest", 811), ("cmrc2018_trial", 1002), ("dureader2_demo_dev", 100)):
        questions = read_questions(shared_data / f"{name}.jsonl")
        assert len(questions) == rows
        assert all(question.gold for question in questions)


# -- the report ----------------------------------------------------------------------------------------------------


class Ranked(BaseRetriever):
    """A ranking for each question, written down in the test."""

    rankings: dict[str, list[str]]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(page_content=f"{query} 相关的第 {n} 段", metadata={"id": name, "source": "pool.jsonl"})
            for n, name in enumerate(self.rankings[query])
        ]


def chain(rankings: dict[str, list[str]], *answers: str) -> RetrievalQA:
    return build_retrieval_qa(
        RagConfig(), retriever=Ranked(rankings=rankings), llm=FakeListChatModel(responses=list(answers))
    )


RANKINGS = {
    "问题甲": ["a", "b", "c", "d"],  # gold a at rank 1
    "问题乙": ["x", "x", "y", "b"],  # gold b: x counts once, so rank 3
    "问题丙": [f"n{n}" for n in range(6)] + ["c"],  # gold c at rank 7
    "问题丁": [f"n{n}" for n in range(12)] + ["d"],  # gold d at rank 13
}
QUESTIONS = [
    Question(question=q, context_id=g, answers=a)
    for q, g, a in zip(RANKINGS, "abcd", [["十天"], ["三年"], ["李雷"], ["五元"]], strict=True)
]


def test_retrieval_figures_equal_the_hand_count() -> None:
    """Ranks 1, 3, 7 and beyond ten; a passage ranks where its first chunk does.

    MRR = (1 + 1/3 + 1/7) / 4 = .3690; nDCG with one gold passage = 1 / log2(rank + 1): (1 + .5 + 1/3) / 4 = .4583.
    """
    report = evaluate(chain(RANKINGS, "x"), QUESTIONS, retrieval_only=True)
    assert report == {
        "n": 4,
        "retrieval": {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75, "mrr@10": 0.369, "ndcg@10": 0.4583},
    }


def test_answer_figures_equal_the_hand_count() -> None:
    """Four answers: equal; containing; wrong; the sentence of a refusal.

    character F1: 1; "保修三年" against "三年": 2 * 2 / (4 + 2) = .6667; 0; 0: mean .4167. Characters without marks:
    2, 5, 5, 24: mean 9.
    """
    report = evaluate(chain(RANKINGS, "十天[1]", "保修三年。 [1]", "不清楚啊。", REFUSAL["zh"]), QUESTIONS)
    assert report["n"] == 4
    assert report["answer"] == {
        "contains_gold": 0.5,
        "exact_match": 0.25,
        "char_f1": 0.4167,
        "mean_chars": 9,
        "refused": 0.25,
    }


def test_several_gold_passages_count_as_found_with_any_of_them() -> None:
    question = Question(question="问题甲", pos_ids=["c", "zzz"])
    report = evaluate(chain(RANKINGS, "x"), [question], retrieval_only=True)
    # c at rank 3: MRR 1/3; nDCG = .5 / (1 + 1 / log2(3)) = .3066
    assert report["retrieval"] == {
        "recall@1": 0.0, "recall@5": 1.0, "recall@10": 1.0, "mrr@10": 0.3333, "ndcg@10": 0.3066,
    }  # fmt: skip


def test_parts_without_gold_are_none_and_others_count_only_their_own() -> None:
    qa = chain(RANKINGS, "十天")
    only_answers = [Question(question="问题甲", answers=["十天"]), Question(question="问题乙")]
    report = evaluate(qa, only_answers)
    assert (report["n"], report["retrieval"]) == (2, None)
    assert report["answer"]["exact_match"] == 1.0
    assert evaluate(qa, [Question(question="问题甲", context_id="a")])["answer"] is None


def test_retrieval_only_never_asks_the_generator() -> None:
    qa = chain(RANKINGS)  # a model without any answer raises when it is asked
    assert "answer" not in evaluate(qa, QUESTIONS, retrieval_only=True)


def test_progress_sees_every_question_once() -> None:
    seen: list[str] = []

    def progress(questions: Iterable[Question]) -> Iterable[Question]:
        for question in questions:
            seen.append(question.question)
            yield question

    evaluate(chain(RANKINGS, "x"), QUESTIONS, retrieval_only=True, progress=progress)
    assert seen == list(RANKINGS)


def test_report_as_lines_names_every_figure() -> None:
    report = evaluate(chain(RANKINGS, "十天"), QUESTIONS)
    lines = write_report(report).splitlines()
    assert lines[0] == "n = 4"
    assert len(lines) == 1 + 5 + 5  # nothing unanswerable was asked: no part for refusals
    assert lines[1].split() == ["retrieval.recall@1", "0.25"]
    assert write_report({"n": 1, "retrieval": None}) == "n = 1"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Generator[RetrievalQA, None, None]:
    """Records with ids, a file without, and one long record of many chunks, in a real knowledge base."""
    config = load_config(None, [f"kb={tmp_path_factory.mktemp('pool') / 'kb'}"])
    store = build_vectorstore(config, create=True)
    texts = ["年假一共有十天。", "保修期为三年。", "停车费每小时五元。"]
    metadatas: list[dict[str, Any]] = [
        {"id": "p1", "source": "pool.jsonl"},
        {"id": "0", "source": "pool.jsonl"},
        {"source": "parking.txt"},
    ]
    store.add_texts(texts, metadatas)
    store.add_texts([f"食堂第{n}天供应牛肉面。" for n in range(60)], [{"id": "long", "source": "m"}] * 60)
    yield build_retrieval_qa(config, vectorstore=store)
    store.knowledge_base.close()


def test_a_real_chain_finds_records_by_id_and_files_by_source(pool: RetrievalQA) -> None:
    questions = [
        Question(question="年假有几天？", context_id="p1", answers=["十天"]),
        Question(question="保修期多久？", context_id="0", answers=["三年"]),
        Question(question="停车费多少？", context_id="parking.txt", answers=["五元"]),
        Question(question="食堂供应什么？", context_id="long", answers=["牛肉面"]),
    ]
    report = evaluate(pool, questions)
    assert report["retrieval"]["recall@1"] == 1.0
    assert report["answer"]["contains_gold"] == 1.0
    assert report["answer"]["refused"] == 0.0


def test_many_chunks_of_one_passage_take_one_place(pool: RetrievalQA) -> None:
    """Sixty chunks of "long" rank before the others; the next passage is still within the first ten."""
    question = Question(question="食堂供应牛肉面的停车费？", context_id="parking.txt")
    assert evaluate(pool, [question], retrieval_only=True)["retrieval"]["recall@10"] == 1.0


def test_evaluation_does_not_change_what_the_chain_serves(pool: RetrievalQA) -> None:
    before = pool.invoke("年假有几天？")
    evaluate(pool, [Question(question="年假有几天？", context_id="p1")])
    assert pool.invoke("年假有几天？") == before


# -- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "?"}, False),
        ({"question": "?", "answers": ["十天"]}, False),
        ({"question": "?", "answers": []}, True),
        ({"question": "?", "answers": None}, False),  # nothing was said about it
        ({"question": "?", "pos_ids": ["a"]}, False),  # a row for retrieval only
        ({"question": "?", "answers": ["无"], "answer_type": "unanswerable"}, True),
        ({"question": "?", "answers": ["十天"], "answer_type": "span"}, False),
    ],
)
def test_a_row_expects_a_refusal_where_it_says_so(row: dict[str, Any], expected: bool) -> None:
    assert Question.model_validate(row).expects_refusal is expected


def test_refusal_figures_equal_the_hand_count() -> None:
    """Two answerable, one of them refused; three not, two of them refused: precision 2 / 3, recall 2 / 3.

    The unanswerable ones are no part of the answers' figures: one of two is refused.
    """
    rankings = {f"问题{n}": ["x"] for n in "甲乙丙丁戊"}
    no, yes = REFUSAL["zh"], "十天"
    questions = [
        Question(question="问题甲", answers=["十天"]),
        Question(question="问题乙", answers=["十天"]),
        Question(question="问题丙", answers=[]),
        Question(question="问题丁", answers=[], context_id="gone"),
        Question(question="问题戊", answers=["?"], answer_type="unanswerable"),
    ]
    report = evaluate(chain(rankings, yes, no, no, no, yes), questions)
    assert report["refusal"] == {"precision": 0.6667, "recall": 0.6667}
    assert report["answer"]["refused"] == 0.5
    assert [line.split() for line in write_report(report).splitlines()[-2:]] == [
        ["refusal.precision", "0.6667"], ["refusal.recall", "0.6667"],
    ]  # fmt: skip


def test_a_question_whose_passage_is_in_the_knowledge_base_is_not_unanswerable() -> None:
    there = Question(question="问题甲", answers=[], context_id="a")
    gone = Question(question="问题乙", answers=[], context_id="zzz")
    report = evaluate(chain(RANKINGS, REFUSAL["zh"]), [there, gone])  # asked once, for the second
    assert report["refusal"] == {"precision": 1.0, "recall": 1.0}
    assert report["retrieval"]["recall@10"] == 0.5


def test_an_answer_without_a_text_is_wrong_and_no_refusal_and_the_others_are_asked() -> None:
    questions = [Question(question="问题甲", answers=["十天"]), Question(question="问题乙", answers=["十天"])]
    answer = evaluate(chain(RANKINGS, " ", "十天"), questions)["answer"]
    assert (answer["exact_match"], answer["refused"]) == (0.5, 0.0)


def test_without_unanswerable_questions_there_is_no_figure_for_refusals() -> None:
    assert "refusal" not in evaluate(chain(RANKINGS, "十天"), QUESTIONS)


def test_a_real_chain_refuses_what_its_documents_do_not_say(pool: RetrievalQA) -> None:
    questions = [
        Question(question="年假有几天？", answers=["十天"]),
        Question(question="停车费每小时多少？", answers=["五元"]),
        Question(question="北京到上海的高铁几点开？", answers=[]),
        Question(question="红烧鱼怎样做才不腥？", answers=[]),
    ]
    assert evaluate(pool, questions)["refusal"] == {"precision": 1.0, "recall": 1.0}
