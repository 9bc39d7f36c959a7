"""`finetune chatglm3` killed by the system in its middle: started again it ends as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from generation_tasks import finetune_generator
from safetensors.torch import load_file
from training_tasks import finished, start

from finetune.chatglm3.copy_task import copy_rows
from finetune.data.rows import write_rows
from finetune.report import read_manifest

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("bitsandbytes", reason="needs the extra [train]")

# With dropout, so that chance goes on where it was; dev is training, which is no matter here.
SETTINGS: dict[str, Any] = {
    "method": "qlora", "max_steps": 8, "checkpoint_steps": 3, "doctor": {"ignore": ["dev_leak"]},
}  # fmt: skip


class Runs:
    """Runs over the same rows, each in a process of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.rows = folder / "rows.jsonl"
        write_rows(self.rows, copy_rows(8, seed=3, references=(1, 2)))

    def start(self, name: str, *, kill_at: int = 0) -> Any:
        return start(finetune_generator, self.model, self.folder / name, SETTINGS, self.rows, kill_at)

    def steps(self, name: str) -> list[int]:
        """Steps done, in all starts together."""
        path = self.folder / name / "steps.txt"
        return [int(line) for line in path.read_text(encoding="utf-8").split()] if path.exists() else []

    def result(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(metrics, weights) of a run that has ended."""
        output = self.folder / name
        model = next(path for path in (output / "model", output / "candidate") if read_manifest(path))
        manifest = read_manifest(model)
        assert manifest is not None
        return manifest["metrics"], load_file(model / "adapter_model.safetensors")

    def same(self, name: str, other: str) -> bool:
        """Whether two runs have ended alike, to the bit."""
        (metrics, weights), (others, expected) = self.result(name), self.result(other)
        assert weights.keys() == expected.keys()
        return metrics == others and all(weights[key].equal(expected[key]) for key in weights)


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a run that nothing disturbed, `whole`."""
    runs = Runs(tiny, tmp_path_factory.mktemp("kill"))
    assert finished(runs.start("whole")) == [0]
    assert runs.steps("whole") == list(range(1, 9))
    return runs


def test_a_run_killed_after_a_step_goes_on_from_its_checkpoint(runs: Runs) -> None:
    assert finished(runs.start("once", kill_at=5)) == [-signal.SIGKILL]
    assert not (runs.folder / "once" / "candidate").exists()
    assert finished(runs.start("once")) == [0]
    assert runs.steps("once") == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]  # the last checkpoint was of step 3
    assert runs.same("once", "whole")


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_any_moment_ends_as_if_it_had_not_been(runs: Runs) -> None:
    kills, patience_s = 0, 0.5
    while True:
        (process,) = runs.start("often")
        process.join(patience_s)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills, patience_s = kills + 1, patience_s * 2  # at last it has the time that it takes
    assert process.exitcode == 0
    assert kills >= 2
    assert runs.same("often", "whole")
