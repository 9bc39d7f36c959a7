"""Hard negatives: the window of ranks, and every guard against a passage that answers after all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bge_models import build_bert, build_reranker
from langchain_core.embeddings import Embeddings

from chains.bge.reranker import BgeReranker
from chains.embeddings import Vectors
from finetune.data.candidates import CandidateIndex
from finetune.data.mine import MiningConfig, mine
from finetune.data.questions import Passage
from finetune.data.rows import RetrievalRow, read_retrieval_rows, write_rows
from loaders.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parents[3]


class Cosines(Embeddings):
    """A passage `…@0.8` has cosine .8 with every query."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        cosines = [float(text.rpartition("@")[2]) for text in texts]
        return [[cosine, (1 - cosine**2) ** 0.5] for cosine in cosines]

    def embed_query(self, text: str) -> list[float]:
        return [1.0, 0.0]


class Lengths:
    """A reranker to which the longest text answers best."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        self.scored += [text for _, text in pairs]
        return np.asarray([len(text) for _, text in pairs], np.float32)


POSITIVE = "年假每年有十天，须在年底前休完@0.80"
OTHERS = ["报销@0.79", "转速@0.77", "保修@0.70", "加班@0.60", "出差@0.50", "住宿@0.40", "采购@0.30", "合同@0.20"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """One row over nine passages whose ranks are their order here: the positive first."""
    write_rows(tmp_path / "rows.jsonl", [RetrievalRow("年假？", (POSITIVE,)), RetrievalRow("别的？", tuple(OTHERS))])
    return tmp_path / "rows.jsonl"


def mined(rows: Path, *, model: Lengths | None = None, **settings: Any) -> tuple[RetrievalRow, dict[str, str]]:
    """(the first row with its negatives, why each passage that was refused was)."""
    out = rows.parent / "mined.jsonl"
    config = MiningConfig(**{"choose": "hardest", "negatives": 3, **settings})
    mine([rows], out, config, embeddings=Cosines(), reranker=model, overwrite=True)
    with out.with_suffix(".rejected.jsonl").open(encoding="utf-8") as file:
        rejected = [json.loads(line) for line in file]
    return read_retrieval_rows([out])[0], {
        one["passage"]: one["reason"] for one in rejected if one["query"] == "年假？"
    }


def test_the_best_ranked_below_the_margin_become_negatives(rows: Path) -> None:
    row, rejected = mined(rows)
    # 95 % of .80 is .76
    assert row.neg == ("保修@0.70", "加班@0.60", "出差@0.50")
    assert rejected == {"报销@0.79": "relative_margin", "转速@0.77": "relative_margin"}


def test_the_window_begins_and_ends_at_its_ranks(rows: Path) -> None:
    row, _ = mined(rows, first_rank=5, last_rank=6)
    assert row.neg == ("加班@0.60", "出差@0.50")
    row, rejected = mined(rows, first_rank=1, last_rank=1)
    assert (row.neg, rejected) == ((), {})  # the positive itself is neither mined nor refused


def test_a_margin_may_be_a_difference_of_cosines(rows: Path) -> None:
    row, rejected = mined(rows, relative_margin=0, absolute_margin=0.15)
    assert row.neg == ("加班@0.60", "出差@0.50", "住宿@0.40")
    assert set(rejected.values()) == {"absolute_margin"}
    assert len(rejected) == 3
    assert mined(rows, relative_margin=0)[0].neg == ("报销@0.79", "转速@0.77", "保修@0.70")


def test_passages_of_the_same_document_are_refused(rows: Path) -> None:
    write_rows(
        rows,
        [
            RetrievalRow("年假？", (POSITIVE,), pos_docs=("手册",)),
            RetrievalRow("别的？", tuple(OTHERS), pos_docs=("手册", "手册", "手册", "b", "c", "d", "e", "f")),
        ],
    )
    row, rejected = mined(rows)
    assert row.neg == ("加班@0.60", "出差@0.50", "住宿@0.40")
    assert set(rejected.values()) == {"same_document"}
    assert row.pos_docs == ("手册",)
    assert row.neg_docs == ("b", "c", "d")


def test_texts_near_to_the_positive_and_answers_to_the_same_query_are_refused(rows: Path) -> None:
    near = POSITIVE.replace("@0.80", "@0.70")
    write_rows(
        rows,
        [
            RetrievalRow("年假？", (POSITIVE,)),
            RetrievalRow("年 假？", ("假期@0.78",)),
            RetrievalRow("别的？", (near, *OTHERS[3:], " 年假每年有十天，\n须在年底前休完@0.80")),
        ],
    )
    row, rejected = mined(rows, relative_margin=0.0)
    assert row.neg == ("加班@0.60", "出差@0.50", "住宿@0.40")
    # the positive with other white space is the positive: neither mined nor refused
    assert rejected == {near: "near_text", "假期@0.78": "answers_the_same_query"}


def test_a_reranker_refuses_what_it_scores_like_the_positive(rows: Path) -> None:
    long = "报销须在返回后三十天内，由财务部审批@0.60"
    write_rows(rows, [RetrievalRow("年假？", (POSITIVE,)), RetrievalRow("别的？", (*OTHERS, long))])
    reranker = Lengths()
    row, rejected = mined(rows, model=reranker, reranker={"model": "given in Python"}, keep_scores=True)
    assert long not in row.neg
    assert rejected[long] == "reranker"
    assert len(row.neg) == 3  # another one took its place
    assert row.pos_scores == (float(len(POSITIVE)),)
    assert row.neg_scores == tuple(float(len(text)) for text in row.neg)
    assert "合同@0.20" not in reranker.scored[:8]  # only as many are scored as are needed


def test_negatives_that_are_there_count_and_stay_in_front(rows: Path) -> None:
    write_rows(rows, [RetrievalRow("年假？", (POSITIVE,), ("合同@0.20",)), RetrievalRow("别的？", tuple(OTHERS))])
    assert mined(rows)[0].neg == ("合同@0.20", "保修@0.70", "加班@0.60")
    assert mined(rows, keep=False)[0].neg == ("保修@0.70", "加班@0.60", "出差@0.50")
    assert mined(rows, negatives=1)[0].neg == ("合同@0.20",)


def test_further_passages_are_candidates(rows: Path) -> None:
    more = rows.parent / "more.jsonl"
    more.write_text('{"id": "m", "title": "别处", "text": "附录@0.75"}\n', encoding="utf-8")
    out = rows.parent / "mined.jsonl"
    mine([rows], out, MiningConfig(choose="hardest", negatives=1), passages=[more], embeddings=Cosines())
    row = read_retrieval_rows([out])[0]
    assert (row.neg, row.neg_docs) == (("别处\n附录@0.75",), ("m",))


def test_the_seed_decides_what_is_taken_from_the_window(rows: Path) -> None:
    def taken(seed: int) -> tuple[str, ...]:
        return mined(rows, choose="random", seed=seed)[0].neg

    assert taken(1) == taken(1)
    assert len({taken(seed) for seed in range(10)}) > 3
    assert all("@0.79" not in "".join(taken(seed)) for seed in range(10))


def test_the_report_counts_and_the_files_are_there(rows: Path) -> None:
    out = rows.parent / "new" / "mined.jsonl"
    report = mine([rows], out, MiningConfig(choose="hardest", negatives=7), embeddings=Cosines())
    assert report["rows"] == 2
    assert report["passages"] == 9
    # the first row gets six of eight, .79 and .77 refused; to the second only the first row's positive is left, at .80
    # above its worst answer at .20
    assert report["mined"] == 6
    assert report["rows_with_fewer"] == 2
    assert report["rejected"] == {"relative_margin": 2}
    assert report["positives_found"] == 1.0
    names = ["mined.jsonl", "mined.rejected.jsonl", "mined.report.json"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    with pytest.raises(UsageError, match="--overwrite"):
        mine([rows], out, embeddings=Cosines())


def test_a_config_that_makes_no_sense_is_refused() -> None:
    for data in ({"first_rank": 9, "last_rank": 3}, {"keep_scores": True}, {"negative": 3}):
        with pytest.raises(ConfigError):
            MiningConfig.from_dict(data, where="test")


def test_inverted_lists_find_what_exact_search_finds() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, 32))
    vectors = (centres[draw.integers(0, 40, 4000)] + 0.3 * draw.normal(size=(4000, 32))).tolist()

    class Given(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [vectors[int(text)] for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return vectors[int(text)]

    passages = [Passage(str(number), str(number), str(number)) for number in range(4000)]
    queries = [str(number) for number in range(0, 4000, 40)]
    exact = CandidateIndex(passages, Given(), exact_up_to=4000)
    lists = CandidateIndex(passages, Given(), exact_up_to=0)
    shared = 0
    for (_, one), (_, other) in zip(exact.search(queries, 20), lists.search(queries, 20), strict=True):
        assert one[0] == other[0]  # the query's own passage
        shared += len({hit.position for hit in one} & {hit.position for hit in other})
    assert shared > 0.85 * 20 * len(queries)


def test_equal_scores_rank_by_place() -> None:
    passages = [Passage(str(number), f"{number}@0.5", str(number)) for number in range(50)]
    ((_, found),) = CandidateIndex(passages, Cosines(), exact_up_to=100).search(["问"], 50)
    assert [hit.position for hit in found] == list(range(50))
    assert [hit.rank for hit in found] == list(range(1, 51))


def test_the_shipped_config_is_the_default_and_begins_with_its_run_line() -> None:
    import yaml

    path = ROOT / "finetune" / "configs" / "mine.yaml"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ragproj data mine --rows ")
    assert MiningConfig.from_dict(yaml.safe_load(text), where="mine.yaml") == MiningConfig()


def test_the_logits_of_a_real_reranker_are_kept_for_distillation(rows: Path) -> None:
    model = build_reranker(build_bert(rows.parent / "bert"), rows.parent / "reranker")
    settings = {"negatives": 2, "reranker_margin": 0.0, "keep_scores": True, "reranker": {"model": str(model)}}
    row, rejected = mined(rows, **settings)
    assert set(rejected.values()) <= {"relative_margin", "reranker"}
    wanted = BgeReranker(model=str(model)).logits([("年假？", text) for text in (*row.pos, *row.neg)])
    np.testing.assert_allclose([*(row.pos_scores or ()), *(row.neg_scores or ())], wanted, atol=1e-5)
    assert all(score < wanted[0] for score in row.neg_scores or ())
