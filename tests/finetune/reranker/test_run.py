"""Training of a reranker: FlagEmbedding's loss, several processes, resume, directories every library opens alike."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bge_models import build_reranker
from concept_rows import concept_rows, write_concepts, write_training_yaml
from training_tasks import (
    finished,
    make_rows,
    reranker_config,
    run_command,
    start,
    train_reranker_and_die,
    train_reranker_and_record,
)

from chains.bge.directory import ModelDirectoryError, read_model_directory
from chains.lora import base_mark
from finetune.data.rows import RetrievalRow
from finetune.reranker.config import RerankerTrainingConfig
from finetune.reranker.model import PairScorer, load_cross_encoder
from finetune.reranker.run import RerankerTask, finetune_reranker
from finetune.reranker.train import group_loss, train
from finetune.training_loop import TrainingError
from ui.cli import main

BGE_ONLY = ("temperature", "query_max_tokens", "passage_max_tokens", "query_instruction")


def write_config(folder: Path, base: Path, **settings: Any) -> Path:
    path = write_training_yaml(folder, base, write_concepts(folder), **settings)
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in BGE_ONLY:
        del content[key]
    path.write_text(json.dumps({**content, "max_tokens": 24}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The candidate of a short training."""
    output = tmp_path_factory.mktemp("run")
    train(reranker_config(tiny_encoder, output), concept_rows(16, seed=3), read_model_directory(tiny_encoder))
    return output / "candidate"


PAIRS = [(row.query, text) for row in concept_rows(6, seed=8) for text in (*row.pos, *row.neg)]


def our_scores(directory: Path) -> Any:
    read = read_model_directory(directory)
    model = load_cross_encoder(read, seed=0, device="cpu")
    return PairScorer(model, read, max_tokens=32, device="cpu").score(PAIRS)


def test_the_loss_of_every_step_is_flagembeddings(tiny_encoder: Path, tmp_path: Path) -> None:
    import torch
    from FlagEmbedding.finetune.reranker.encoder_only.base.modeling import CrossEncoderModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # one negative a row: nothing is drawn
    rows = [RetrievalRow(row.query, row.pos, row.neg[:1]) for row in concept_rows(4, seed=3)]
    directory = read_model_directory(tiny_encoder)
    config = reranker_config(
        tiny_encoder, tmp_path / "run", group_size=2, max_steps=20, weight_decay=0.0, max_grad_norm=None,
        warmup_share=0.0, learning_rate=1e-4,
    )  # fmt: skip
    ours = train(config, rows, directory).losses

    torch.manual_seed(config.seed)  # for the new head
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_encoder), num_labels=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_encoder))
    theirs = CrossEncoderModel(model, tokenizer=tokenizer, train_batch_size=4).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0)
    expected = []
    for step in range(20):
        # the order of rows in a batch does not change their mean
        pairs = [(row.query, text) for row in rows for text in (*row.pos, *row.neg)]
        batch = tokenizer([q for q, _ in pairs], [p for _, p in pairs], padding=True, return_tensors="pt")
        loss = theirs(pair=batch).loss
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (20 - step) / 20  # transformers' linear schedule without warm-up
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert ours == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


