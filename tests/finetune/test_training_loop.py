"""The loop that every training runs in, on a model of one number, so that each step can be followed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune.checkpoints import CheckpointError
from finetune.distributed import Processes
from finetune.doctor import Monitor
from finetune.evaluation import EvaluationConfig
from finetune.precision import Numbers
from finetune.schedule import Schedule
from finetune.training_config import TrainingConfig
from finetune.training_loop import Learner, TrainingEvent, TrainingLoop, TrainingResult

if TYPE_CHECKING:
    from torch.amp import GradScaler


class SlopeConfig(TrainingConfig):
    evaluation: EvaluationConfig = EvaluationConfig()


@dataclass(frozen=True)
class Point:
    rows: int
    x: float


class Slope(Learner[Point, float]):
    """Learns w with the loss 5 w x: its gradient is 5 x, whatever w is."""

    def __init__(self, config: TrainingConfig, points: list[float], *, scaled: bool = False) -> None:
        self.rows, self.device, self.numbers = points, "cpu", Numbers(None, scaled)
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, 100.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.learning_rate, momentum=0.5)
        self.schedule = Schedule.of(config, len(points))
        self.identity = {**config.deciding(), "points": points}

    def arithmetic(self) -> str:
        return "batch 1 point"

    def batch(self, step: int) -> Point:
        return Point(1, self.rows[step % len(self.rows)])

    def gradient(self, batch: Point, step: int, scaler: GradScaler) -> float:
        loss = 5 * batch.x * self.model.weight.sum()
        scaler.scale(loss).backward()
        return float(loss.detach())

    def served(self) -> float:
        assert not self.model.training
        return float(self.model.weight)


def config(output: Path, **settings: Any) -> SlopeConfig:
    given = {"model": "m", "train": ["t"], "max_steps": 4, "learning_rate": 1.0, "warmup_share": 0.0, "batch_size": 1}
    return SlopeConfig(output=output, **{**given, "max_grad_norm": None, **settings})


def run(output: Path, points: list[float] | None = None, *, scaled: bool = False, **options: Any) -> TrainingResult:
    """A run over these points; keywords of the loop go to the loop, the others into the config."""
    loop = {key: options.pop(key) for key in ("evaluate", "observe", "monitor", "dev") if key in options}
    settings = config(output, **options)
    learner = Slope(settings, points or [1.0, 2.0], scaled=scaled)

    def save(target: Path) -> None:
        target.write_text(str(float(learner.model.weight)), encoding="utf-8")

    return TrainingLoop(settings, learner, Processes(), **loop).run(save)


def candidate(result: TrainingResult) -> float:
    return float(result.candidate.read_text(encoding="utf-8"))


def given(*scores: float) -> Callable[[float], float]:
    """An evaluation that finds these scores, one after the other."""
    left = iter(scores)
    return lambda _: next(left)


def at(step: int, *, score: bool = False) -> Callable[[TrainingEvent], None]:
    """An observer that ends the run after this step, or after the evaluation there."""

    def stop(event: TrainingEvent) -> None:
        if event.step == step and score == (event.score is not None):
            raise KeyboardInterrupt

    return stop


# --- steps


def test_each_step_follows_the_schedule(tmp_path: Path) -> None:
    events: list[TrainingEvent] = []
    result = run(tmp_path, [1.0, 2.0], observe=events.append)
    # by hand: rates 1, 3/4, 1/2, 1/4; gradients 5, 10, 5, 10; momentum 5, 12.5, 11.25, 15.625
    assert [event.learning_rate for event in events] == [1.0, 0.75, 0.5, 0.25]
    assert [event.gradient_norm for event in events] == [5.0, 10.0, 5.0, 10.0]
    weights = [100.0, 95.0, 85.625, 80.0, 76.09375]
    assert result.losses == tuple(5 * x * w for x, w in zip([1, 2, 1, 2], weights[:4], strict=True))
    assert candidate(result) == weights[4]
    assert (result.steps, result.planned_steps, result.best_step, result.scores) == (4, 4, None, ())


def test_gradients_are_scaled_down_to_the_norm_and_told_as_they_were(tmp_path: Path) -> None:
    events: list[TrainingEvent] = []
    result = run(tmp_path, [1.0], max_steps=1, max_grad_norm=2.0, observe=events.append)
    assert candidate(result) == pytest.approx(98.0)
    assert events[0].gradient_norm == 5.0


def test_a_step_that_overflows_is_skipped_and_told(tmp_path: Path) -> None:
    events: list[TrainingEvent] = []
    result = run(tmp_path, [1.0, math.inf, 1.0], max_steps=3, scaled=True, observe=events.append)
    assert [event.skipped for event in events] == [False, True, False]
    assert result.losses == (500.0, math.inf, 475.0)  # 95 after the first step, and after the second


# --- evaluations


def test_the_candidate_has_the_weights_of_the_best_evaluation(tmp_path: Path) -> None:
    seen: list[float] = []

    def evaluate(weight: float) -> float:
        seen.append(weight)
        return {1: 0.1, 2: 0.5, 3: 0.9, 4: 0.3, 5: 0.2}[len(seen)]

    result = run(tmp_path, [1.0, 2.0], evaluate=evaluate, evaluation={"every_steps": 1})
    assert seen == [100.0, 95.0, 85.625, 80.0, 76.09375]  # before the first step, and after each
    assert (result.best_step, candidate(result)) == (2, 85.625)
    assert result.scores == ((0, 0.1), (1, 0.5), (2, 0.9), (3, 0.3), (4, 0.2))


def test_training_stops_when_patience_is_at_its_end(tmp_path: Path) -> None:
    evaluate = given(0.1, 0.5, 0.4, 0.3, 0.9)
    result = run(tmp_path, max_steps=8, evaluation={"every_steps": 1, "patience": 2}, evaluate=evaluate)
    assert (result.steps, result.planned_steps, result.best_step) == (3, 8, 1)


def test_a_run_that_is_not_told_how_often_is_evaluated_ten_times(tmp_path: Path) -> None:
    result = run(tmp_path, max_steps=25, evaluate=given(*[0.0] * 20))
    # every second step, and the last
    assert [step for step, _ in result.scores] == [*range(0, 25, 2), 25]


# --- resume


def test_a_run_broken_off_goes_on_from_its_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=6, checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", max_steps=6, checkpoint_steps=2, observe=at(5))
    steps: list[int] = []
    resumed = run(tmp_path / "broken", max_steps=6, checkpoint_steps=2, observe=lambda event: steps.append(event.step))
    assert steps == [5, 6]
    assert (resumed.losses, candidate(resumed)) == (whole.losses, candidate(whole))


def test_a_run_broken_off_remembers_its_best_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoint_steps": 3, "evaluation": {"every_steps": 1}}
    scores = (0.1, 0.9, 0.2, 0.3, 0.4)
    with pytest.raises(KeyboardInterrupt):  # after three steps, none of which is in a checkpoint yet
        run(tmp_path, evaluate=given(*scores), observe=at(3, score=True), **settings)
    result = run(tmp_path, evaluate=given(*scores), **settings)
    assert result.best_step == 1
    assert result.scores == tuple(enumerate(scores))


def test_what_the_monitor_found_before_a_kill_is_in_the_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 500, "learning_rate": 1e-9, "checkpoint_steps": 450}

    def watched(monitor: Monitor, *, end: int) -> Callable[[TrainingEvent], None]:
        def observe(event: TrainingEvent) -> None:
            assert event.loss is not None
            monitor.observe(step=event.step, loss=event.loss, gradient_norm=event.gradient_norm)
            at(end)(event)

        return observe

    before, after = Monitor(), Monitor()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [1.0], monitor=before, observe=watched(before, end=460), **settings)
    assert [finding.name for finding in before.findings] == ["flat_loss"]  # found at step 400
    run(tmp_path, [1.0], monitor=after, observe=watched(after, end=0), **settings)
    assert after.findings == before.findings


def test_a_finished_run_started_again_trains_nothing_and_writes_the_same(tmp_path: Path) -> None:
    first = run(tmp_path)
    weight = candidate(first)
    again = run(tmp_path)
    assert again.rows_per_s == 0.0
    assert (again.losses, candidate(again)) == (first.losses, weight)


def test_a_half_written_checkpoint_is_forgotten(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-00000009"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"half")
    assert run(tmp_path).steps == 4
    assert not left.exists()


def test_checkpoints_of_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate: 1\.0 -> 0\.5"):
        run(tmp_path, learning_rate=0.5)
    with pytest.raises(CheckpointError, match="points"):
        run(tmp_path, [3.0])
    assert run(tmp_path, log_steps=1).steps == 4  # this changes no weight


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"evaluation": EvaluationConfig(metric="mrr@10", patience=2)}, r"evaluation\.metric: 'ndcg@10' -> 'mrr@10'"),
        ({"evaluation": EvaluationConfig(patience=3)}, r"evaluation\.patience: 2 -> 3"),
        ({"evaluation": EvaluationConfig(patience=2, every_steps=1)}, r"evaluation\.every_steps: None -> 1"),
        ({"evaluation": EvaluationConfig(patience=2, interval_questions=9)}, "interval_questions: 500 -> 9"),
        ({"dev": "new"}, "dev: 'old' -> 'new'"),
    ],
)
def test_scores_of_another_measure_do_not_go_on_where_these_have_stopped(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    given_run: dict[str, Any] = {"evaluation": EvaluationConfig(patience=2), "dev": "old", "checkpoint_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, observe=at(2), evaluate=lambda _: 0.5, **given_run)
    with pytest.raises(CheckpointError, match=named):
        run(tmp_path, evaluate=lambda _: 0.5, **{**given_run, **changed})
    assert run(tmp_path, evaluate=lambda _: 0.5, **given_run).steps >= 2
