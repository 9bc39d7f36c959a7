"""Generation rows: citations, distractors, refusals, follow-up questions, checks and the split."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from chains.prompts import REFUSAL
from finetune.chatglm3.data import cited_numbers
from finetune.data.generation import (
    OUTPUTS,
    GenerationDataConfig,
    cited_answer,
    find_gold,
    longest_shared,
    make_generation_rows,
    split_sentences,
)
from finetune.data.rows import GenerationRow, read_generation_rows, write_rows
from loaders.errors import RagProjError, UsageError

# Of each work: what is asked about it and the sentence that answers.
_FACTS = {
    "青龙水库": {"哪一年蓄水": "青龙水库于1958年开始蓄水。", "灌溉什么": "下游三个乡镇的稻田靠它灌溉。"},
    "白石大桥": {"有多长": "白石大桥全长一千二百米。", "收费吗": "小型车辆通行一次收取十元。"},
    "红岩电站": {"装了几台机组": "红岩电站安装四台水轮发电机组。", "电送到哪里": "电力经输电线送往省城电网。"},
    "黄沙隧道": {"谁设计的": "黄沙隧道由铁道勘察院设计。", "限速多少": "列车穿山时不得超过每小时八十公里。"},
    "紫云机场": {"有几条跑道": "紫云机场建有两条平行跑道。", "冬天常停航吗": "腊月大雾频繁，航班时常取消。"},
    "碧波码头": {"能停多大的船": "碧波码头可停靠五万吨级货轮。", "装卸什么": "主要转运煤炭、铁矿石与集装箱。"},
    "金山矿区": {"出产什么": "金山矿区出产铜和钼两种金属。", "关闭了吗": "资源枯竭后井口已全部封堵绿化。"},
    "银河剧院": {"有多少座位": "银河剧院设有一千八百个座位。", "谁常来演出": "京剧团每逢周末登台献艺。"},
}


def fact_rows() -> list[GenerationRow]:
    """Two questions about each of eight works, over the text that answers and one that does not."""
    draw = random.Random(3)
    texts = {name: "".join(facts.values()) for name, facts in _FACTS.items()}
    rows = []
    for name, facts in _FACTS.items():
        for question, answer in facts.items():
            other = draw.choice([text for key, text in texts.items() if key != name])
            rows.append(GenerationRow(f"{name}{question}？", (texts[name], other), answer))
    return rows


def made(tmp_path: Path, rows: list[GenerationRow], **settings: Any) -> tuple[dict[str, Any], list[GenerationRow]]:
    write_rows(tmp_path / "rows.jsonl", rows)
    config = GenerationDataConfig.model_validate(settings)
    report = make_generation_rows([tmp_path / "rows.jsonl"], tmp_path / "out", config)
    found = [row for name in OUTPUTS if report["rows"]["dev" if "dev" in name else "train"] or "train" in name
             for row in read_generation_rows([tmp_path / "out" / name])]  # fmt: skip
    return report, found


def test_sentences_joined_are_the_answer() -> None:
    answer = "第一句。第二句！\n\n“第三句。”没有结尾"
    assert "".join(split_sentences(answer)) == answer
    assert split_sentences("第一句。第二句") == ["第一句。", "第二句"]


def test_each_sentence_cites_the_reference_that_bears_it_out() -> None:
    references = ("食堂周末不开放。", "采购申请由部门经理审批。", "发票在三十天内提交。")
    answer = "采购申请由部门经理审批。发票在三十天内提交。"
    assert cited_answer(answer, references, 0.35) == "采购申请由部门经理审批。[2]发票在三十天内提交。[3]"
    assert cited_answer("采购申请由部门经理审批。[1]", references, 0.35) == "采购申请由部门经理审批。[2]"
    assert find_gold(GenerationRow("？", references, answer), 0.35).gold == (1, 2)


def test_every_answer_cites_a_reference_that_holds_it(tmp_path: Path) -> None:
    _, rows = made(tmp_path, fact_rows(), dev_share=0.25)
    answered = [row for row in rows if not row.refuse]
    assert len(answered) == 16
    for row in answered:
        (number,) = cited_numbers(row.answer)
        assert row.answer.removesuffix(f"[{number}]") in row.references[number - 1]


def test_what_answers_stands_in_every_place(tmp_path: Path) -> None:
    report, rows = made(tmp_path, fact_rows(), distractors=3, references=4, dev_share=0)
    assert all(len(row.references) == 4 for row in rows if not row.refuse)
    places = report["positions_of_what_answers"]
    assert set(places) == {"1", "2", "3", "4"}
    assert max(places.values()) < 12  # of 16 rows, four each on average


def test_refusals_have_no_reference_that_answers(tmp_path: Path) -> None:
    report, rows = made(tmp_path, fact_rows(), refusal_share=0.5, empty_share=0.1, dev_share=0)
    refused = [row for row in rows if row.refuse]
    assert report["derived"]["refusals"] == 8
    assert report["derived"]["empty"] == sum(not row.references for row in refused) == 2
    answers = {row.question: row.answer for row in fact_rows()}
    for row in refused:
        assert row.answer == REFUSAL["zh"]
        question = row.standalone or row.question
        assert not any(answers[question] in text for text in row.references)


def test_rows_without_references_which_no_model_is_asked_are_not_measured_on(tmp_path: Path) -> None:
    report, rows = made(tmp_path, fact_rows(), empty_share=0.5, dev_share=0.5)
    dev = read_generation_rows([tmp_path / "out" / "generation_dev.jsonl"])
    assert dev
    assert all(row.references for row in dev)
    assert sum(not row.references for row in rows) == report["derived"]["empty"] > 0


def test_follow_ups_put_the_name_both_questions_share_as_it(tmp_path: Path) -> None:
    report, rows = made(tmp_path, fact_rows(), follow_up_share=0.5)
    followed = [row for row in rows if row.history]
    assert report["derived"]["follow_ups"] == len(followed) > 5
    for row in followed:
        name = row.history[0][0][:4]
        assert row.standalone is not None
        assert row.question == row.standalone.replace(name, "它")
        assert "它" in row.question


def test_no_document_answers_on_both_sides(tmp_path: Path) -> None:
    made(tmp_path, fact_rows(), dev_share=0.3)
    sides = [read_generation_rows([tmp_path / "out" / name]) for name in OUTPUTS]
    gold = [{row.references[number - 1] for row in side for number in cited_numbers(row.answer)} for side in sides]
    assert gold[0]
    assert gold[1]
    assert not gold[0] & gold[1]


def test_unsupported_answers_and_duplicates_are_named(tmp_path: Path) -> None:
    odd = GenerationRow("月球多大？", ("食堂周末不开放。",), "直径三千四百七十四公里。")
    report, rows = made(tmp_path, [*fact_rows(), odd, fact_rows()[0]])
    assert report["duplicates"] == 1
    assert report["unsupported_answers"]["count"] == 1
    assert "rows.jsonl:17: 月球多大？" in report["unsupported_answers"]["first"][0]
    assert "月球多大？" not in [row.question for row in rows]
    write_rows(tmp_path / "odd.jsonl", [odd])
    with pytest.raises(RagProjError, match="min_support"):
        make_generation_rows([tmp_path / "odd.jsonl"], tmp_path / "none")


def test_the_same_seed_gives_the_same_bytes_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    made(tmp_path, fact_rows())
    first = (tmp_path / "out" / OUTPUTS[0]).read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        made(tmp_path, fact_rows())
    make_generation_rows([tmp_path / "rows.jsonl"], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / OUTPUTS[0]).read_bytes() == first


def test_every_row_is_told_of_while_it_is_checked_and_mixed(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    write_rows(tmp_path / "rows.jsonl", fact_rows())
    config = GenerationDataConfig(dev_share=0)
    make_generation_rows(
        [tmp_path / "rows.jsonl"], tmp_path / "out", config, progress=lambda done, stage: told.append((done, stage))
    )
    assert told == [(done, stage) for stage in ("check", "mix") for done in range(1, 17)]


def test_the_longest_shared_name() -> None:
    assert longest_shared("青龙水库建成于哪一年？", "谁管理青龙水库？") == "青龙水库"
    assert longest_shared("甲", "乙") == ""


def test_financial_rows_become_cited_ones(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "discfin_sft.jsonl").read_text(encoding="utf-8").split("\n")[:25]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = make_generation_rows([tmp_path / "rows.jsonl"], tmp_path / "out")
    assert sum(report["rows"].values()) >= 20
    # their authors were told not to copy: some sentences rest on a reference, others on general knowledge
    assert 0.2 < report["sentences"]["supported"] / report["sentences"]["count"] < 0.8
    rows = read_generation_rows([tmp_path / "out" / OUTPUTS[0]])
    assert all(cited_numbers(row.answer) <= set(range(1, len(row.references) + 1)) for row in rows)
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
