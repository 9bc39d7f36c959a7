"""What is measured of one model: shortened vectors, parts of dev, and what is kept between the stages of a run."""

from __future__ import annotations

import json

import numpy as np
from langchain_core.embeddings import Embeddings

from chains.lexical_embeddings import LexicalEmbeddings
from finetune.data.rows import RetrievalRow
from finetune.evaluation import evaluate_embeddings, from_rows
from finetune.gate import DEV
from finetune.measurement import Measured, measure

WORDS = ["备份", "导入", "检索", "安装", "升级", "删除", "监听", "密码", "显卡", "引用"]
SETS = {
    name: from_rows(name, [RetrievalRow(f"怎样{word}？", (f"{word}的步骤在这里。",)) for word in words])
    for name, words in ((DEV, WORDS), ("news", WORDS[:3]))
}


class FirstNumbers(Embeddings):
    """The lexical vectors' first numbers; the chain brings them to unit length itself."""

    def __init__(self, length: int) -> None:
        self.whole, self.length = LexicalEmbeddings(), length

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [vector[: self.length] for vector in self.whole.embed_documents(texts)]

    def embed_query(self, text: str) -> list[float]:
        return self.whole.embed_query(text)[: self.length]


def test_a_prefix_scores_as_an_embedder_of_that_length() -> None:
    found = measure(LexicalEmbeddings(), SETS, fused=False, prefixes=[1024, 8])
    assert found.prefixes[8] == evaluate_embeddings(FirstNumbers(8), SETS[DEV])
    assert found.prefixes[1024] == found.sets[DEV]
    assert found.prefixes[8] != found.sets[DEV]


def test_nothing_is_searched_by_prefixes_that_are_not_asked_for() -> None:
    assert measure(LexicalEmbeddings(), SETS, fused=False).prefixes == {}


def test_a_part_of_dev_is_a_part_of_its_prefixes() -> None:
    found = measure(LexicalEmbeddings(), SETS, fused=False, prefixes=[8])
    part = found.on_dev([2, 5])
    assert part.prefixes[8] == found.prefixes[8].part([2, 5])
    assert np.array_equal([scores.questions for scores in (part.prefixes[8], part.sets["news"])], [2, 3])


def test_what_is_kept_comes_back_the_same() -> None:
    found = measure(LexicalEmbeddings(), SETS, fused=True, prefixes=[8, 16])
    assert Measured.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_measurements_kept_before_prefixes_were_measured_have_none() -> None:
    kept = measure(LexicalEmbeddings(), SETS, fused=False).as_dict()
    del kept["prefixes"]
    assert Measured.from_dict(kept).prefixes == {}
