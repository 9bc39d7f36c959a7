"""Training against FlagEmbedding, across processes, through a kill, and what it writes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from concept_rows import write_concepts, write_training_yaml
from langchain_core.embeddings import Embeddings
from safetensors.torch import load_file
from training_tasks import (
    finished,
    make_rows,
    reference_losses,
    reference_losses_of_two,
    run_command,
    start,
    train_and_die,
    train_and_record,
    training_config,
)

from chains.bge.directory import read_model_directory
from chains.bge.embeddings import BGEEmbeddings
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.run import finetune_bge
from finetune.bge.train import rows_digest, schedule_of, train
from finetune.data.rows import RetrievalRow
from finetune.training_loop import TrainingError

TWENTY: dict[str, Any] = {"max_steps": 20, "dropout": 0.0}
TEXTS = ["备份知识库怎样做", "向量模型检索", "文档问题答案" * 4]


def weights(candidate: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (candidate / "adapter_config.json").exists() else "model.safetensors"
    return load_file(candidate / name)


def largest_difference(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def vectors(embeddings: Embeddings) -> np.ndarray[Any, Any]:
    return np.asarray(embeddings.embed_documents(TEXTS))


def largest_vector_difference(one: Path, other: Path) -> float:
    """Between vectors: the biases of keys have no gradient but rounding, which Adam brings to full size."""
    left, right = (vectors(BGEEmbeddings(model=candidate, engine="torch")) for candidate in (one, other))
    return float(np.abs(left - right).max())


# --- the same as FlagEmbedding


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="in-batch"),
        pytest.param({"distillation": True, "matryoshka": [16, 64]}, id="distillation and Matryoshka"),
        pytest.param({"in_batch_negatives": False, "graph_tokens": 200}, id="group alone, cached"),
    ],
)
def test_twenty_steps_lose_what_flagembedding_loses(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = make_rows(60)
    reference_losses(tiny_model, tmp_path, rows, TWENTY | settings)
    result = train(training_config(tiny_model, tmp_path, **TWENTY | settings), rows)
    expected = json.loads((tmp_path / "reference.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(result.losses, expected, atol=1e-4)
    assert result.losses[-1] < result.losses[0]  # and it learned something


def test_two_processes_lose_what_flagembeddings_two_lose(tiny_model: Path, tmp_path: Path) -> None:
    # AdamW hardly feels that their averaged gradient is half of ours; scaling to a norm would
    settings, rows = {**TWENTY, "max_grad_norm": None}, make_rows(60)
    theirs = start(reference_losses_of_two, tiny_model, tmp_path / "theirs", rows, settings)
    ours = start(train_and_record, tiny_model, tmp_path / "ours", rows, settings, processes=2)
    assert finished([*theirs, *ours]) == [0, 0, 0]
    expected = json.loads((tmp_path / "theirs" / "reference.json").read_text(encoding="utf-8"))
    found = json.loads((tmp_path / "ours" / "losses.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # two processes that share a batch are one process with the whole batch
    alone = train(training_config(tiny_model, tmp_path / "alone", **settings), rows)
    np.testing.assert_allclose(alone.losses, found, atol=1e-4)
    assert largest_vector_difference(alone.candidate, tmp_path / "ours" / "candidate") < 1e-4


def test_two_processes_without_shared_negatives_average_their_losses(tiny_model: Path, tmp_path: Path) -> None:
    rows = make_rows(16)
    settings = {"max_steps": 2, "dropout": 0.0, "in_batch_negatives": False}
    assert finished(start(train_and_record, tiny_model, tmp_path / "two", rows, settings, processes=2)) == [0, 0]
    alone = train(training_config(tiny_model, tmp_path / "alone", **settings), rows)
    assert largest_vector_difference(alone.candidate, tmp_path / "two" / "candidate") < 1e-5


def test_the_command_in_two_processes_trains_one_model_that_the_first_judges(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "evaluation": {"dev": {"rows": [str(tmp_path / "dev.jsonl")]}, "fused": False}}
    files = write_concepts(tmp_path)
    two = write_training_yaml(tmp_path, tiny_model, files, **settings)
    assert finished(start(run_command, ["finetune", "bge", "--config", str(two)], processes=2)) in ([0, 0], [1, 0])
    (manifest,) = (tmp_path / "run").glob("*/ragproj.json")
    found = json.loads(manifest.read_text(encoding="utf-8"))
    alone = finetune_bge(BgeTrainingConfig.read(two, [f"output={tmp_path / 'alone'}"]))
    assert alone is not None
    # sums in another order: the same but for rounding
    for (step, loss), (expected_step, expected) in zip(
        found["training"]["losses"], alone.manifest["training"]["losses"], strict=True
    ):
        assert step == expected_step
        assert loss == pytest.approx(expected, abs=1e-3)
    for name, value in alone.manifest["metrics"]["dev"]["ndcg@10"].items():
        assert found["metrics"]["dev"]["ndcg@10"][name] == pytest.approx(value, abs=0.02), name


# --- resume


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_and_resumed_ends_with_the_same_weights(tiny_model: Path, tmp_path: Path, method: str) -> None:
    rows, settings = make_rows(40), {"max_steps": 12, "method": method, "checkpoint_steps": 4}
    killed = start(train_and_die, tiny_model, tmp_path / "killed", rows, settings, 7)
    unbroken = train(training_config(tiny_model, tmp_path / "unbroken", **settings), rows)
    assert finished(killed) == [-signal.SIGKILL]
    steps: list[int] = []
    config = training_config(tiny_model, tmp_path / "killed", **settings)
    resumed = train(config, rows, observe=lambda event: steps.append(event.step))
    assert steps == list(range(5, 13))  # on from the checkpoint after step 4
    assert resumed.losses == unbroken.losses
    assert largest_difference(resumed.candidate, unbroken.candidate) == 0.0


# --- evaluation in between


class Scripted:
    """An evaluation that returns what it is told, and remembers the vectors it saw."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores
        self.seen: list[np.ndarray[Any, Any]] = []

    def __call__(self, embeddings: Embeddings) -> float:
        self.seen.append(vectors(embeddings))
        return self.scores[len(self.seen) - 1]


