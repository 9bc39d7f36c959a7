"""The real QLoRA path on a CPU: NF4, PEFT, evaluation in mid-training, gate, reload, merge; nothing is stubbed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chains.answerers import ChatModelAnswerer
from chains.chatglm3.chat_model import ChatGLM3
from chains.chatglm3.convert import convert_chatglm3
from chains.chatglm3.loading import ModelOptions, load_causal_model
from chains.config import ChatModelConfig
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.copy_task import copy_rows
from finetune.chatglm3.data import passages_of
from finetune.chatglm3.evaluation import answer_rows
from finetune.chatglm3.merge import MergeError, merge_adapter
from finetune.chatglm3.run import GenerationTask, finetune_chatglm3
from finetune.data.rows import write_rows
from finetune.run import Outcome
from finetune.training_loop import TrainingEvent
from loaders.errors import ConfigError, RagProjError, UsageError

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("bitsandbytes", reason="needs the extra [train]")

ROWS = copy_rows(8, seed=3, references=(1, 2))
IDS = torch.tensor([[5, 300, 301, 302, 303]])


def settings(tiny: Path, folder: Path, **given: Any) -> ChatGlm3TrainingConfig:
    rows = folder / "rows.jsonl"
    write_rows(rows, ROWS)
    return ChatGlm3TrainingConfig.model_validate(
        {
            "model": str(tiny), "output": folder / "run", "train": [rows], "method": "qlora",
            "lora": {"dropout": 0.0}, "max_steps": 60, "batch_size": 8, "learning_rate": 5e-3, "warmup_share": 0.1,
            "max_tokens": 100, "micro_batch_tokens": 400, "device": "cpu", "dtype": "float32",
            # eight rows learned by heart: that dev is training is the point here
            "doctor": {"ignore": ["dev_leak"]},
            "evaluation": {"dev": [rows], "every_steps": 30, "max_new_tokens": 12},
            **given,
        }
    )  # fmt: skip


class Trained:
    """One run, looked at by several tests."""

    def __init__(self, config: ChatGlm3TrainingConfig) -> None:
        self.events: list[TrainingEvent] = []
        self.config = config
        outcome = finetune_chatglm3(config, observe=self.events.append)
        assert outcome is not None
        self.outcome: Outcome = outcome


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(settings(tiny, tmp_path_factory.mktemp("qlora")))


def logits(directory: Path, adapter: Path | None, quantization: Any) -> torch.Tensor:
    model = load_causal_model(ModelOptions(directory, adapter, quantization, "cpu", "float32"))
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_the_loss_falls_and_evaluation_in_mid_training_sees_it(trained: Trained) -> None:
    losses = [event.loss for event in trained.events if event.loss is not None]
    assert losses[-1] < 0.3 * losses[0]
    scores = [(event.step, event.score) for event in trained.events if event.score is not None]
    assert [step for step, _ in scores] == [0, 30, 60]
    assert scores[-1][1] == 1.0
    assert scores[0][1] is not None
    assert scores[0][1] < 0.5


def test_the_trained_answers_come_out_verbatim_after_a_reload(tiny: Path, trained: Trained) -> None:
    assert trained.outcome.promoted
    model = ChatGLM3(
        model=str(tiny), adapter=str(trained.outcome.model), quantization="nf4", temperature=0, max_new_tokens=16,
        device="cpu", dtype="float32",
    )  # fmt: skip
    answers = answer_rows(model, ROWS, language="zh", concurrency=4)
    assert [answer.result for answer in answers] == [row.answer for row in ROWS]
    assert [answer.refused for answer in answers] == [row.refuse for row in ROWS]


def test_the_report_has_every_metric_with_its_interval(trained: Trained) -> None:
    metrics = trained.outcome.manifest["metrics"]["dev"]
    assert metrics["char_f1"]["after"] == 1.0
    assert metrics["citation_recall"]["after"] == 1.0
    assert metrics["refusal_recall"].keys() >= {"before", "after", "difference", "low", "high"}
    assert trained.outcome.manifest["kind"] == "chatglm3"
    assert "citation_precision" in (trained.outcome.model / "report.md").read_text(encoding="utf-8")
    config = json.loads((trained.outcome.model / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == trained.config.model
    lines = (trained.config.output / "answers_candidate.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["answered"] == ROWS[0].answer


def test_a_finished_run_is_not_repeated(trained: Trained) -> None:
    again = finetune_chatglm3(trained.config)
    assert again is not None
    assert again.already
    assert again.model == trained.outcome.model


def test_the_merged_model_is_the_adapters(tiny: Path, trained: Trained, tmp_path: Path) -> None:
    report = merge_adapter(trained.outcome.model, tmp_path / "merged", device="cpu", dtype="float32")
    assert report.difference <= 1e-4
    adapter, merged = logits(tiny, trained.outcome.model, "nf4"), logits(tmp_path / "merged", None, "none")
    assert (adapter - merged).abs().max() <= 1e-4
    assert (logits(tiny, None, "nf4") - merged).abs().max() > 1e-2  # the adapter is in it
    manifest = json.loads((tmp_path / "merged" / "ragproj.json").read_text(encoding="utf-8"))
    assert (manifest["kind"], manifest["quantization"]) == ("chatglm3-merged", "nf4")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_merged_model_goes_back_to_the_original_layout(shared_data: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    golden = shared_data / "chatglm3_golden" / "checkpoint"
    convert_chatglm3(golden, tmp_path / "native")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), lora)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "native")
    model.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "out", original=True, device="cpu", dtype="float32")
    assert report.original == tmp_path / "out-original"
    before, after = (load_file(folder / "model.safetensors") for folder in (golden, report.original))
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"query_key_value"}


def test_a_merge_that_is_not_equal_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to bfloat16 leaves more than the bound set here."""
    monkeypatch.setattr("finetune.chatglm3.merge._TOLERANCE", {"bfloat16": 1e-6})
    with pytest.raises(MergeError, match="nothing was written"):
        merge_adapter(trained.outcome.model, tmp_path / "merged", device="cpu", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_never_writes_over_a_directory(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        merge_adapter(trained.outcome.model, tmp_path)


def test_a_run_that_does_not_gain_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = settings(
        tiny,
        tmp_path,
        max_steps=1,
        learning_rate=1e-5,
        evaluation={"dev": [tmp_path / "rows.jsonl"], "max_new_tokens": 2},
    )
    outcome = finetune_chatglm3(config)
    assert outcome is not None
    assert not outcome.promoted
    assert outcome.model.name == "candidate"
    assert not outcome.manifest["verdict"]["reasons"][0]["passed"]


def test_measurements_in_other_numbers_and_choices_by_other_scores_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    task = GenerationTask(settings(tiny, tmp_path))
    assert GenerationTask(settings(tiny, tmp_path)).whole() == task.whole()
    for changed in ({"method": "lora"}, {"dtype": "bfloat16"}):
        assert GenerationTask(settings(tiny, tmp_path, **changed)).measuring() != task.measuring()
    evaluation = {**task.config.evaluation.model_dump(), "dev": [tmp_path / "rows.jsonl"]}
    for changed in ({"metric": "rouge_l"}, {"every_steps": 20}, {"patience": 2}, {"interval_rows": 3}):
        other = GenerationTask(settings(tiny, tmp_path, evaluation={**evaluation, **changed}))
        assert other.training() != task.training()
    write_rows(tmp_path / "fewer.jsonl", ROWS[:5])
    fewer = GenerationTask(settings(tiny, tmp_path, evaluation={**evaluation, "dev": [tmp_path / "fewer.jsonl"]}))
    assert fewer.training()["dev"] != task.training()["dev"]


def test_a_run_without_dev_is_refused_before_anything_is_loaded(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.dev"):
        finetune_chatglm3(settings(tiny, tmp_path, evaluation={}))


def test_leaks_stop_a_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RagProjError, match="dev_leak"):
        finetune_chatglm3(settings(tiny, tmp_path, doctor={}))


@pytest.mark.parametrize("name", ["chatglm3_qlora", "chatglm3_lora", "chatglm3_full"])
def test_shipped_configs_are_read(name: str) -> None:
    path = Path(__file__).resolve().parents[3] / "finetune" / "configs" / f"{name}.yaml"
    config = ChatGlm3TrainingConfig.read(path, ["output=elsewhere"])
    assert config.output == Path("elsewhere")
    assert config.method in name
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"finetune/configs/{name}.yaml" in first


@pytest.mark.slow
def test_the_merged_model_answers_from_transformers_serve(trained: Trained, tmp_path: Path) -> None:
    """As the manual says: `transformers serve`, and `_type: chat_model` before it."""
    pytest.importorskip("uvicorn", reason="needs transformers[serving]")
    merged = tmp_path / "merged"
    merge_adapter(trained.outcome.model, merged, device="cpu", dtype="float32")
    with served(merged, tmp_path / "log") as base_url:
        config = {"_type": "chat_model", "model": str(merged), "base_url": base_url, "temperature": 0}
        answerer = ChatModelAnswerer(model=ChatModelConfig.from_dict(config, where="test"))
        for row in ROWS[:3]:
            answer = answerer.invoke({"question": row.question, "passages": passages_of(row.references)})
            assert answer["result"].strip() == row.answer
            assert answer["refused"] == row.refuse


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The base URL of a server that holds a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output, env=environment
        )
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text(encoding="utf-8")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)
