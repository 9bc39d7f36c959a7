"""Whole runs through the command line: what gains is promoted and served, what does not is refused and kept aside."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from concept_rows import concept_rows, write_concepts, write_training_yaml
from training_tasks import finished, run_command, start

from chains.bge.embeddings import BGEEmbeddings
from finetune.bge.config import BgeTrainingConfig
from finetune.bge.run import BgeTask, finetune_bge
from finetune.data.rows import read_retrieval_rows, write_rows
from finetune.doctor import DoctorError
from finetune.evaluation import evaluate_embeddings, from_rows
from finetune.measurement import set_digest
from finetune.run import Outcome
from loaders.errors import ConfigError, UsageError
from ui.cli import main

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Make:
    """Writes the config of a run, in a folder of its own."""

    def make(*, shuffled: bool = False, dialect: int = 0, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        files = write_concepts(folder, shuffled=shuffled, dialect=dialect)
        return write_training_yaml(folder, tiny_model, files, **settings)

    return make


@pytest.fixture(scope="module")
def promoted(workshop: Make) -> Path:
    """The config of a run that gained; its folder holds `run/model`."""
    config = workshop()
    assert main(["finetune", "bge", "--config", str(config)]) == 0
    return config


def run(config: Path, **options: Any) -> Outcome:
    outcome = finetune_bge(BgeTrainingConfig.read(config), **options)
    assert outcome is not None
    return outcome


# --- promoted


def test_a_run_that_gains_is_promoted_with_its_figures(promoted: Path) -> None:
    output = promoted.parent / "run"
    assert sorted(path.name for path in output.iterdir()) == ["after.json", "before.json", "model", "training.json"]
    manifest = json.loads((output / "model" / "ragproj.json").read_text(encoding="utf-8"))
    assert manifest["promoted"] is True
    gain = manifest["metrics"]["dev"]["ndcg@10"]
    assert gain["after"] > gain["before"] + 0.1
    assert gain["low"] > 0
    assert manifest["data"][0]["rows"] == sum(1 for _ in (promoted.parent / "train.jsonl").open(encoding="utf-8"))
    assert manifest["training"]["steps"] == 30
    assert [step for step, _ in manifest["training"]["scores"]] == [0, 15, 30]
    assert (output / "model" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "通过" in (output / "model" / "report.md").read_text(encoding="utf-8")


def test_the_figures_are_those_that_the_saved_model_has(promoted: Path) -> None:
    model = promoted.parent / "run" / "model"
    manifest = json.loads((model / "ragproj.json").read_text(encoding="utf-8"))
    scores = evaluate_embeddings(BGEEmbeddings(model, engine="torch"), from_rows("dev", concept_rows(150, seed=1)))
    assert scores.mean("ndcg@10") == pytest.approx(manifest["metrics"]["dev"]["ndcg@10"]["after"], abs=1e-4)


def test_the_promoted_model_serves_a_knowledge_base(
    promoted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = promoted.parent / "run" / "model"
    rows = concept_rows(12, seed=9)
    passages = tmp_path / "passages.jsonl"
    with passages.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            record = {"id": f"p{number}", "title": "知识库", "text": row.pos[0]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    served = ["embeddings._type=bge", f"embeddings.model={model}", "embeddings.engine=torch", "retriever._type=dense"]
    kb = ["--kb", str(tmp_path / "kb"), *served]
    assert main(["ingest", str(passages), *kb]) == 0
    # what the directory itself says is nearest: title and text are what is embedded
    embeddings = BGEEmbeddings(model, engine="torch")
    vectors = embeddings.embed_documents_array([f"知识库\n{row.pos[0]}" for row in rows])
    for row in rows[:4]:
        nearest = rows[int((vectors @ embeddings.embed_queries_array([row.query])[0]).argmax())].pos[0]
        capsys.readouterr()
        assert main(["search", row.query, "--json", *kb, "top_k=1"]) == 0
        assert json.loads(capsys.readouterr().out)["hits"][0]["text"] == nearest


def test_a_finished_run_says_so_and_changes_nothing(promoted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = promoted.parent / "run" / "model"
    before = (model / "ragproj.json").stat().st_mtime_ns
    assert main(["finetune", "bge", "--config", str(promoted), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["already"] is True
    assert output["model"] == str(model)
    assert (model / "ragproj.json").stat().st_mtime_ns == before


def test_a_promoted_model_is_never_written_over_by_another_run(promoted: Path) -> None:
    assert main(["finetune", "bge", "--config", str(promoted), "seed=7"]) == 2
    with pytest.raises(UsageError, match="不会被覆盖"):
        finetune_bge(BgeTrainingConfig.read(promoted, ["seed=7"]))


def test_an_adapter_is_judged_on_its_base(workshop: Make) -> None:
    outcome = run(workshop(method="lora", lora={"rank": 2}, learning_rate=5e-4, max_steps=2, query_instruction=None))
    assert (outcome.model / "adapter_config.json").is_file()
    embeddings = BGEEmbeddings(outcome.manifest["base"]["model"], adapter=outcome.model, engine="torch")
    scores = evaluate_embeddings(embeddings, from_rows("dev", concept_rows(150, seed=1)))
    assert scores.mean("ndcg@10") == pytest.approx(outcome.manifest["metrics"]["dev"]["ndcg@10"]["after"], abs=1e-4)


def test_dev_is_measured_together_with_lexical_search_where_it_is_asked_for(workshop: Make) -> None:
    outcome = finetune_bge(BgeTrainingConfig.read(workshop(max_steps=1), ["evaluation.fused=true"]))
    assert outcome is not None
    fused = outcome.manifest["fused"]
    assert fused["against_lexical"]["ndcg@10"]["difference"] == pytest.approx(
        fused["after"]["ndcg@10"] - fused["lexical"]["ndcg@10"], abs=2e-4
    )


def test_every_trained_length_is_measured_and_served(workshop: Make, caplog: pytest.LogCaptureFixture) -> None:
    outcome = run(workshop(matryoshka=[64, 32]))
    lengths = outcome.manifest["prefixes"]
    assert list(lengths) == ["64", "32"]
    assert lengths["64"]["ndcg@10"] == pytest.approx(outcome.manifest["metrics"]["dev"]["ndcg@10"], abs=1e-3)
    short = BGEEmbeddings(outcome.model, engine="torch", dimensions=32)
    assert caplog.text == ""
    scores = evaluate_embeddings(short, from_rows("dev", concept_rows(150, seed=1)))
    assert scores.mean("ndcg@10") == pytest.approx(lengths["32"]["ndcg@10"]["after"], abs=1e-4)
    assert lengths["32"]["ndcg@10"]["low"] > 0
    BGEEmbeddings(outcome.model, engine="torch", dimensions=16)
    assert "set dimensions to one of 32, 64" in caplog.text


def test_where_training_forgets_a_mixture_that_does_not_is_promoted(workshop: Make) -> None:
    config = workshop(model=str(run(workshop(dialect=1)).model), learning_rate=1e-3)
    old = config.parent / "old.jsonl"  # what the base has learnt
    write_rows(old, concept_rows(150, seed=1, dialect=1))
    outcome = finetune_bge(BgeTrainingConfig.read(config, [f"evaluation.extra.old.rows=[{old}]"]))
    assert outcome is not None
    assert outcome.promoted
    tried = {share: passed for share, _, passed in outcome.manifest["blend"]["tried"]}
    taken = outcome.manifest["blend"]["share"]
    assert not tried[0.8]  # still too much forgotten
    assert tried[taken]
    metrics = outcome.manifest["metrics"]
    assert metrics["dev"]["ndcg@10"]["low"] > 0
    assert metrics["old"]["ndcg@10"]["difference"] >= -0.01
    # the figures are those of the mixture that is served
    served = evaluate_embeddings(
        BGEEmbeddings(outcome.model, engine="torch"), from_rows("old", read_retrieval_rows([old]))
    )
    assert served.mean("ndcg@10") == pytest.approx(metrics["old"]["ndcg@10"]["after"], abs=1e-4)


# --- refused


def test_a_run_on_shuffled_labels_is_refused_and_its_candidate_kept_aside(
    workshop: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workshop(shuffled=True)
    assert main(["finetune", "bge", "--config", str(config), "--json"]) == 1
    output = json.loads(capsys.readouterr().out)
    assert output["promoted"] is False
    assert output["model"].endswith("candidate")
    assert "没有可靠的提高" in output["verdict"]["zh"]
    assert not (config.parent / "run" / "model").exists()
    assert (config.parent / "run" / "candidate" / "report.md").is_file()


def test_a_rate_too_small_to_learn_is_warned_of_and_refused(workshop: Make) -> None:
    told: list[str] = []
    outcome = run(workshop(learning_rate=1e-12, max_steps=2), tell=told.append)
    assert not outcome.promoted
    assert any("[learning_rate]" in line for line in told)
    assert {finding["name"] for finding in outcome.manifest["findings"]} == {"learning_rate", "few_steps"}


def test_checkpoints_of_a_large_dev_go_by_the_questions_that_do_not_judge(workshop: Make) -> None:
    config = workshop()
    write_rows(config.parent / "dev.jsonl", concept_rows(400, seed=1))
    task = BgeTask(BgeTrainingConfig.read(config))
    dev = task.sets["dev"]
    parts = task.dev_parts(len(dev.questions))
    assert parts.apart
    assert task.training()["dev"] == set_digest(dev.part(parts.choosing))
    assert task.measuring()["sets"]["dev"] == set_digest(dev)
    patient = BgeTask(BgeTrainingConfig.read(config, ["evaluation.patience=2"]))
    assert patient.training() != task.training()


# --- broken off


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(workshop: Make, promoted: Path) -> None:
    config = workshop(max_steps=30, checkpoint_steps=5)
    output = config.parent / "run"
    (child,) = start(run_command, ["finetune", "bge", "--config", str(config)])
    deadline = time.monotonic() + 120
    while not list((output / "checkpoints").glob("step-*")) and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    assert finished([child]) == [-signal.SIGKILL], "it ended before it could be killed"
    measured = (output / "before.json").read_bytes()
    outcome = run(config)
    assert outcome.promoted
    assert (output / "before.json").read_bytes() == measured
    unbroken = json.loads((promoted.parent / "run" / "model" / "ragproj.json").read_text(encoding="utf-8"))
    assert outcome.manifest["digest"] == unbroken["digest"]
    assert outcome.manifest["metrics"] == unbroken["metrics"]


# --- refused before it begins


def test_a_leaking_dev_set_stops_the_run_before_anything_is_written(workshop: Make) -> None:
    config = workshop()
    files = config.parent
    (files / "dev.jsonl").write_bytes((files / "train.jsonl").read_bytes())
    with pytest.raises(DoctorError, match="dev_leak"):
        run(config)
    assert not (files / "run" / "before.json").exists()
    assert main(["finetune", "bge", "--config", str(config)]) == 1


def test_a_run_without_a_dev_set_is_wrong_usage(workshop: Make) -> None:
    config = workshop(evaluation={})
    assert main(["finetune", "bge", "--config", str(config)]) == 2
    with pytest.raises(ConfigError, match=r"evaluation\.dev"):
        run(config)