def test_distillation_adds_flagembeddings_term() -> None:
    import torch
    from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel

    scores = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, 0.1]])
    teacher = torch.tensor([[3.0, 1.0, 0.5], [2.0, -1.0, 0.0]])

    class Given(AbsRerankerModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.train_batch_size, self.cross_entropy = 2, torch.nn.CrossEntropyLoss()

        def encode(self, features: Any) -> Any:
            return scores.reshape(-1, 1)

    expected = Given().train()(pair=None, teacher_scores=teacher.flatten().tolist()).loss
    assert float(group_loss(scores, teacher)) == pytest.approx(float(expected), abs=1e-6)


def test_rows_without_scores_or_negatives_are_named_before_anything_is_loaded(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = [*make_rows(3), RetrievalRow("问题", ("答案",), ("别的",), file="rows.jsonl", line=9)]
    directory = read_model_directory(tiny_encoder)
    with pytest.raises(TrainingError, match=r"1 rows have no pos_scores and neg_scores.*: rows\.jsonl:9"):
        train(reranker_config(tiny_encoder, tmp_path, distillation=True), rows, directory)
    with pytest.raises(TrainingError, match=r"1 rows have no neg.*: rows\.jsonl:4"):
        alone = RetrievalRow("问题", ("答案",), file="rows.jsonl", line=4)
        train(reranker_config(tiny_encoder, tmp_path), [*rows, alone], directory)


def test_flagembedding_and_sentence_transformers_score_the_directory_as_we_do(trained: Path) -> None:
    import torch
    from FlagEmbedding import FlagReranker
    from sentence_transformers import CrossEncoder

    ours = our_scores(trained)
    flag = FlagReranker(str(trained), use_fp16=False, devices="cpu").compute_score(PAIRS, max_length=32)
    assert np.allclose(ours, flag, atol=1e-4)
    crossed = CrossEncoder(str(trained), device="cpu", max_length=32)
    raw = crossed.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.allclose(ours, raw, atol=1e-4)


def test_a_broken_off_training_ends_with_the_same_weights(trained: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    def cut(event: Any) -> None:
        if event.step == 3:
            raise PowerCutError

    config = reranker_config(tiny_encoder, tmp_path, checkpoint_steps=2)
    rows, directory = concept_rows(16, seed=3), read_model_directory(tiny_encoder)
    with pytest.raises(PowerCutError):
        train(config, rows, directory, observe=cut)
    assert train(config, rows, directory).steps == 4
    assert np.allclose(our_scores(tmp_path / "candidate"), our_scores(trained), atol=1e-6)


def test_two_processes_killed_and_started_again_learn_what_one_learns(tiny_encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    # the last batch of an epoch has two rows: one a process
    rows, settings = make_rows(10), {"checkpoint_steps": 2, "distillation": True}
    killed = finished(start(train_reranker_and_die, tiny_encoder, tmp_path / "two", rows, settings, processes=2))
    assert killed[0] == -signal.SIGKILL
    assert killed[1] not in (0, -signal.SIGKILL)  # it is told that the other is gone
    again = start(train_reranker_and_record, tiny_encoder, tmp_path / "two", rows, settings, processes=2)
    train_reranker_and_record(tiny_encoder, tmp_path / "one", rows, settings)
    assert finished(again) == [0, 0]
    one, two = (json.loads((tmp_path / run / "record.json").read_text(encoding="utf-8")) for run in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    # Adam moves as far with twice the gradient: its norm tells that it is the mean's. The first two steps are before.
    assert two["norms"] == pytest.approx(one["norms"][2:], rel=1e-4)
    left, right = (load_file(tmp_path / run / "candidate" / "model.safetensors") for run in ("one", "two"))
    for name, weights in left.items():
        # What softmax does not see has no gradient but rounding, which Adam brings to full size.
        if not name.endswith(("key.bias", "classifier.bias")):
            assert float((weights - right[name]).abs().max()) < 1e-5, name


def test_the_command_in_two_processes_trains_one_model_that_the_first_judges(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_encoder, group_size=3, max_steps=2)
    assert finished(start(run_command, ["finetune", "reranker", "--config", str(config)], processes=2)) == [1, 0]
    (manifest,) = (tmp_path / "run").glob("*/ragproj.json")
    found = json.loads(manifest.read_text(encoding="utf-8"))
    alone = finetune_reranker(RerankerTrainingConfig.read(config, [f"output={tmp_path / 'alone'}"]))
    assert alone is not None
    losses, expected = (np.asarray(content["training"]["losses"]) for content in (found, alone.manifest))
    assert np.allclose(losses, expected, atol=1e-4)
    after, judged = (content["metrics"]["dev"]["ndcg@10"] for content in (found, alone.manifest))
    assert after == pytest.approx(judged, abs=0.02)


def test_a_run_that_learns_to_order_is_promoted(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_encoder, group_size=3, max_steps=40, learning_rate=2e-3)
    assert main(["finetune", "reranker", "--config", str(config), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["kind"] == "reranker"
    gain = output["metrics"]["dev"]["ndcg@10"]
    assert gain["low"] > 0
    again = finetune_reranker(RerankerTrainingConfig.read(config))
    assert again is not None
    assert again.already


def test_a_run_that_learns_nothing_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_encoder, group_size=3, max_steps=1, learning_rate=1e-12)
    outcome = finetune_reranker(RerankerTrainingConfig.read(config))
    assert outcome is not None
    assert not outcome.promoted
    assert outcome.model.name == "candidate"
    assert outcome.manifest["base"] == {"model": str(tiny_encoder), "digest": base_mark(tiny_encoder)}
    found = outcome.manifest["against_found"]["dev"]["recall@1"]
    # one right passage of three: 1/3 +- 3 standard deviations of sqrt(2/9 / 150) = 0.038
    assert found["before"] == pytest.approx(1 / 3, abs=0.12)
    assert outcome.manifest["metrics"]["dev"]["recall@1"]["before"] == found["before"]


def test_a_base_without_a_head_leaves_candidates_as_found_and_one_with_a_head_puts_them_in_order(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    plain = RerankerTask(RerankerTrainingConfig.read(write_config(tmp_path, tiny_encoder, group_size=3)))
    assert plain.measure(None, fused=False).sets == plain.found()
    base = build_reranker(tiny_encoder, tmp_path / "reranker")
    ranking = RerankerTask(RerankerTrainingConfig.read(write_config(tmp_path, base, group_size=3)))
    assert ranking.found() == plain.found()
    assert ranking.measure(None, fused=False).sets != plain.found()


def test_measurements_of_pairs_that_are_cut_elsewhere_are_told_apart(tiny_encoder: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_encoder, group_size=3)
    task, shorter = (RerankerTask(RerankerTrainingConfig.read(path, [f"max_tokens={n}"])) for n in (24, 16))
    assert shorter.measuring() != task.measuring()
    patient = RerankerTask(RerankerTrainingConfig.read(path, ["max_tokens=24", "evaluation.patience=2"]))
    assert patient.measuring() == task.measuring()
    assert patient.training() != task.training()


@pytest.mark.parametrize(("lost", "head"), [("encoder.layer.1.output.dense.weight", False), ("pooler.dense", True)])
def test_missing_weights_are_an_error_unless_all_of_the_head_is_missing(
    tiny_encoder: Path, tmp_path: Path, lost: str, head: bool
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    build_reranker(tiny_encoder, base) if head else shutil.copytree(tiny_encoder, base)
    tensors = {name: value for name, value in load_file(base / "model.safetensors").items() if lost not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelDirectoryError, match=f"no weights for .*{lost}"):
        load_cross_encoder(read_model_directory(base), seed=0, device="cpu")
