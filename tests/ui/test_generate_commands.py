"""`ragproj generate`, `merge`, `data generation` and `finetune chatglm3`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loaders.errors import RagProjError
from ui.cli import main
from ui.generate_commands import read_references

pytest.importorskip("torch", reason="needs the extra [models]")
pytest.importorskip("peft", reason="needs the extra [train]")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from finetune.chatglm3.copy_task import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", hidden=64, layers=1, context=256)


def adapter_of(tiny: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), settings)
    model.peft_config["default"].base_model_name_or_path = str(tiny)
    model.save_pretrained(folder)
    return folder


def test_an_answer_comes_from_the_references_given(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "references.txt").write_text("星河的代号是东风。\n\n青石的代号是南山。\n", encoding="utf-8")
    words = ["generate", "--model", str(tiny), "--question", "星河的代号是什么？", "--json", "max_new_tokens=4"]
    assert main([*words, "--references", str(tmp_path / "references.txt"), "device=cpu"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == "星河的代号是什么？"
    assert answer.keys() >= {"result", "citations", "refused"}


def test_a_wrong_setting_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.txt").write_text("甲。", encoding="utf-8")
    words = ["generate", "--model", str(tiny), "--question", "？", "--references", str(tmp_path / "r.txt")]
    assert main([*words, "temprature=1"]) == 2
    assert "temprature" in capsys.readouterr().err


def test_references_are_read_from_text_and_json(tmp_path: Path) -> None:
    plain, lines, rows = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.json"
    plain.write_text("第一段\n还是第一段\n\n第二段\n", encoding="utf-8")
    assert read_references(plain) == [(1, "第一段\n还是第一段"), (4, "第二段")]
    lines.write_text('"一"\n\n{"text": "二"}\n', encoding="utf-8")
    assert read_references(lines) == [(1, "一"), (3, "二")]
    rows.write_text('[{"references": ["一", "二"]}]', encoding="utf-8")
    assert read_references(rows) == [(1, "一"), (1, "二")]
    rows.write_text('[{"question": "？"}]', encoding="utf-8")
    with pytest.raises(RagProjError, match=r'c\.json:1.*"text"'):
        read_references(rows)


def test_a_merge_tells_how_equal_it_is(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    words = ["merge", str(adapter), str(tmp_path / "merged"), "--json", "device=cpu", "dtype=float32"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["difference"] <= 1e-4
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert main(words) == 2  # it is there already


def test_the_original_layout_needs_a_converted_base(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    words = ["merge", str(adapter), str(tmp_path / "merged"), "--original", "device=cpu", "dtype=float32"]
    assert main(words) == 1
    assert "original/files.json" in capsys.readouterr().err


def test_generation_rows_are_made_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": "谁审批采购？", "references": ["采购申请由部门经理审批。"], "answer": "采购申请由部门经理审批。"},
        {"question": "食堂几点开？", "references": ["食堂每天早上七点开门。"], "answers": ["食堂每天早上七点开门。"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = ["data", "generation", str(path), "--out", str(tmp_path / "out"), "--json", "dev_share=0"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 2, "dev": 0}
    text = (tmp_path / "out" / "generation_train.jsonl").read_text(encoding="utf-8")
    assert text.count("[1]") + text.count("[2]") == 2
    assert main(words) == 2  # nothing is replaced unasked
    assert main([*words, "--overwrite", "refusal_share=2"]) == 2  # a share above one


def test_a_training_is_refused_for_its_settings_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: m\noutput: o\ntrain: [t.jsonl]\n", encoding="utf-8")
    assert main(["finetune", "chatglm3", "--config", str(config), "lora.rank=0", "epochs=-1"]) == 2
    error = capsys.readouterr().err
    assert "lora.rank" in error
    assert "epochs" in error
