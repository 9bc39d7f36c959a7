"""The copy task: what held-out rows hold back, what is refused, how its model begins, and that it learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from generation_tasks import generation_config

from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.prompt import ChatGLM3Tokenizer
from finetune.chatglm3.copy_task import build_tiny_model, copy_rows
from finetune.chatglm3.data import read_examples
from finetune.chatglm3.evaluation import evaluate_rows, means
from finetune.chatglm3.train import train

ROWS: dict[str, Any] = {"references": (1, 3), "refusals": 0.35}

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


def test_a_model_learns_to_cite_facts_it_has_never_seen_and_to_refuse(tmp_path: Path) -> None:
    """Rows, prompt, labels, trainer, generation, parsing of citations and metrics, all in one; no weights from outside.

    `benchmarks.copy_task` does the same with more references and several questions a row.
    """
    base = build_tiny_model(tmp_path / "base", hidden=64, layers=3, context=256)
    rows = copy_rows(8000, seed=1, **ROWS)
    examples = read_examples(rows, ChatGLM3Tokenizer.from_directory(base), max_tokens=64, language="zh")
    trained = train(
        generation_config(
            base, tmp_path / "run", method="full", max_steps=800, batch_size=32, learning_rate=4e-3, warmup_share=0.05,
            batching="grouped", micro_batch_tokens=2048, gradient_checkpointing=False, checkpoint_steps=800,
        ),
        examples,
        base,
    )  # fmt: skip
    model = ChatGLM3(model=str(trained.candidate), temperature=0, max_new_tokens=12, device="cpu", dtype="float32")
    found = means(evaluate_rows(model, copy_rows(200, seed=2, held_out=True, **ROWS), language="zh", concurrency=16))
    assert min(found.values()) >= 0.95, found
