"""Resumable checkpoints: weights, optimizer state and position, written beside and renamed, never pickled.

Randomness needs no saving: the order, the sampling and the dropout of a step depend on seed, epoch and step alone.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.directories import replaced
from loaders.errors import RagProjError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_STEP, _BEST = "step-", "best-"


class CheckpointError(RagProjError):
    """Checkpoints that belong to another run, or cannot be read."""


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its weights."""

    step: int
    """optimizer steps done"""
    run: Mapping[str, Any]
    """what decides its course: settings and a hash of the rows"""
    evaluations: Mapping[str, Any]
    """of `EarlyStopping.state`"""
    scaler: Mapping[str, Any]
    """of the gradient scaler; empty without one"""
    losses: tuple[float, ...]
    """of every step so far"""
    monitor: Mapping[str, Any] = field(default_factory=dict)
    """of `Monitor.state`; empty without one"""


class Checkpoints:
    """The folder of a run's checkpoints: the newest, and the weights of the best evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State, model: nn.Module, optimizer: Optimizer, *, best_step: int | None) -> None:
        """Write a checkpoint, then remove the older ones and the weights of all but the best step."""
        import torch

        target = self.folder / f"{_STEP}{state.step:08}"
        names: dict[Tensor, str] = {parameter: name for name, parameter in _trained(model)}
        tensors = {
            f"{names[parameter]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }
        with replaced(target) as temporary:
            _save(_weights(model), temporary / _WEIGHTS)
            _save(tensors, temporary / _OPTIMIZER)
            content = json.dumps(vars(state), ensure_ascii=False, default=list)
            (temporary / _STATE).write_text(content, encoding="utf-8")
        keep = {target.name} | ({f"{_BEST}{best_step:08}"} if best_step is not None else set())
        for old in self._existing():
            if old.name not in keep:
                shutil.rmtree(old)

    def newest(self, run: Mapping[str, Any]) -> Path | None:
        """The checkpoint to go on from, or None at the start of a run.

        Raises:
            CheckpointError: it is of a run with other settings or rows.
        """
        found = sorted(path for path in self._existing() if path.name.startswith(_STEP))
        if not found:
            return None
        saved = _read_state(found[-1]).run
        changed = sorted(key for key in {*saved, *run} if saved.get(key) != json.loads(json.dumps(run.get(key))))
        if changed:
            listed = "; ".join(f"{key}: {saved.get(key)!r} -> {run.get(key)!r}" for key in changed)
            raise CheckpointError(
                f"{self.folder} 中的检查点属于另一次训练（{listed}）；请恢复原设置、换一个 output，或删除该目录",
                f"the checkpoints in {self.folder} are of a run with other settings ({listed}); restore them, choose"
                " another output, or delete that folder",
            )
        return found[-1]

    def load(self, checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> State:
        """Put weights and optimizer state of a checkpoint in place; the rest comes back."""
        from safetensors.torch import load_file

        load_weights(model, checkpoint / _WEIGHTS)
        parameters = dict(_trained(model))
        for key, value in load_file(checkpoint / _OPTIMIZER).items():
            name, _, part = key.rpartition("/")
            parameter = parameters[name]
            device = "cpu" if part == "step" and not optimizer.defaults.get("fused") else parameter.device
            # bitsandbytes counts its steps in plain numbers, torch in floating-point tensors
            plain = value.dim() == 0 and not value.is_floating_point()
            optimizer.state[parameter][part] = value.item() if plain else value.to(device)
        return _read_state(checkpoint)

    def save_best(self, step: int, model: nn.Module) -> None:
        """Keep the weights of this step beside the checkpoints, until a checkpoint names another as the best."""
        with replaced(self.folder / f"{_BEST}{step:08}") as temporary:
            _save(_weights(model), temporary / _WEIGHTS)

    def load_best(self, step: int, model: nn.Module) -> None:
        """Put the weights of the best evaluation in place."""
        load_weights(model, self.folder / f"{_BEST}{step:08}" / _WEIGHTS)

    def clear(self) -> None:
        """Remove everything: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _existing(self) -> Iterable[Path]:
        """Complete ones; what a killed process left half-written is removed."""
        if not self.folder.is_dir():
            return []
        for left in self.folder.glob(".*"):
            shutil.rmtree(left)
        return sorted(path for path in self.folder.iterdir() if path.name.startswith((_STEP, _BEST)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Put saved values into the trained parameters of a model.

    Raises:
        CheckpointError: the file names other parameters.
    """
    import torch
    from safetensors.torch import load_file

    saved, parameters = load_file(path), dict(_trained(model))
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise CheckpointError(
            f"{path} 的参数与模型不一致，例如 {odd[0]}；请确认 model 和 method 没有变",
            f"{path} has other parameters than the model, such as {odd[0]}; see that model and method are the same",
        )
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def _read_state(checkpoint: Path) -> State:
    try:
        fields = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        return State(**{**fields, "losses": tuple(fields["losses"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"检查点 {checkpoint} 无法读取（{error}）；请删除它，训练将从更早处重新开始",
            f"checkpoint {checkpoint} cannot be read ({error}); delete it, training then starts from before it",
        ) from None
