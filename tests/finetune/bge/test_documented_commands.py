"""The commands of the manual, typed one after another: labelled questions become rows, negatives, a judged model."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest

from finetune.bge.config import BgeTrainingConfig
from finetune.data import multi_doc_qa, questions
from finetune.reranker.config import RerankerTrainingConfig
from ui.cli import main

ROOT = Path(__file__).resolve().parents[3]
PAGES = ("training_data.md", "training_bge.md")
# The model of the shipped config has to be fetched; the rest makes the run short.
TINY = ["max_steps=2", "batch_size=16", "evaluation.fused=false", "lora.rank=2"]


def documented(beginning: str) -> list[str]:
    """The words of the first command of the manual that begins so, without the program's name."""
    lines = [line for page in PAGES for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(beginning)))[1:]


def write_labels(folder: Path) -> None:
    """Questions on things and their properties, each with a passage; others on the same thing are near misses."""
    draw = random.Random(0)
    words = [chr(0x4E00 + 7 * number) for number in range(200)]  # Han characters of the tiny vocabulary
    things = ["".join(draw.sample(words, 3)) for _ in range(20)]
    properties = ["".join(draw.sample(words, 3)) for _ in range(6)]
    with (
        (folder / "questions.jsonl").open("w", encoding="utf-8") as asked,
        (folder / "passages.jsonl").open("w", encoding="utf-8") as told,
    ):
        for number, (thing, name) in enumerate((thing, name) for thing in things for name in properties):
            text = f"{thing}的{name}{''.join(draw.sample(words, 12))}。"
            question = {"id": f"q{number}", "question": f"{thing}的{name}怎样？", "context_id": f"p{number}"}
            asked.write(json.dumps(question, ensure_ascii=False) + "\n")
            told.write(json.dumps({"id": f"p{number}", "title": "", "text": text}, ensure_ascii=False) + "\n")


def test_labelled_questions_become_a_judged_model_by_the_commands_of_the_manual(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_labels(tmp_path)
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")  # for `--config finetune/configs/...`
    monkeypatch.chdir(tmp_path)
    assert main(documented("ragproj data rows")) == 0
    assert main(documented("ragproj data mine")) == 0
    mined = [json.loads(line) for line in (tmp_path / "data" / "mined.jsonl").open(encoding="utf-8")]
    assert all(len(row["neg"]) >= 3 for row in mined)  # a group of the shipped configs
    training = documented("ragproj finetune bge --config finetune/configs/bge_lora.yaml")
    assert main([*training, f"model={tiny_model}", *TINY]) in (0, 1)  # promoted or refused after two steps: judged
    (manifest,) = (tmp_path / "runs" / "bge_lora").glob("*/ragproj.json")
    judged = json.loads(manifest.read_text(encoding="utf-8"))
    assert judged["data"][0]["rows"] == len(mined)
    assert judged["metrics"]["dev"]["ndcg@10"]["before"] > 0


def test_every_shipped_config_reads_what_the_conversions_and_the_mining_write() -> None:
    mined = documented("ragproj data mine")
    assert mined[mined.index("--rows") + 1] == "data/retrieval_train.jsonl"
    configs = ROOT / "finetune" / "configs"
    for config in (
        BgeTrainingConfig.read(configs / "bge_full.yaml"),
        BgeTrainingConfig.read(configs / "bge_lora.yaml"),
        RerankerTrainingConfig.read(configs / "reranker.yaml"),
    ):
        assert config.train == [Path(mined[mined.index("--out") + 1])]
        assert config.evaluation.dev is not None
        assert config.evaluation.dev.rows == [Path("data/retrieval_dev.jsonl")]
    for outputs in (multi_doc_qa.OUTPUTS, questions.OUTPUTS):
        assert {"retrieval_train.jsonl", "retrieval_dev.jsonl"} <= set(outputs)
