"""Conversion: equal to the original implementation, every tensor accounted for, back again, killed and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.convert import MANIFEST, convert_chatglm3
from chains.chatglm3.settings import ConversionError

torch = pytest.importorskip("torch", reason="needs the extra [models]")
pytest.importorskip("transformers", reason="needs the extra [models]")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def model(native: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(native).eval()


@pytest.fixture(scope="session")
def expected(golden: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(golden / "expected.safetensors")


def in_shards(golden: Path, folder: Path, *, count: int, suffix: str) -> Path:
    """The golden checkpoint in several files with an index, as the hub holds the 6B model."""
    from safetensors.torch import load_file, save_file

    checkpoint = golden / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    tensors = load_file(checkpoint / "model.safetensors")
    stem = "pytorch_model" if suffix == "bin" else "model"
    weight_map = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        shard = {name: tensors[name] for name in list(tensors)[number::count]}
        if suffix == "bin":
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.{suffix}.index.json").write_text(index, encoding="utf-8")
    return folder


def edited(checkpoint: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a checkpoint with other settings."""
    shutil.copytree(checkpoint, folder)
    folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


def tensors_in(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# -- what the original computes, see chatglm3_golden in the data's README ------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 33, 200])
def test_logits_are_the_originals(model: Any, expected: dict[str, Any], length: int) -> None:
    wanted = expected[f"single_{length}.logits"]
    with torch.no_grad():
        logits = model(expected[f"single_{length}.input_ids"]).logits[:, -wanted.shape[1] :]
    assert (logits - wanted).abs().max() <= 1e-4


def test_logits_of_a_left_padded_batch_are_the_originals(model: Any, expected: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = model(
            expected["batch.input_ids"],
            attention_mask=expected["batch.attention_mask"],
            position_ids=expected["batch.position_ids"],
        ).logits[:, -1]
    assert (logits - expected["batch.last_logits"]).abs().max() <= 1e-4


def test_greedy_continuation_is_the_originals(model: Any, expected: dict[str, Any]) -> None:
    greedy = model.generate(
        expected["batch.input_ids"],
        attention_mask=expected["batch.attention_mask"],
        max_new_tokens=24,
        do_sample=False,
    )
    assert torch.equal(greedy, expected["batch.greedy"])


def test_loss_is_the_originals(model: Any, expected: dict[str, Any]) -> None:
    with torch.no_grad():
        loss = model(expected["loss.input_ids"], labels=expected["loss.labels"]).loss
    assert abs(loss.item() - expected["loss.value"].item()) <= 1e-5


def test_the_epsilon_is_the_originals_not_glms_default(model: Any) -> None:
    """GlmConfig's default differs and moves logits by only 4e-5."""
    assert model.config.rms_norm_eps == 1e-5


def test_generation_ends_where_a_turn_ends(model: Any) -> None:
    assert model.generation_config.eos_token_id == [2, 2406, 2408]  # </s>, <|user|>, <|observation|> after 2,400 pieces
    assert model.generation_config.pad_token_id == 0


def test_nothing_is_left_to_chance_when_it_is_loaded(native: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(native, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_convert_to_the_same_tensors(golden: Path, native: Path, tmp_path: Path, suffix: str) -> None:
    source = in_shards(golden, tmp_path / "source", count=4, suffix=suffix)
    report = convert_chatglm3(source, tmp_path / "target")
    assert (report.shards, report.tensors, report.already) == (4, 17, False)
    assert same(tensors_in(tmp_path / "target"), tensors_in(native))


def test_a_sharded_directory_loads(golden: Path, model: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert_chatglm3(in_shards(golden, tmp_path / "source", count=3, suffix="safetensors"), tmp_path / "target")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert same(loaded.state_dict(), model.state_dict())


def test_the_32k_model_has_its_rope_ratio_and_length(golden: Path, tmp_path: Path) -> None:
    """chatglm3-6b-32k: rope_ratio 50, seq_length 32768."""
    source = edited(golden / "checkpoint", tmp_path / "source", rope_ratio=50, seq_length=32768)
    convert_chatglm3(source, tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text(encoding="utf-8"))
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000, "partial_rotary_factor": 0.5}
    assert config["max_position_embeddings"] == 32768


# -- back ----------------------------------------------------------------------------------------------------------


def test_reverse_gives_every_file_back_byte_for_byte(golden: Path, native: Path, tmp_path: Path) -> None:
    convert_chatglm3(native, tmp_path / "back", reverse=True)
    for file in (golden / "checkpoint").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_reverse_gives_every_shard_back_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    source = in_shards(golden, tmp_path / "source", count=4, suffix="safetensors")
    convert_chatglm3(source, tmp_path / "native")
    convert_chatglm3(tmp_path / "native", tmp_path / "back", reverse=True)
    for file in source.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_reverse_of_bin_shards_has_the_same_tensors_in_safetensors(golden: Path, tmp_path: Path) -> None:
    source = in_shards(golden, tmp_path / "source", count=2, suffix="bin")
    convert_chatglm3(source, tmp_path / "native")
    convert_chatglm3(tmp_path / "native", tmp_path / "back", reverse=True)
    assert not list((tmp_path / "back").glob("*.bin"))
    assert same(tensors_in(tmp_path / "back"), tensors_in(golden / "checkpoint"))


def test_reverse_needs_the_folder_of_the_original(native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "native", ignore=shutil.ignore_patterns("original"))
    with pytest.raises(ConversionError, match=r"original/files\.json"):
        convert_chatglm3(tmp_path / "native", tmp_path / "back", reverse=True)


# -- again and resumed ---------------------------------------------------------------------------------------------


def test_a_second_conversion_changes_nothing(golden: Path, tmp_path: Path) -> None:
    convert_chatglm3(golden / "checkpoint", tmp_path / "target")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "target").rglob("*")}
    report = convert_chatglm3(golden / "checkpoint", tmp_path / "target")
    assert report.already
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "target").rglob("*")} == before


