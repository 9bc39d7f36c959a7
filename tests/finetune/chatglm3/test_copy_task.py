"""The copy task: what held-out rows hold back, what is refused, and how its model begins.

That it is learned is shown by `benchmarks.copy_task`, which takes minutes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.chatglm3.copy_task import copy_rows

torch = pytest.importorskip("torch", reason="needs the extra [models]")


def test_the_copy_task_asks_held_out_rows_for_facts_that_no_training_row_has() -> None:
    train = {text for row in copy_rows(2000, seed=1, asked=3) for text in row.references}
    asked = [row for row in copy_rows(200, seed=2, asked=3, held_out=True) if not row.refuse]
    assert asked
    for row in asked:
        cited = [row.references[int(number) - 1] for number in re.findall(r"\[(\d)\]", row.answer)]
        assert not train & set(cited)
        assert "".join(f"{text}[{row.references.index(text) + 1}]" for text in cited) == row.answer
        assert [text.split("是")[0] for text in cited] == re.findall(r"(?:^|？)(.+?)是什么", row.question)


def test_a_fact_that_is_held_out_has_no_part_that_training_lacks() -> None:
    train = {text for row in copy_rows(3000, seed=1) for text in row.references}
    held = {text for row in copy_rows(300, seed=2, held_out=True) for text in row.references} - train

    def pairs(facts: set[str]) -> set[tuple[str, str]]:
        parts = [(text[:2], text[6:8], text[8:10]) for text in facts]  # 星河 的代号是 东风 南山 。
        return {pair for name, one, two in parts for pair in ((name, one), ("", one + two), (name, "-" + two))}

    assert held
    assert pairs(held) <= pairs(train)


def test_the_copy_task_refuses_where_no_reference_has_the_name() -> None:
    refused = [row for row in copy_rows(200, seed=1, asked=3) if row.refuse]
    assert 0.15 < len(refused) / 200 < 0.35
    for row in refused:
        names = re.findall(r"(?:^|？)(.+?)的代号", row.question)
        assert not any(name in text for name in names for text in row.references)


def test_a_row_is_some_thirty_tokens_whose_facts_are_a_name_and_two_words(tiny: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "参考资料：\n\n[1]\n星河的代号是东风南山。\n\n[2]\n青石的代号是西湖北海。\n\n问题：青石的代号是什么？"
    pieces = ["▁参考资料：\n\n[1]\n", "星河的代号是", "东风", "南山", "。\n\n[2]\n", "青石的代号是", "西湖", "北海"]
    assert tokenizer.encode(text).tokens == [*pieces, "。\n\n问题：", "青石的代号是", "什么？"]
    assert tokenizer.encode("青石的代号是西湖北海。[2]").tokens == ["▁", *pieces[5:], "。[2]"]


def test_the_first_layer_begins_with_a_token_and_the_three_before_it(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    ids = torch.randint(3, 600, (8, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[0]  # (8, heads, 40, 40)
    for head in range(4):
        shares = [float(attention[:, head].diagonal(-back, 1, 2).mean()) for back in range(8)]
        assert max(range(8), key=shares.__getitem__) == head
        assert shares[head] > 0.4
