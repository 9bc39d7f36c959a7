"""Loading: device and type chosen and said, 4-bit and 8-bit weights on the CPU, adapters, what does not fit named."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from chains.bge.directory import ModelDirectoryError
from chains.chatglm3.directories import native_directory
from chains.chatglm3.loading import ModelOptions, choose_device, choose_dtype, load_causal_model
from chains.chatglm3.settings import ConversionError
from chains.lora import base_mark
from loaders.errors import UsageError

torch = pytest.importorskip("torch", reason="needs the extra [models]")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

IDS = torch.tensor([[3, 500, 900, 1200, 7, 300]])


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits.float()


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert choose_device("auto").type == "cpu"
    assert "torch sees no GPU" in caplog.text


@pytest.mark.parametrize(("has_it", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_the_type_the_cpu_computes_fast(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_it: bool, chosen: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    with caplog.at_level(logging.INFO):
        assert choose_dtype("auto", torch.device("cpu")) == chosen
    assert "this CPU has" in caplog.text


def test_a_type_that_is_named_is_taken() -> None:
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("name", ["cuda:7", "warp"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}'"):
        choose_device(name)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="cannot load the model"):
        load_causal_model(ModelOptions(tmp_path, device="cpu"))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_say_nearly_the_same(tiny: Path, quantization: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra [train]")
    plain = logits_of(load_causal_model(ModelOptions(tiny, device="cpu", dtype="float32")))
    model = load_causal_model(ModelOptions(tiny, device="cpu", dtype="float32", quantization=quantization))
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization] in kinds
    similarity = torch.nn.functional.cosine_similarity(logits_of(model).flatten(), plain.flatten(), dim=0)
    assert 0.95 < similarity < 0.99999, "quantised, and still the same model"


def test_4_bit_weights_are_the_same_after_evaluation(tiny: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks them in place unless it is told not to."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra [train]")
    model = load_causal_model(ModelOptions(tiny, device="cpu", dtype="float32", quantization="nf4"))
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 6
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [layer.weight.data.clone() for layer in layers]
    first = logits_of(model)
    assert all(torch.equal(layer.weight.data, was) for layer, was in zip(layers, before, strict=True))
    assert torch.equal(logits_of(model.train().eval()), first)


def test_sizes_that_4_bits_cannot_hold_are_named(native: Path) -> None:
    """The golden model's down_proj has 160 columns, no multiple of 64."""
    pytest.importorskip("bitsandbytes", reason="needs the extra [train]")
    with pytest.raises(ConversionError, match=r"down_proj 160x64.*quantization: none"):
        load_causal_model(ModelOptions(native, device="cpu", dtype="float32", quantization="nf4"))


def test_an_adapter_changes_the_model_and_one_that_is_missing_is_named(tiny: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra [train]")
    options = ModelOptions(tiny, device="cpu", dtype="float32")
    plain = load_causal_model(options)
    before = logits_of(plain)
    adapted = peft.get_peft_model(
        plain, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    expected = logits_of(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_causal_model(ModelOptions(tiny, tmp_path / "adapter", device="cpu", dtype="float32"))
    assert torch.allclose(logits_of(loaded), expected, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3)
    with pytest.raises(ModelDirectoryError, match=r"no LoRA adapter.*adapter_config\.json"):
        load_causal_model(ModelOptions(tiny, tmp_path, device="cpu", dtype="float32"))


def test_an_adapter_knows_its_base_original_or_converted_quantised_or_not(
    tiny: Path, tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra [train]")
    pytest.importorskip("bitsandbytes", reason="needs the extra [train]")
    monkeypatch.setenv("RAGPROJ_CACHE", str(tmp_path / "cache"))
    adapter = tmp_path / "adapter"
    model = load_causal_model(ModelOptions(tiny, device="cpu", dtype="float32", quantization="nf4"))
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(adapter)
    manifest = {"base": {"model": "models/chatglm3", "digest": base_mark(tiny)}}
    (adapter / "ragproj.json").write_text(json.dumps(manifest), encoding="utf-8")
    converted = native_directory(str(tiny_original))
    assert converted not in (tiny, tiny_original)
    for quantization in ("nf4", "int8", "none"):
        load_causal_model(ModelOptions(converted, adapter, quantization, "cpu", "float32"))  # type: ignore[arg-type]
    other = shutil.copytree(tiny, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelDirectoryError, match=rf"not trained on the weights in {other}.*models/chatglm3"):
        load_causal_model(ModelOptions(other, adapter, device="cpu", dtype="float32"))
