"""Adapters trained on the original: the same logits on the native model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.adapters import convert_adapter, is_original_adapter
from chains.chatglm3.settings import ConversionError

torch = pytest.importorskip("torch", reason="needs the extra [models]")
peft = pytest.importorskip("peft", reason="needs the extra [train]")


def logits_with(native: Path, adapter: Path, input_ids: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(native), adapter).eval()
    with torch.no_grad():
        return model(input_ids).logits[:, -8:]


@pytest.mark.parametrize("base_known", [True, False])
def test_converted_adapter_gives_the_originals_logits(
    golden: Path, native: Path, tmp_path: Path, base_known: bool
) -> None:
    from safetensors.torch import load_file

    count = convert_adapter(golden / "adapter_original", tmp_path / "adapter", base=native if base_known else None)
    assert count == 2 * 2 * (3 + 1 + 1 + 1)  # layers, lora_A and lora_B, q k v, o, gate_up, down
    expected = load_file(golden / "expected_adapter.safetensors")
    logits = logits_with(native, tmp_path / "adapter", expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() <= 1e-4
    without = load_file(golden / "expected.safetensors")["single_33.logits"]
    assert (logits - without).abs().max() > 1e-3, "the adapter must change something"


def test_converted_adapter_names_native_modules_and_its_base(golden: Path, native: Path, tmp_path: Path) -> None:
    convert_adapter(golden / "adapter_original", tmp_path / "adapter", base=native)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(native)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert not is_original_adapter(config)


def with_config(golden: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(golden / "adapter_original", folder)
    folder.chmod(0o755)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    file.write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"target_modules": ["query_key_value", "word_embeddings"]}, "word_embeddings"),
        ({"target_modules": []}, "target_modules"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save"),
    ],
)
def test_what_cannot_be_converted_is_named(golden: Path, tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    source = with_config(golden, tmp_path / "source", **settings)
    with pytest.raises(ConversionError, match=named):
        convert_adapter(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_an_unknown_tensor_is_named(golden: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = with_config(golden, tmp_path / "source")
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    save_file({**tensors, "base_model.model.extra.weight": torch.zeros(1)}, source / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"base_model\.model\.extra\.weight"):
        convert_adapter(source, tmp_path / "target")


def test_a_folder_with_something_in_it_is_left_alone(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConversionError, match="not empty"):
        convert_adapter(golden / "adapter_original", tmp_path)


def test_without_weights_the_missing_file_is_named(golden: Path, tmp_path: Path) -> None:
    source = with_config(golden, tmp_path / "source")
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"no adapter_model\.safetensors"):
        convert_adapter(source, tmp_path / "target")
