"""Adapters on their own base in any form it takes, and refused on every other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bge_models import build_bert, build_reranker

from chains.bge.directory import ModelDirectoryError, read_model_directory
from chains.bge.encoder import load_encoder
from chains.bge.reranker import BgeReranker
from chains.lora import base_mark, resolve_adapter

torch = pytest.importorskip("torch", reason="needs the extra [models]")
peft = pytest.importorskip("peft", reason="needs the extra [train]")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("lora") / "base", hidden=32)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return trained_on(base, base.with_name("adapter"))


def trained_on(base: Path, target: Path) -> Path:
    """An adapter with a report, as a training leaves it."""
    from transformers import AutoModel

    model = peft.get_peft_model(
        AutoModel.from_pretrained(str(base), add_pooling_layer=False), peft.LoraConfig(r=2, target_modules=["query"])
    )
    model.save_pretrained(str(target))
    manifest = {"base": {"model": "models/base", "digest": base_mark(base)}}
    (target / "ragproj.json").write_text(json.dumps(manifest), encoding="utf-8")
    return target


def load(base: Path, adapter: Path) -> Any:
    return load_encoder(read_model_directory(base), adapter)


def rewritten(base: Path, target: Path, **how: Any) -> Path:
    """The same weights in other files."""
    from safetensors.torch import load_file
    from transformers import BertModel

    shutil.copytree(base, target)
    if how.pop("pickled", False):
        torch.save(load_file(base / "model.safetensors"), target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
        return target
    (target / "model.safetensors").unlink()
    BertModel.from_pretrained(str(base), dtype=how.pop("dtype", torch.float32)).save_pretrained(target, **how)
    return target


@pytest.mark.parametrize("how", [{"pickled": True}, {"max_shard_size": "100KB"}, {"dtype": torch.float16}])
def test_the_same_weights_in_other_files_are_the_same_base(
    base: Path, adapter: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    other = rewritten(base, tmp_path / "other", **how)
    assert sorted(other.glob("*model*")) != sorted(other / path.name for path in base.glob("*model*")) or "dtype" in how
    assert base_mark(other) == base_mark(base)
    load(other, adapter)


def test_a_base_of_the_same_shape_with_other_weights_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = build_bert(tmp_path / "other", hidden=32, seed=1)
    with pytest.raises(ModelDirectoryError) as error:
        load(other, adapter)
    for named in (str(adapter), str(other), "models/base", base_mark(base), base_mark(other), "请把 model 改成"):
        assert named in error.value.zh
    assert "name the base of its training as `model`" in error.value.en


def test_one_layer_that_was_trained_on_makes_another_base(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["encoder.layer.1.attention.self.value.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert base_mark(other) != base_mark(base)


@pytest.mark.parametrize(("of_layers", "on_layers"), [(2, 4), (4, 2)])
def test_a_base_with_other_layers_is_refused_without_a_report_too(
    tmp_path: Path, of_layers: int, on_layers: int
) -> None:
    """PEFT warns of the first and says nothing of the second."""
    adapter = trained_on(build_bert(tmp_path / "own", hidden=32, layers=of_layers), tmp_path / "adapter")
    (adapter / "ragproj.json").unlink()
    other = build_bert(tmp_path / "other", hidden=32, layers=on_layers)
    missing = 4  # A and B of two layers
    counts = r"0 of .* and 4 places" if of_layers < on_layers else rf"{missing} of .* and 0 places"
    with pytest.raises(ModelDirectoryError, match=rf"does not fit the model.*{counts}.*layer\.[23]\."):
        load(other, adapter)


@pytest.mark.parametrize("name", ["nowhere", "runs/nowhere", "user/adapter"])
def test_a_missing_adapter_is_named_and_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ModelDirectoryError, match=rf"{name}.*check the path.*adapter=null"):
        resolve_adapter(name)


def test_the_adapter_of_a_refused_training_is_told_to_be_a_candidate(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "candidate")
    with pytest.raises(ModelDirectoryError, match=r"training was refused, the candidate is .*run/candidate"):
        resolve_adapter(tmp_path / "run" / "model")
    assert resolve_adapter(tmp_path / "run" / "candidate") == tmp_path / "run" / "candidate"


@pytest.mark.parametrize("report", ["", "{}", '{"base": "models/base"}', '{"base": {"digest": "0123456789abcdef"}}'])
def test_an_adapter_from_elsewhere_goes_by_its_layers_alone(
    base: Path, adapter: Path, tmp_path: Path, report: str
) -> None:
    other = shutil.copytree(adapter, tmp_path / "adapter")
    (other / "ragproj.json").write_text(report, encoding="utf-8")
    load(base, other)


def test_an_embedder_on_the_cpu_opens_no_gpu(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> str:
        raise AssertionError("PEFT looked for a GPU")

    monkeypatch.setattr("peft.peft_model.infer_device", opened)
    monkeypatch.setattr("peft.utils.save_and_load.infer_device", opened)
    load(base, adapter)


def test_a_reranker_takes_its_own_adapter_and_no_others(base: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    reranker = build_reranker(base, tmp_path / "reranker")
    model = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(str(reranker)),
        peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path / "own"))
    pair = [("知识", "备份")]
    plain = BgeReranker(model=str(reranker)).logits(pair)
    assert abs(BgeReranker(model=str(reranker), adapter=str(tmp_path / "own")).logits(pair) - plain).max() > 1e-4
    with pytest.raises(ModelDirectoryError, match="was not trained on the weights"):
        BgeReranker(model=str(reranker), adapter=str(adapter)).logits(pair)
