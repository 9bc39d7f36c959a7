"""The stages around a training, with a task whose scores are given: what is repeated, refused, mixed, promoted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.bge.config import BgeTrainingConfig
from finetune.data.rows import RetrievalRow
from finetune.distributed import Processes
from finetune.doctor import DoctorError, Finding, Monitor
from finetune.evaluation import METRICS, Scores
from finetune.gate import GateConfig
from finetune.measurement import Measured
from finetune.run import MIXTURE, MODEL, Task, conclude, finished, run, run_together, set_sections
from finetune.training_loop import CANDIDATE, Observe, TrainingEvent, TrainingResult
from loaders.errors import ConfigError, UsageError


class GivenTask(Task):
    """Of a hundred questions, how many are right on each set is given for the share of the tuned weights.

    `times` says how often the hundred are asked.
    """

    kind = "bge"

    def __init__(self, folder: Path, right: dict[str, dict[float, int]], **settings: Any) -> None:
        self.told: list[str] = []
        super().__init__(observe=None, tell=self.told.append)
        self.right = right
        self.base = folder / "base"
        self.base.mkdir(exist_ok=True)
        write_share(self.base, 0.0)
        file = folder / "train.jsonl"
        file.write_text('{"query": "q", "pos": ["p"], "neg": []}\n', encoding="utf-8")
        self.rows = [RetrievalRow("q", ("p",), file=str(file), line=1)]
        self.sampled = dict.fromkeys(right, False)
        self.findings: list[Finding] = settings.pop("findings", [])
        self.losses: list[float] = settings.pop("losses", [2.0, 1.0])
        self.times: int = settings.pop("times", 1)
        self.done: list[str] = []
        self.config = BgeTrainingConfig(model="base", output=folder / "run", train=[file], **settings)

    def training(self) -> dict[str, Any]:
        return {"learning_rate": self.config.learning_rate}

    def measuring(self) -> dict[str, Any]:
        return {"sets": sorted(self.right)}

    def examine(self) -> list[Finding]:
        return self.findings

    def measure(self, tuned: Path | None, *, fused: bool) -> Measured:
        share = float(load_file((tuned or self.base) / "model.safetensors")["share"])
        self.done.append(f"measure {share:g}")
        sets = {}
        for name, right in self.right.items():
            values = ((1.0,) * right[share] + (0.0,) * (100 - right[share])) * self.times
            sets[name] = Scores(dict.fromkeys(METRICS, values), passages=100)
        return Measured(sets)

    def train(self, observe: Observe, monitor: Monitor | None) -> TrainingResult:
        self.done.append("train")
        for step, loss in enumerate(self.losses, 1):
            observe(TrainingEvent(step, len(self.losses), loss=loss, gradient_norm=1.0))
        candidate = self.output / CANDIDATE
        self.mix(1.0, candidate)
        (self.output / "checkpoints").mkdir(exist_ok=True)
        return TrainingResult(candidate, 2, 2, tuple(self.losses), ((0, 0.1), (2, 0.2)), 2, 1.5, 10.0)

    def mix(self, share: float, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        write_share(target, share)


def write_share(folder: Path, share: float) -> None:
    """Weights that are the share of the tuned ones."""
    save_file({"share": np.array(share)}, folder / "model.safetensors")


class PowerCutError(Exception):
    """Breaks a run off."""


def _cut(*_: object, **__: object) -> None:
    raise PowerCutError


GAINS = {"dev": {0.0: 40, 1.0: 70}}
NOTHING = {"dev": {0.0: 40, 1.0: 40}}
FORGETS = {
    "dev": {0.0: 40, 0.2: 45, 0.4: 55, 0.6: 60, 0.8: 65, 1.0: 70},
    "news": {0.0: 90, 0.2: 90, 0.4: 90, 0.6: 89, 0.8: 85, 1.0: 70},
}


def test_what_gains_is_promoted_by_renaming_and_checkpoints_go(tmp_path: Path) -> None:
    task = GivenTask(tmp_path, GAINS)
    outcome = run(task)
    assert outcome.promoted
    assert outcome.model == task.output / MODEL
    assert sorted(path.name for path in task.output.iterdir()) == [
        "after.json",
        "before.json",
        "model",
        "training.json",
    ]
    assert task.done == ["measure 0", "train", "measure 1"]
    assert outcome.manifest["metrics"]["dev"]["ndcg@10"]["difference"] == 0.3
    assert outcome.manifest["data"][0]["rows"] == 1


def test_what_does_not_gain_is_kept_aside_as_the_candidate(tmp_path: Path) -> None:
    task = GivenTask(tmp_path, NOTHING)
    outcome = run(task)
    assert not outcome.promoted
    assert outcome.model == task.output / CANDIDATE
    assert not (task.output / MODEL).exists()


def test_a_finished_run_is_recognised_by_all_that_decided_it(tmp_path: Path) -> None:
    run(GivenTask(tmp_path, GAINS))
    again = finished(GivenTask(tmp_path, GAINS))
    assert again is not None
    assert again.already
    assert again.promoted


def test_a_promoted_model_is_never_written_over(tmp_path: Path) -> None:
    run(GivenTask(tmp_path, GAINS))
    with pytest.raises(UsageError, match="不会被覆盖"):
        finished(GivenTask(tmp_path, GAINS, learning_rate=2.0))


def test_another_gate_judges_the_same_weights_without_training_again(tmp_path: Path) -> None:
    strict = GivenTask(tmp_path, GAINS, gate=GateConfig(min_gain=0.5))
    assert not run(strict).promoted
    lenient = GivenTask(tmp_path, GAINS)
    assert finished(lenient) is None
    assert run(lenient).promoted
    assert lenient.done == []


def test_a_refused_candidate_is_moved_aside_for_another_training(tmp_path: Path) -> None:
    run(GivenTask(tmp_path, NOTHING))
    task = GivenTask(tmp_path, GAINS, learning_rate=2.0)
    run(task)
    assert "train" in task.done
    (aside,) = task.output.glob("candidate-*")
    assert json.loads((aside / "ragproj.json").read_text(encoding="utf-8"))["promoted"] is False


@pytest.mark.parametrize("stage", ["train", "measure 1"])
def test_a_run_broken_off_goes_on_at_the_stage_it_had_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("finetune.run._after" if stage == "train" else "finetune.run.write_report", _cut)
        with pytest.raises(PowerCutError):
            run(GivenTask(tmp_path, GAINS))
    task = GivenTask(tmp_path, GAINS)
    assert run(task).promoted
    assert task.done == (["measure 1"] if stage == "train" else [])


def test_a_model_that_was_judged_but_not_yet_moved_is_promoted_when_the_run_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("finetune.run.conclude", lambda _, outcome: outcome)
        assert run(GivenTask(tmp_path, GAINS)).model.name == CANDIDATE
    task = GivenTask(tmp_path, GAINS)
    outcome = finished(task)
    assert outcome is not None
    assert conclude(task, outcome).model == task.output / MODEL
    assert (task.output / MODEL / "ragproj.json").is_file()


def test_where_it_forgets_the_best_mixture_that_passes_is_promoted(tmp_path: Path) -> None:
    task = GivenTask(tmp_path, FORGETS)
    outcome = run(task)
    assert outcome.promoted
    assert load_file(outcome.model / "model.safetensors")["share"] == 0.6
    assert outcome.manifest["blend"]["share"] == 0.6
    assert [passed for _, _, passed in outcome.manifest["blend"]["tried"]] == [False, True, True, True]
    assert outcome.manifest["metrics"]["news"]["ndcg@10"]["after"] == 0.89
    assert "与底座权重混合" in (outcome.model / "report.md").read_text(encoding="utf-8")
    assert (task.output / CANDIDATE).is_dir()  # as it was trained


def test_a_large_dev_is_judged_on_the_questions_that_chose_nothing(tmp_path: Path) -> None:
    outcome = run(GivenTask(tmp_path, FORGETS, times=5))
    assert outcome.manifest["blend"]["share"] == 0.6
    dev = outcome.manifest["metrics"]["dev"]
    assert dev["questions"] == 250
    assert outcome.manifest["metrics"]["news"]["questions"] == 500
    # of each half about 40 % and 60 %, as of the whole; the other half's mean is that of what chose
    chosen = {share: mean for share, mean, _ in outcome.manifest["blend"]["tried"]}[0.6]
    assert (dev["ndcg@10"]["after"] + chosen) / 2 == pytest.approx(0.6, abs=1e-4)
    assert "250 other questions of dev" in outcome.manifest["verdict"]["en"]
    assert "另外 250 个问题挑选" in (outcome.model / "report.md").read_text(encoding="utf-8")


def test_the_order_before_a_reranker_is_compared_on_the_same_questions(tmp_path: Path) -> None:
    class Ordering(GivenTask):
        def found(self) -> dict[str, Scores]:
            return dict(self.measure(None, fused=False).sets)

    outcome = run(Ordering(tmp_path, GAINS, times=5))
    figures = outcome.manifest["against_found"]["dev"]["ndcg@10"]
    assert figures["after"] == outcome.manifest["metrics"]["dev"]["ndcg@10"]["after"]
    assert figures["before"] == outcome.manifest["metrics"]["dev"]["ndcg@10"]["before"]


def test_a_small_dev_that_chose_and_judged_is_told_with_the_verdict(tmp_path: Path) -> None:
    outcome = run(GivenTask(tmp_path, GAINS))
    assert "dev 只有 100 个问题" in outcome.manifest["verdict"]["zh"]
    assert "the interval flatters" in (outcome.model / "report.md").read_text(encoding="utf-8")


def test_where_no_mixture_passes_the_candidate_itself_is_refused(tmp_path: Path) -> None:
    right = {"dev": FORGETS["dev"], "news": {share: 50 if share else 90 for share in FORGETS["news"]}}
    task = GivenTask(tmp_path, right)
    outcome = run(task)
    assert not outcome.promoted
    assert outcome.model == task.output / CANDIDATE
    assert outcome.manifest["blend"]["share"] is None
    assert not (task.output / MIXTURE).exists()


def test_mixtures_are_not_tried_where_they_are_switched_off(tmp_path: Path) -> None:
    outcome = run(GivenTask(tmp_path, FORGETS, gate=GateConfig(blend=False)))
    assert not outcome.promoted
    assert outcome.manifest["blend"] is None


def test_an_error_found_before_the_run_stops_it_before_anything_is_written(tmp_path: Path) -> None:
    task = GivenTask(tmp_path, GAINS, findings=[Finding("dev_leak", "error", "泄漏", "leak")])
    with pytest.raises(DoctorError, match="dev_leak"):
        run(task)
    assert not task.output.exists()


def test_an_error_found_while_training_stops_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(DoctorError, match=r"\[not_a_number\] 第 2 步"):
        run(GivenTask(tmp_path, GAINS, losses=[1.0, float("nan")]))


def test_findings_are_told_and_kept_in_the_report(tmp_path: Path) -> None:
    task = GivenTask(tmp_path, GAINS, findings=[Finding("truncated", "warning", "截断", "cut")])
    outcome = run(task)
    assert "[truncated] 截断 / cut" in task.told
    assert outcome.manifest["findings"] == [{"name": "truncated", "severity": "warning", "zh": "截断", "en": "cut"}]


def test_a_dev_set_is_required_and_its_name_is_its_own() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.dev.*dev=\[x\]"):
        set_sections(None, {}, example="evaluation.dev=[x]")
    with pytest.raises(ConfigError, match="dev"):
        set_sections(["a"], {"dev": ["b"]}, example="")
    assert list(set_sections(["a"], {"news": ["b"], "law": ["c"]}, example="")) == ["dev", "law", "news"]


def test_the_other_processes_train_along_where_the_first_trains_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = GivenTask(tmp_path, GAINS)
    assert run_together(task, _Second(rank=1, count=2)) is None
    assert task.done == ["train"]
    assert not (task.output / "before.json").exists()
    with monkeypatch.context() as patched:  # the first is broken off after its training
        patched.setattr("finetune.run._after", _cut)
        with pytest.raises(PowerCutError):
            run(GivenTask(tmp_path, GAINS))
    judged = GivenTask(tmp_path, GAINS)
    assert run_together(judged, _Second(rank=1, count=2)) is None
    assert judged.done == []
    first = run_together(GivenTask(tmp_path, GAINS), Processes())
    assert first is not None
    assert first.promoted
    again = GivenTask(tmp_path, GAINS)
    assert run_together(again, _Second(rank=1, count=2)) is None
    assert again.done == []


class _Second(Processes):
    """The second of two processes, of which the first is never waited for."""

    def wait(self) -> None:
        pass
