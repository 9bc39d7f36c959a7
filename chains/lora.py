"""LoRA adapters as they serve: put on the base that they were trained on, and on no other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.bge.directory import MANIFEST, ModelDirectoryError
from chains.chatglm3.checkpoints import Checkpoint, read_json

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG = "adapter_config.json"
_SCHEME = "sample-"  # before a mark, to tell it from what other versions may write there
_SAMPLED = 32  # values at the start, in the middle and at the end of each tensor


def base_mark(directory: Path) -> str:
    """What tells the weights of a base from others, "sample-" and 16 hex digits; a training's report keeps it.

    It is a hash of some values of each tensor, which a training changes nearly all of. So 12 GB are known in a moment,
    and the same weights are the same in other shards, in .bin or safetensors, in float16 or float32. An original
    ChatGLM3 is known by the native directory that it is converted to.

    Raises:
        RagProjError: there are no weights, or they are damaged.
    """
    checkpoint = Checkpoint(directory)
    values: dict[str, bytes] = {}
    for file in checkpoint.files:
        for name in checkpoint.names_in(file):
            tensor = checkpoint.get(name)
            if tensor.is_floating_point():
                values[name] = _sample(tensor)
    total = hashlib.sha256()
    for name, sample in sorted(values.items()):
        total.update(f"{name} {checkpoint.shapes[name]}".encode() + sample)
    return f"{_SCHEME}{total.hexdigest()[:16]}"


def _sample(tensor: Tensor) -> bytes:
    import torch

    flat = tensor.reshape(-1)
    middle = len(flat) // 2
    parts = (flat[:_SAMPLED], flat[middle : middle + _SAMPLED], flat[-_SAMPLED:])
    return torch.cat([part.to(torch.float16) for part in parts]).numpy().tobytes()


def resolve_adapter(name: str | Path) -> Path:
    """The directory of a LoRA adapter, of BGE or of ChatGLM3; it is never fetched.

    Raises:
        ModelDirectoryError: there is no adapter; says where a training that was refused left its candidate.
    """
    path = Path(name).expanduser()
    if (path / _CONFIG).is_file():
        return path
    candidate = path.with_name("candidate")
    refused = path.name == "model" and (candidate / _CONFIG).is_file()
    raise ModelDirectoryError(
        f"{name} 不是 LoRA 适配器目录（没有 adapter_config.json）；"
        + (f"这次训练没有通过判定，候选在 {candidate}；" if refused else "请检查路径；")
        + "不用适配器就写 adapter=null",
        f"{name} is no LoRA adapter (it has no adapter_config.json); "
        + (f"its training was refused, the candidate is {candidate}; " if refused else "check the path; ")
        + "adapter=null goes without one",
    )


def with_adapter(model: Any, adapter: str | Path, base: Path, *, merge: bool = False) -> Any:
    """The model with a PEFT adapter on it, or with the adapter added to its weights.

    Args:
        model: loaded from the base, quantised or not.
        adapter: its directory, in the native layout.
        base: directory of the model.
        merge: add it to the weights, which is faster and equal to 1e-5.

    Raises:
        ModelDirectoryError: there is no adapter, it was trained on other weights, as its training's report says, or on
            other layers.
        RagProjError: the base's weights cannot be read.
    """
    from peft import PeftModel

    adapter = resolve_adapter(adapter)
    _check_base(adapter, base)
    device = str(next(model.parameters()).device)  # without one PEFT opens a GPU where there is one
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), local_files_only=True, torch_device=device)
        _check_layers(adapted, adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # damaged; other layers, other sizes
        raise _misfit(adapter, error) from error
    return adapted.merge_and_unload() if merge else adapted


def _misfit(adapter: Path, error: Exception) -> ModelDirectoryError:
    """What to raise where PEFT cannot put an adapter on a model, naming the base that it was trained on."""
    base = read_json(adapter / _CONFIG).get("base_model_name_or_path")
    reason = " ".join(str(error).split())[:200]
    return ModelDirectoryError(
        f"适配器 {adapter} 不能装到这个模型上：它的底座是 {base}，请把 model 改成它（{reason}）",
        f"the adapter {adapter} does not fit the model: its base is {base}, name that as `model` ({reason})",
    )


def _check_base(adapter: Path, base: Path) -> None:
    """Raise where the adapter's report says that it was trained on other weights than the base's."""
    name, trained_on = _trained_on(adapter)
    if not trained_on.startswith(_SCHEME):
        return
    found = base_mark(base)
    if trained_on != found:
        raise ModelDirectoryError(
            f"适配器 {adapter} 不是在 {base} 的权重上训练的：它的底座是 {name}，权重标识 {trained_on}，"
            f"而这里是 {found}；请把 model 改成训练时的底座",
            f"the adapter {adapter} was not trained on the weights in {base}: its base is {name}, whose weights have"
            f" the mark {trained_on}, not {found}; name the base of its training as `model`",
        )


def _trained_on(adapter: Path) -> tuple[str, str]:
    """(name, mark) of the base in a report; empty where there is none, as with adapters from elsewhere."""
    try:
        said = json.loads((adapter / MANIFEST).read_text(encoding="utf-8"))["base"]
        return str(said["model"]), str(said["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def _check_layers(adapted: Any, adapter: Path) -> None:
    """Raise where file and model have different layers: PEFT leaves those of one side alone and goes on.

    Raises:
        ValueError: names one of them.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    ours = set(get_peft_model_state_dict(adapted, dict(adapted.named_parameters()), save_embedding_layers=False))
    theirs = set(load_peft_weights(str(adapter), device="cpu"))
    if ours != theirs:
        raise ValueError(
            f"{len(theirs - ours)} of the adapter's weights have no place in the model and {len(ours - theirs)} places"
            f" have no weights, such as {min(ours ^ theirs)}"
        )