def test_a_killed_conversion_goes_on_with_the_next_shard(golden: Path, tmp_path: Path) -> None:
    source = in_shards(golden, tmp_path / "source", count=4, suffix="safetensors")
    target = tmp_path / "target"
    # what SIGKILL leaves: no handler and no `finally` runs
    script = (
        "import os, sys; from pathlib import Path; from chains.chatglm3.convert import convert_chatglm3\n"
        "die = lambda done, total: os._exit(9) if done == 2 else None\n"
        "convert_chatglm3(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)"
    )
    killed = subprocess.run([sys.executable, "-c", script, source, target], cwd=ROOT, check=False, timeout=100)
    assert killed.returncode == 9
    done = sorted(file.name for file in target.glob("*.safetensors"))
    assert done == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert not (target / MANIFEST).exists()
    before = {name: (target / name).stat().st_mtime_ns for name in done}
    steps: list[tuple[int, int]] = []
    report = convert_chatglm3(source, target, progress=lambda *step: steps.append(step))
    assert not report.already
    assert {name: (target / name).stat().st_mtime_ns for name in done} == before
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert (target / MANIFEST).exists()
    assert not (target / "conversion.json").exists()


def test_another_checkpoint_is_not_mixed_into_a_conversion(golden: Path, tmp_path: Path) -> None:
    convert_chatglm3(golden / "checkpoint", tmp_path / "target")
    other = in_shards(golden, tmp_path / "other", count=2, suffix="safetensors")
    with pytest.raises(ConversionError, match="other files"):
        convert_chatglm3(other, tmp_path / "target")


def test_a_folder_with_something_in_it_is_left_alone(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConversionError, match="not empty"):
        convert_chatglm3(golden / "checkpoint", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("fp32_residual_connection", True),
        ("pre_seq_len", 128),
        ("quantization_bit", 4),
        ("multi_query_attention", False),
        ("rmsnorm", False),
        ("tie_word_embeddings", True),
    ],
)
def test_a_setting_without_a_counterpart_is_named(golden: Path, tmp_path: Path, name: str, value: object) -> None:
    source = edited(golden / "checkpoint", tmp_path / "source", **{name: value})
    with pytest.raises(ConversionError, match=f"{name}={value!r}"):
        convert_chatglm3(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b", "/models/ChatGLM2-6B-32k", "THUDM/codegeex2-6b"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_chatglm2_which_has_the_same_tensors_is_told_by_its_name(
    golden: Path, tmp_path: Path, file: str, name: str
) -> None:
    key = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}[file]
    source = edited(golden / "checkpoint", tmp_path / "source")
    settings = json.loads((source / file).read_text(encoding="utf-8"))
    (source / file).unlink()
    (source / file).write_text(json.dumps({**settings, key: name}), encoding="utf-8")
    with pytest.raises(ConversionError, match=rf"{file} says that this is {name}.*use THUDM/chatglm3-6b"):
        convert_chatglm3(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_model_of_another_kind_is_named(native: Path, tmp_path: Path) -> None:
    shutil.copyfile(native / "original" / "tokenizer.model", tmp_path / "tokenizer.model")
    shutil.copyfile(native / "config.json", tmp_path / "config.json")
    with pytest.raises(ConversionError, match="'glm'"):
        convert_chatglm3(tmp_path, tmp_path.with_name("target"))


def changed(golden: Path, folder: Path, change: Any) -> Path:
    """The golden checkpoint with changed tensors."""
    from safetensors.torch import save_file

    tensors = tensors_in(golden / "checkpoint")
    change(tensors)
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(golden / "checkpoint" / name, folder / name)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_missing_unknown_and_misshapen_tensors_are_all_named(golden: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["transformer.output_layer.weight"]
        tensors["transformer.prefix_encoder.weight"] = torch.zeros(2)
        tensors["transformer.encoder.final_layernorm.weight"] = torch.zeros(65)

    with pytest.raises(ConversionError, match="3 problem") as caught:
        convert_chatglm3(changed(golden, tmp_path / "source", change), tmp_path / "target")
    assert "output_layer.weight is missing" in caught.value.en
    assert "prefix_encoder.weight is not known" in caught.value.en
    assert "final_layernorm.weight has shape (65,), expected (64,)" in caught.value.en


def test_a_missing_shard_is_named(golden: Path, tmp_path: Path) -> None:
    source = in_shards(golden, tmp_path / "source", count=3, suffix="bin")
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ConversionError, match=r"missing: pytorch_model-00002-of-00003\.bin"):
        convert_chatglm3(source, tmp_path / "target")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_shard_cut_off_by_the_download_is_named(golden: Path, tmp_path: Path, suffix: str) -> None:
    source = in_shards(golden, tmp_path / "source", count=2, suffix=suffix)
    shard = next(source.glob(f"*00002.{suffix}"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match=f"{shard.name} is damaged or cut off"):
        convert_chatglm3(source, tmp_path / "target")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a model file ran')",))


def test_code_in_a_bin_file_never_runs(golden: Path, tmp_path: Path) -> None:
    source = in_shards(golden, tmp_path / "source", count=2, suffix="bin")
    torch.save({"x": Evil()}, next(source.glob("*00001-of-00002.bin")))
    with pytest.raises(ConversionError, match="holds more than tensors"):
        convert_chatglm3(source, tmp_path / "target")


def test_source_and_target_must_differ(golden: Path) -> None:
    with pytest.raises(ConversionError, match="both"):
        convert_chatglm3(golden / "checkpoint", golden / "checkpoint")