def test_the_candidate_is_the_best_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    evaluate = Scripted([0.1, 0.5, 0.9, 0.3])
    config = training_config(tiny_model, tmp_path, evaluation={"every_steps": 2})
    result = train(config, make_rows(40), evaluate=evaluate)
    assert result.scores == ((0, 0.1), (2, 0.5), (4, 0.9), (6, 0.3))
    assert result.best_step == 4
    served = vectors(BGEEmbeddings(model=result.candidate, engine="torch"))
    np.testing.assert_allclose(served, evaluate.seen[2], atol=1e-5)
    assert np.abs(evaluate.seen[0] - evaluate.seen[2]).max() > 1e-3  # the model did change


# --- what is written


def test_the_candidate_gives_the_same_vectors_in_every_library(tiny_model: Path, tmp_path: Path) -> None:
    from FlagEmbedding import FlagModel
    from sentence_transformers import SentenceTransformer

    candidate = train(training_config(tiny_model, tmp_path), make_rows(40)).candidate
    ours = vectors(BGEEmbeddings(model=candidate, engine="torch"))
    flag = FlagModel(str(candidate), use_fp16=False, devices="cpu").encode(TEXTS)
    sentence = SentenceTransformer(str(candidate), device="cpu").encode(TEXTS)
    for theirs in (flag, sentence):
        assert np.sum(ours * theirs, axis=1).min() >= 0.9999


def test_flagembeddings_own_directory_can_be_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    from bge_models import without_modules

    plain = without_modules(tiny_model, tmp_path / "plain")
    one, other = (
        train(training_config(model, tmp_path / name, max_steps=2), make_rows(16))
        for name, model in (("a", plain), ("b", tiny_model))
    )
    assert largest_difference(one.candidate, other.candidate) == 0.0
    assert (one.candidate / "modules.json").is_file()


