"""AdamW over the parameters that are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.training_config import TrainingConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def adamw(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """torch's AdamW with the rate and the weight decay of a config."""
    import torch

    return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters as optimizer groups: matrices decay, vectors (biases, norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
