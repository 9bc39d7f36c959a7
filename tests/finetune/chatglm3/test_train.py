"""The trainer: batching changes speed and not value, a run that was broken off goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generation_tasks import generation_config, make_examples, train_generator
from safetensors.torch import load_file
from training_tasks import finished, start

from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example
from finetune.chatglm3.model import OptimizerError
from finetune.chatglm3.train import schedule_of, train
from finetune.training_loop import TrainingEvent
from loaders.errors import ConfigError, RagProjError

pytest.importorskip("peft", reason="needs the extra [train]")


@pytest.fixture(scope="module")
def examples(tiny: Path) -> list[Example]:
    return make_examples(tiny, 10)


class KilledError(Exception):
    """Ends a run in its middle."""


def test_packed_and_grouped_batches_train_alike(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    plain = {"lora": {"dropout": 0.0}}
    packed = train(generation_config(tiny, tmp_path / "packed", **plain), examples, tiny)
    grouped = train(
        generation_config(tiny, tmp_path / "grouped", batching="grouped", gradient_checkpointing=False, **plain),
        examples,
        tiny,
    )
    assert packed.losses == pytest.approx(grouped.losses, abs=1e-5)
    assert packed.steps == 4


def test_a_run_that_was_killed_goes_on_exactly(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    unbroken = train(generation_config(tiny, tmp_path / "whole", checkpoint_steps=2), examples, tiny)

    def kill(event: TrainingEvent) -> None:
        if event.step == 3:
            raise KilledError

    settings = generation_config(tiny, tmp_path / "broken", checkpoint_steps=2)
    with pytest.raises(KilledError):
        train(settings, examples, tiny, observe=kill)
    seen: list[int] = []
    resumed = train(settings, examples, tiny, observe=lambda event: seen.append(event.step))
    assert seen == [3, 4]
    assert resumed.losses == unbroken.losses
    one, other = (load_file(run.candidate / "adapter_model.safetensors") for run in (unbroken, resumed))
    assert all(one[name].equal(other[name]) for name in one)


def test_the_candidate_has_the_weights_of_the_best_evaluation(
    tiny: Path, examples: list[Example], tmp_path: Path
) -> None:
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.2])  # before the first step, then after each
    result = train(
        generation_config(tiny, tmp_path, evaluation={"every_steps": 1, "patience": 2}, max_steps=9),
        examples,
        tiny,
        evaluate=lambda _: next(scores),
    )
    assert (result.best_step, result.steps) == (2, 4)  # two evaluations without a new best end it
    best = load_file(tmp_path / "checkpoints" / "best-00000002" / "weights.safetensors")
    saved = load_file(result.candidate / "adapter_model.safetensors")
    assert saved
    for name, tensor in saved.items():
        assert best[name.replace(".weight", ".default.weight")].equal(tensor)


def test_all_weights_can_be_trained(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    result = train(generation_config(tiny, tmp_path, method="full"), examples, tiny)
    assert result.losses[-1] < result.losses[0]
    assert (result.candidate / "tokenizer.json").is_file()
    assert (result.candidate / "model.safetensors").is_file()


def test_steps_are_counted_from_rows_and_epochs(tiny: Path, tmp_path: Path) -> None:
    schedule = schedule_of(generation_config(tiny, tmp_path, max_steps=None, epochs=2.0, batch_size=4), 10)
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 6)  # 4 + 4 + 2 rows, twice


def test_targets_that_name_no_layer_are_refused(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(RagProjError, match="query_key_value"):
        train(generation_config(tiny, tmp_path, lora={"targets": ["query_key_value"]}), examples, tiny)


def test_an_8_bit_optimizer_needs_a_gpu(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(OptimizerError, match="auto"):
        train(generation_config(tiny, tmp_path, optimizer="adamw_8bit"), examples, tiny)


def test_a_forward_pass_must_hold_the_longest_row(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="micro_batch_tokens 64"):
        ChatGlm3TrainingConfig.from_dict(
            {"model": "m", "output": "o", "train": ["t"], "max_tokens": 100, "micro_batch_tokens": 64}, where="test"
        )


def test_two_processes_train_what_one_trains(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    """The last step of an epoch has two rows in one pack: one of the processes has nothing to do there."""
    plain = {"lora": {"dropout": 0.0}, "batching": "packed"}
    assert finished(start(train_generator, tiny, tmp_path / "two", plain, 10, processes=2)) == [0, 0]
    one = train(generation_config(tiny, tmp_path / "one", **plain), examples, tiny)
    two = json.loads((tmp_path / "two" / "losses.json").read_text(encoding="utf-8"))
    assert two == pytest.approx(one.losses, abs=1e-5)