def test_an_adapter_names_its_base_and_equals_the_merged_model(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    candidate = train(training_config(tiny_model, tmp_path, method="lora"), make_rows(40)).candidate
    settings = json.loads((candidate / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(tiny_model)
    base = vectors(BGEEmbeddings(model=tiny_model, engine="torch"))
    adapted = vectors(BGEEmbeddings(model=tiny_model, adapter=candidate, engine="torch"))
    assert np.abs(adapted - base).max() > 1e-3
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(candidate)).eval()
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(candidate)).merge_and_unload().eval()
    directory = read_model_directory(tiny_model)
    unmerged = vectors(BGEEmbeddings.from_encoder(loaded, directory))
    np.testing.assert_allclose(unmerged, vectors(BGEEmbeddings.from_encoder(merged, directory)), atol=1e-5)
    np.testing.assert_allclose(unmerged, adapted, atol=1e-5)


def test_a_query_instruction_of_its_own_is_served_afterwards(tiny_model: Path, tmp_path: Path) -> None:
    config = training_config(tiny_model, tmp_path, query_instruction="检索：", max_steps=1)
    candidate = train(config, make_rows(16)).candidate
    assert read_model_directory(candidate).query_instruction == "检索："


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"micro_batch_tokens": 64}, {"graph_tokens": 0}]
)
def test_ways_to_save_memory_do_not_change_what_is_learned(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = make_rows(40)
    plain = train(training_config(tiny_model, tmp_path / "plain", dropout=0.0), rows)
    saving = train(training_config(tiny_model, tmp_path / "saving", dropout=0.0, **settings), rows)
    np.testing.assert_allclose(saving.losses, plain.losses, atol=1e-4)


def test_bfloat16_loses_nearly_the_same(tiny_model: Path, tmp_path: Path) -> None:
    rows = make_rows(40)
    plain = train(training_config(tiny_model, tmp_path / "plain", dropout=0.0), rows)
    half = train(training_config(tiny_model, tmp_path / "half", dropout=0.0, precision="bf16"), rows)
    np.testing.assert_allclose(half.losses, plain.losses, rtol=0.1)
    assert half.losses != plain.losses  # it was not float32 after all


def test_embeddings_learn_at_a_rate_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "learning_rate": 1e-3, "embedding_rate": 10.0, "weight_decay": 0.0}
    after = weights(train(training_config(tiny_model, tmp_path, **settings), make_rows(16)).candidate)
    before = weights(tiny_model)
    for name, rate in {
        "embeddings.word_embeddings.weight": 1e-2,
        "encoder.layer.0.intermediate.dense.weight": 1e-3,
    }.items():
        # the first step has a rate of zero; in the second Adam moves what has a steady gradient by the rate
        assert float((after[name] - before[name]).abs().max()) == pytest.approx(rate, rel=0.1), name


# --- what does not fit together


@pytest.mark.parametrize(("rows", "batch_size"), [(40, 8), (2, 9)])
def test_a_batch_that_the_processes_cannot_share_evenly_is_refused(rows: int, batch_size: int) -> None:
    config = training_config(Path("m"), Path("o"), batch_size=batch_size, max_steps=6)
    assert schedule_of(config, rows, 1).steps == 6
    with pytest.raises(TrainingError, match=f"{rows} rows in batches of {batch_size} cannot be shared by 3 processes"):
        schedule_of(config, rows, 3)


def test_rows_without_negatives_are_named() -> None:
    rows = [RetrievalRow("q", ("p",), (), file="a.jsonl", line=7)]
    with pytest.raises(TrainingError, match=r"a\.jsonl:7"):
        check_rows(rows, group_size=2)
    check_rows(rows, group_size=1)


def test_rows_without_scores_are_named() -> None:
    with pytest.raises(TrainingError, match=r"a\.jsonl:7.*score them first"):
        check_rows([RetrievalRow("q", ("p",), ("n",), file="a.jsonl", line=7)], distillation=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"matryoshka": [32, 128]}, "128"), ({"passage_max_tokens": 600}, "600")],
)
def test_lengths_the_model_does_not_have_are_refused(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train(training_config(tiny_model, tmp_path, **settings), make_rows(8))


def check_rows(rows: list[RetrievalRow], **settings: Any) -> None:
    from chains.bge.directory import ModelDirectory
    from finetune.bge.train import check

    directory = ModelDirectory(Path("m"), "bert", 64, 2, "cls", True, "", 512, False)
    check(training_config(Path("m"), Path("o"), **settings), rows, directory)


def test_a_change_in_any_part_of_a_row_changes_the_digest() -> None:
    rows = make_rows(3)
    assert rows_digest(rows) == rows_digest(make_rows(3))
    assert rows_digest(rows) != rows_digest(rows[::-1])
